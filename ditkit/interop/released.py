"""Checkpoints of released code, opened as if they were bundles. Only ``ditkit convert`` and ``verify`` read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ditkit.bundle import BundleConfig, DataCard, Opened, Part
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.core.files import TensorFile, folder_hash
from ditkit.loading import shapes_of

from .checkpoints import read_checkpoint
from .families import Family, families, family, family_of_system
from .hints import Hints, System
from .tables import Renamed

_PREFIX = "model.diffusion_model."


class Note(Config):
    """What our export leaves in the metadata of a released layout, which does not say it."""

    system: System
    constructor: dict[str, Any]
    ours: dict[str, Any]

    def config(self, where: str) -> Any:
        """The network's configuration in our words."""
        tables = family(family_of_system(self.system))
        constructor: Any = tables.Constructor.parse(self.constructor, f"{where}: metadata")
        return constructor.to_ours(tables.Ours.parse(self.ours, f"{where}: metadata"))


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
    """A released checkpoint in our words: weights, process, and the sampler defaults of its release.

    Raises:
        DitkitError: the keys are others, a shape cannot be, or something must be said in ``hints``.
    """
    hints = hints or Hints()
    weights = _network(read_checkpoint(path, hints.weights))
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    backbone, tables = _family_of(path, weights, hints)
    note = read_note(path)
    cfg = note.config(str(path)) if note else tables.config_from_official(shapes, hints, str(path))
    part = Part(name=backbone, config=cfg.to_dict())
    tensors = Renamed(str(path), shapes, weights.__getitem__, tables.official_table(cfg), shapes_of(part))
    process, sampling = tables.released_defaults(hints.system or (note.system if note else tables.system_of("gaussian", cfg)), cfg)
    bundle = BundleConfig(
        backbone=part,
        process=process,
        codec=Part(name="identity", config={"channels": cfg.in_channels}),
        data=DataCard(name=path.stem, shape=(cfg.in_channels, *cfg.input_size)),
        sampling=sampling,
    )
    return Opened(path, bundle, tensors, folder_hash(path.parent, [path.name]))


def _network(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a file that holds a whole pipeline (SD3's may), the network's tensors, by the names that it has alone."""
    return {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)} or weights


def _family_of(path: Path, names: Any, hints: Hints) -> tuple[str, Family]:
    found = next((name for name, tables in families().items() if tables.is_official(names)), None)
    known = ", ".join(system for tables in families().values() for system in tables.SYSTEMS)
    if found is None:
        raise WeightsError(f"{path} is no released checkpoint of {known}: its first keys are {sorted(names)[:3]}", allowed="their keys")
    if hints.system is not None and hints.system not in family(found).SYSTEMS:
        raise DitkitError(f"system is {hints.system!r}", allowed=", ".join(family(found).SYSTEMS) + f", by the keys of {path}")
    return found, family(found)
