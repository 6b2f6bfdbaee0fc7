"""Diffusers folders, opened as if they were bundles: a pipeline (model_index.json) or a transformer alone (config.json)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ditkit.bundle import BundleConfig, DataCard, EncoderPart, Opened, Part
from ditkit.core.config import Config, read_data
from ditkit.core.errors import ConfigError, DitkitError, WeightsError, nearest
from ditkit.core.files import MANIFEST, TensorFile, check_names, folder_hash, verify_manifest
from ditkit.loading import shapes_of

from .checkpoints import read_checkpoint
from .families import Family, families, family
from .hints import without_notes
from .schedulers import read_flow_scheduler, read_scheduler
from .tables import Renamed

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"


def is_diffusers(folder: Path) -> bool:
    """Whether the folder is one of diffusers', not a bundle."""
    if (folder / "model_index.json").is_file():
        return True
    return (folder / "config.json").is_file() and "_class_name" in _json(folder / "config.json")


def open_diffusers(folder: Path, as_released: bool = False, pickled: bool = False) -> Opened:
    """Check configuration, names and shapes of a diffusers folder; weights are read from ``tensors`` of the result.

    Args:
        as_released: see ``Hints``.
        pickled: also read ``.bin`` files, with torch's weights_only; only ``ditkit convert`` does.

    Raises:
        ConfigError, WeightsError: an unknown class, key or value; a tensor missing, extra or misshapen; weights only as pickle.
    """
    if (folder / MANIFEST).is_file():
        verify_manifest(folder)
    labels: tuple[str, ...] = ()
    transformer = folder
    if (folder / "model_index.json").is_file():
        labels = _read_index(folder / "model_index.json")
        transformer = folder / "transformer"
    backbone, tables, cfg = read_transformer(transformer / "config.json", as_released)
    files = open_weights(transformer, pickled)
    part = Part(name=backbone, config=cfg.to_dict())
    tensors = Renamed(str(transformer), files.shapes, files.read, tables.diffusers_table(cfg), shapes_of(part))
    process, sampling = _process(folder / "scheduler" / "scheduler_config.json", tables, cfg)
    codec, shape = _codec(folder / "vae", cfg)
    bundle = BundleConfig(
        backbone=part,
        process=process,
        codec=codec,
        encoder=_encoder(folder, tables, cfg),
        data=DataCard(name=folder.name, shape=shape, labels=labels if len(labels) == getattr(cfg, "num_classes", 0) else ()),
        sampling=sampling,
    )
    return Opened(folder, bundle, tensors, folder_hash(transformer, ["config.json", *files.names]))


def read_transformer(path: Path, as_released: bool = False) -> tuple[str, Family, Any]:
    """Of the class that a transformer's config.json names: our backbone, its tables, its configuration in our words."""
    values = _json(path)
    backbone = next((name for name, tables in families().items() if tables.is_diffusers(values)), None)
    if backbone is None:
        name, known = values.get("_class_name"), [tables.CLASS for tables in families().values() if tables.CLASS]
        hint = nearest(str(name), known) or "this architecture is not supported"
        raise ConfigError(f"{path}: _class_name is {name!r}", allowed=", ".join(known), hint=hint)
    return backbone, family(backbone), family(backbone).config_from_diffusers(values, str(path), as_released)


def _process(path: Path, tables: Any, cfg: Any) -> tuple[Part, Any]:
    """Process and sampling of the scheduler's file; of flows without one, those of their release."""
    if not hasattr(tables, "FLOW_TIME"):
        return read_scheduler(path, learned=cfg.out_channels == 2 * cfg.in_channels)
    process, sampling = tables.released_defaults(tables.SYSTEMS[0], cfg)
    return read_flow_scheduler(path, process, sampling) if path.is_file() else (process, sampling)


def _encoder(folder: Path, tables: Any, cfg: Any) -> EncoderPart | None:
    """The text encoders beside the transformer, as the family's pipeline asks them; None where the folder has none."""
    if not hasattr(tables, "text_encoder") or not (folder / "text_encoder" / "config.json").is_file():
        return None
    part: Part = tables.text_encoder(folder.absolute(), cfg)  # a bundle made of it is found from anywhere
    return EncoderPart(name=part.name, config=part.config)


