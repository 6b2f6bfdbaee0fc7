"""What ``compile_view`` can be asked for, without torch, so that command lines know it too."""

GRAINS = ("block", "step")
ENGINES = ("inductor", "openvino")
