"""int8: projections in 8-bit integers, weights per output channel, activations per token as they come.

A dynamic W8A8 scheme, as in LLM.int8() (arXiv 2208.07339, section 3.1, vector-wise) without its outlier columns; nothing is calibrated or
learned. Activations are rounded between the smallest and the largest value of their token (not symmetrically: after GELU all but
a few bits would be lost).

Which kernel computes it is tried once on the machine at hand; where none is faster than fp32, that is said. To gain, compile the view:
rounding is then fused into the norm, the attention's output or the GELU before it.
"""

from __future__ import annotations

import re
import warnings
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from ditkit.core import registry
from ditkit.core.config import Config
from ditkit.core.errors import Conflict
from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.nn.int8 import KERNELS, Int8Linear, has_onednn
from ditkit.nn.probe import Choice, int8_kernel, rightness


class Int8Config(Config):
    """Which projections are stored in 8 bits, and how they are multiplied."""

    include: str = Field(r"^blocks\.", description="regular expression searched for in the names of linear layers")
    exclude: str = Field(
        r"\.(ada|router)$", description="regular expression: what is left alone. Modulation has one row a sample: little time, much effect"
    )
    kernel: Literal["auto", "onednn", "int_mm", "dequantise"] = Field(
        "auto", description="auto: the fastest here. dequantise: stored in 8 bits, multiplied in the model's dtype"
    )

    @field_validator("include", "exclude")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"no regular expression ({error})") from None
        return pattern


@registry.register("methods", "int8")
class Int8(Method):
    """Replaces projections in the view; the base keeps its own, and can be dropped."""

    config_class = Int8Config
    stage = "numbers"
    owns = frozenset({"weights"})
    tolerance = 5e-2
    _choice: Choice | None = None

    def replace(self, path: str, module: nn.Module) -> nn.Module | None:
        cfg = self.config
        if type(module) is not nn.Linear or not re.search(cfg.include, path) or (cfg.exclude and re.search(cfg.exclude, path)):
            return None
        choice = self.choice(module.weight.device)
        return Int8Linear(module, choice.kernel, choice.saturates)

    def choice(self, device: torch.device) -> Choice:
        """The kernel on this device: ``config.kernel``, or the fastest. Warns where none is faster, raises Conflict where it is wrong."""
        if self._choice is None:
            self._choice = _choose(self.config.kernel, torch.device("cpu") if device.type == "meta" else device)
        return self._choice

    def finish(self, run: Run) -> dict[str, Any]:
        layers = [m for m in run.model.modules() if isinstance(m, Int8Linear)]
        bits = (layers[0].levels + 1).bit_length() - 1
        return {"kernel": layers[0].kernel, "activation_bits": bits, "layers": len(layers)}

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(kernel="onednn" if has_onednn() else "int_mm")]


def _choose(kernel: str, device: torch.device) -> Choice:
    if kernel == "auto":
        choice = int8_kernel(device.type)
        if not choice.pays:
            warnings.warn(f"int8 makes nothing faster on this machine, only smaller ({choice})", stacklevel=2)
        return choice
    if kernel == "dequantise":
        return Choice(kernel, False, 0.0, {})
    if not (right := rightness(KERNELS[kernel], device)):
        raise Conflict(f"the int8 kernel {kernel!r} gives wrong results, or none, on this {device.type}", hint="kernel='auto'")
    return Choice(kernel, right == "saturates", 0.0, {})