class _WeightIndex(Config):
    metadata: dict[str, Any] = {}
    weight_map: dict[str, str]


@dataclass(frozen=True)
class ModelFiles:
    """The weights of a diffusers model by their names: a ``Source`` over one file or several."""

    names: list[str]  # of the files
    homes: Mapping[str, TensorFile | Mapping[str, Tensor]]  # tensor -> where it is

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {n: home.shapes[n] if isinstance(home, TensorFile) else tuple(home[n].shape) for n, home in self.homes.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, finite throughout."""
        home = self.homes[name]
        return home.read(name) if isinstance(home, TensorFile) else home[name]


def open_weights(folder: Path, pickled: bool = False) -> ModelFiles:
    """The weight files of a diffusers model folder: safetensors, in one piece or with an index; pickle where ``pickled``."""
    index, single, old = folder / f"{WEIGHTS}.index.json", folder / WEIGHTS, folder / PICKLED_WEIGHTS
    if index.is_file():
        where = _WeightIndex.parse(read_data(index), str(index)).weight_map
        if bad := [n for n in where.values() if Path(n).name != n]:
            raise WeightsError(f"{index} names the file {bad[0]!r}", allowed="files beside it")
        files = {name: TensorFile(folder / name) for name in sorted({*where.values()})}
        found = {tensor: file for file in files.values() for tensor in file.entries}
        check_names(index, where, found)
        for tensor, name in where.items():
            if tensor not in files[name].entries:
                raise WeightsError(f"{folder / name} lacks {tensor!r}", allowed=f"what {index.name} says", hint="download the folder again")
        return ModelFiles([*files, index.name], found)
    if single.is_file():
        file = TensorFile(single)
        return ModelFiles([WEIGHTS], dict.fromkeys(file.entries, file))
    if not old.is_file():
        raise WeightsError(f"{folder} holds no {WEIGHTS}", hint="download the folder again")
    if not pickled:
        raise WeightsError(f"{old} is pickle", allowed="safetensors", hint=f"ditkit convert {folder} OUT_FOLDER")
    tensors = read_checkpoint(old)
    return ModelFiles([PICKLED_WEIGHTS], dict.fromkeys(tensors, tensors))


def _json(path: Path) -> Mapping[str, Any]:
    values = read_data(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}", allowed="an object of keys and values")
    return values


def _read_index(path: Path) -> tuple[str, ...]:
    """Class names of a pipeline's model_index.json."""
    values = _json(path)
    name = values.get("_class_name")
    tables = next((tables for tables in families().values() if name in tables.PIPELINES), None)
    if tables is None:
        known = [p for tables in families().values() for p in tables.PIPELINES]
        raise ConfigError(f"{path}: _class_name is {name!r}", allowed=", ".join(known))
    if unknown := [key for key in without_notes(values) if key not in tables.INDEX_KEYS]:
        allowed = ", ".join(tables.INDEX_KEYS)
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}", allowed=allowed, hint=nearest(unknown[0], tables.INDEX_KEYS))
    labels = values.get("id2label") or {}
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(len(labels))}:
        raise ConfigError(f"{path}: id2label", allowed="a name for each label from 0")
    return tuple(str(labels[str(i)]) for i in range(len(labels)))


def _codec(folder: Path, config: Any) -> tuple[Part, tuple[int, int, int]]:
    """The codec beside the transformer, and the shape of pictures; without one, latents are shown as they are."""
    from ditkit.codecs import codec_from

    c, (h, w) = config.in_channels, config.input_size
    if not (folder / "config.json").is_file():
        return Part(name="identity", config={"channels": c}), (c, h, w)
    part = Part(name="vae", config={"path": str(folder)})
    codec = codec_from(part.name, part.config)
    if codec.channels != c:
        raise DitkitError(f"{folder} has {codec.channels} latent channels", allowed=f"{c}, as the transformer has")
    return part, (codec.in_channels, h * codec.factor, w * codec.factor)
