"""The example plugin is on the path, as an installed package would be; torch is deterministic and quiet."""

import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "plugin"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return  # only hands out the work
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party imports warn about each other
        import torch
        import torch._dynamo
    torch.manual_seed(0)
