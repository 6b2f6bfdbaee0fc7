"""Checkpoints of the released DiT and SiT code, opened as if they were bundles. Only ``ditkit convert`` and ``verify`` read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ditkit.bundle import BundleConfig, DataCard, Opened, Part, Sampling
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.core.files import TensorFile, folder_hash
from ditkit.loading import shapes_of

from . import dit
from .checkpoints import read_checkpoint
from .hints import Hints
from .schedulers import gaussian
from .tables import Renamed


class Note(Config):
    """What our export leaves in the metadata of a released layout, which does not say it."""

    system: Literal["dit", "sit"]
    constructor: dit.Constructor
    ours: dit.Ours


def read_note(path: Path) -> Note | None:
    """The note in a file that we exported."""
    if path.suffix != ".safetensors":
        return None
    with TensorFile(path) as file:
        text = file.metadata.get("ditkit")
    try:
        return None if text is None else Note.parse(json.loads(text), f"{path}: metadata")
    except json.JSONDecodeError:
        raise WeightsError(f"{path} has damaged metadata", hint="export the file again") from None


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
    note = read_note(path)
    cfg = note.constructor.to_ours(note.ours) if note else dit.config_from_official(shapes, hints, str(path))
    part = Part(name="dit", config=cfg.to_dict())
    tensors = Renamed(str(path), shapes, weights.__getitem__, dit.official_table(cfg), shapes_of(part))
    process, sampling = released_defaults(hints.system or (note.system if note else "dit"), learned=cfg.out_channels == 2 * cfg.in_channels)
    bundle = BundleConfig(
        backbone=part,
        process=process,
        codec=Part(name="identity", config={"channels": cfg.in_channels}),
        data=DataCard(name=path.stem, shape=(cfg.in_channels, *cfg.input_size)),
        sampling=sampling,
    )
    return Opened(path, bundle, tensors, folder_hash(path.parent, [path.name]))


def released_defaults(system: str, learned: bool) -> tuple[Part, Sampling]:
    """Process and sampler of the released ``sample.py``: 250 steps (of DDPM; SiT: dopri5, at most), scale 4 on the first three channels.

    Args:
        system: "dit", or "sit" (linear path and velocity, its default; time runs from noise at 0 to data at 1).
        learned: the network has twice the channels: DiT's variance, or a half that SiT discards.
    """
    guidance: Mapping[str, Any] = {"scale": 4.0, "channels": 3}
    if system == "dit":
        return gaussian(learned), Sampling(solver="ddpm", num_inference_steps=250, guidance=dict(guidance))
    if system == "sit":
        process = Part(name="interpolant", config={"path": "linear", "prediction": "velocity", "discard_half": learned})
        return process, Sampling(solver="dopri5", num_inference_steps=250, guidance=dict(guidance))
    raise DitkitError(f"system is {system!r}", allowed="dit, sit")
