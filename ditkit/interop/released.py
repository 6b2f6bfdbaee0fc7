"""Checkpoints of the released DiT and SiT code, opened as if they were bundles. Only ``ditkit convert`` and ``verify`` read them.

Pickle is read with torch's ``weights_only`` and no fallback: a file that holds anything but tensors, plain data and the
``argparse.Namespace`` of the training script is refused.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.bundle import BundleConfig, DataCard, Opened, Part, Sampling
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.core.files import check_finite, folder_hash, read_tensors
from ditkit.loading import shapes_of

from . import dit
from .hints import Hints
from .schedulers import gaussian
from .tables import Renamed

PICKLED = (".pt", ".pth", ".ckpt", ".bin")


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
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(f"{path} cannot be read safely: {reason[0][:200]}", allowed="tensors and plain data") from None
    if isinstance(data, dict) and ("ema" in data or "model" in data):
        if weights not in data:
            raise WeightsError(f"{path} holds no {weights!r} weights", allowed=", ".join(k for k in ("ema", "model") if k in data))
        data = data[weights]
    if not isinstance(data, dict) or not data or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        raise WeightsError(f"{path} is no table of tensors", hint="a state dict, or a training checkpoint of the released code")
    for name, value in data.items():
        check_finite(path, name, value)
    return data


def open_released(path: Path, hints: Hints | None = None) -> Opened:
    """A released DiT or SiT checkpoint in our words: weights, process, and the sampler defaults of its ``sample.py``.

    Raises:
        DitkitError: the keys are others, a shape cannot be, or something must be said in ``hints``.
    """
    hints = hints or Hints()
    weights = read_checkpoint(path, hints.weights)
    if not dit.is_official(weights):
        raise WeightsError(f"{path} is no released DiT or SiT: its first keys are {sorted(weights)[:3]}", allowed="their keys")
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    cfg = dit.config_from_official(shapes, hints, str(path))
    part = Part(name="dit", config=cfg.to_dict())
    tensors = Renamed(str(path), shapes, weights.__getitem__, dit.official_table(cfg), shapes_of(part))
    process, sampling = released_defaults(hints.system, learned=cfg.out_channels == 2 * cfg.in_channels)
    bundle = BundleConfig(
        backbone=part,
        process=process,
        codec=Part(name="identity", config={"channels": cfg.in_channels}),
        data=DataCard(name=path.stem, shape=(cfg.in_channels, *cfg.input_size)),
        sampling=sampling,
    )
    return Opened(path, bundle, tensors, folder_hash(path.parent, [path.name]))


def released_defaults(system: str, learned: bool) -> tuple[Part, Sampling]:
    """Process and sampler of the released ``sample.py``: 250 steps, scale 4, guidance on the first three channels.

    Args:
        system: "dit", or "sit" (linear path and velocity, its default; time runs from noise at 0 to data at 1).
        learned: the network has twice the channels: DiT's variance, or a half that SiT discards.
    """
    guidance: Mapping[str, Any] = {"scale": 4.0, "channels": 3}
    if system == "dit":
        return gaussian(learned), Sampling(solver="ddpm", num_inference_steps=250, guidance=dict(guidance))
    if system == "sit":
        process = Part(name="flow", config={"network_time": "sit", "discard_half": learned})
        return process, Sampling(solver="euler", num_inference_steps=250, guidance=dict(guidance))
    raise DitkitError(f"system is {system!r}", allowed="dit, sit")
