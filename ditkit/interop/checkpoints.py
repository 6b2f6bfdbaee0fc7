"""Weight files of others. Pickle is read with torch's ``weights_only`` and no fallback, and only where a user converts or verifies,
and once for a packaged network whose file is known by its hash (``eval/efficientnet.py``). A file that holds anything but tensors,
plain data and the ``argparse.Namespace`` of a training script is refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ditkit.core.errors import WeightsError
from ditkit.core.files import check_finite, read_tensors

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
_HELD = {"ema": ("ema", "state_dict_ema"), "model": ("model", "state_dict")}  # DiT's key, PixArt's


def read_checkpoint(path: Path, weights: str = "ema") -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a pickled checkpoint; of a training checkpoint, those of ``weights``.

    Raises:
        WeightsError: the file cannot be read safely, holds no tensors, or a tensor is not finite.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if path.suffix not in PICKLED or not path.is_file():
        raise WeightsError(f"{path} is no weight file", allowed=f".safetensors, {', '.join(PICKLED)}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(f"{path} cannot be read safely: {reason[0][:200]}", allowed="tensors and plain data") from None
    if isinstance(data, dict) and (held := {kind: key for kind, keys in _HELD.items() for key in keys if key in data}):
        if weights not in held:
            raise WeightsError(f"{path} holds no {weights!r} weights", allowed=", ".join(held), hint=f"--weights {next(iter(held))}")
        data = data[held[weights]]
    if not isinstance(data, dict) or not data or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        raise WeightsError(f"{path} is no table of tensors", hint="a state dict, or a training checkpoint of the released code")
    for name, value in data.items():
        check_finite(path, name, value)
    return data
