"""The example plugin is on the path, as an installed package would be; torch is deterministic and quiet."""

import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "plugin"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # third-party imports warn about each other
    import torch
    import torch._dynamo

torch.manual_seed(0)
