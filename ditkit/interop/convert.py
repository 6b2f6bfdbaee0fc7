"""``ditkit convert``: any layout that we read to any that we write. Weights are renamed, never recomputed: round trips are bit-exact."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

from ditkit.bundle import BundleConfig, Opened, Part, backbone_config, find_bundle, open_bundle, write_bundle
from ditkit.codecs import codec_from, load_codec
from ditkit.codecs.base import Codec
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.core.files import atomic_folder, fingerprints, write_json, write_tensors

from .families import FAMILIES, Family, family
from .hints import Hints
from .layouts import WEIGHTS, is_diffusers, open_diffusers
from .released import Note, open_released
from .schedulers import write_scheduler
from .tables import load_all

log = logging.getLogger("ditkit")
Layout = Literal["ditkit", "official", "diffusers"]


def open_any(source: str | Path, hints: Hints | None = None) -> Opened:
    """Open a bundle, a diffusers folder (also one with pickled weights), or a released checkpoint."""
    hints, path = hints or Hints(), Path(source)
    if path.is_file():
        return open_released(path, hints)
    path = find_bundle(source)
    return open_diffusers(path, hints.as_released, pickled=True) if is_diffusers(path) else open_bundle(path)


def convert(
    source: str | Path, out: str | Path, to: Layout = "ditkit", hints: Hints | None = None, vae: str | Path | None = None
) -> Opened:
    """Write ``source`` in another layout and return it, opened.

    Args:
        to: "ditkit": a bundle; "diffusers": a folder; "official": a ``.safetensors`` file with the released names.
        vae: folder of a diffusers VAE, for a source that has none: then pictures are decoded.

    Raises:
        DitkitError: the source does not fit its layout, or the target layout cannot hold it.
    """
    opened, out = open_any(source, hints), Path(out)
    if to != "ditkit" and (opened.config.methods or opened.config.backbone.name not in FAMILIES):
        raise DitkitError(f"{source} to {to}", allowed=f"{', '.join(FAMILIES)} without methods", hint="--to ditkit")
    codec = _codec(opened, vae)
    if to == "ditkit":
        _to_bundle(opened, out, codec)
    elif to == "diffusers":
        _to_diffusers(opened, out, codec)
    else:
        _to_official(opened, out)
    return opened


def _codec(opened: Opened, vae: str | Path | None) -> Codec:
    if vae is not None:
        codec = codec_from("vae", {"path": str(vae)})
        if codec.channels != opened.config.backbone.config["in_channels"]:
            raise DitkitError(f"{vae} has {codec.channels} channels", allowed=f"{opened.config.backbone.config['in_channels']}")
        return codec
    if opened.codec is not None:
        return load_codec(opened.codec)
    part = opened.config.codec
    return codec_from(part.name, part.config or {"channels": opened.config.data.shape[0]})


def _to_bundle(opened: Opened, out: Path, codec: Codec) -> None:
    config = opened.config
    if codec.name != "identity":
        h, w = config.backbone.config["input_size"]
        shape = (codec.in_channels, h * codec.factor, w * codec.factor)
        data = config.data.model_copy(update={"shape": shape})
        config = config.model_copy(update={"codec": Part(name=codec.name), "data": data})
    if config.methods:
        raise DitkitError(f"{opened.folder} is a bundle already", hint="copy the folder")
    tensors = load_all(opened.tensors)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_bundle(out, BundleConfig.parse({**config.to_dict(), "dtype": dtype}), tensors, codec=codec)


def _backbone(opened: Opened) -> Any:
    from ditkit.loading import learned_encoder

    if learned_encoder(opened.config.encoder) is not None:
        raise WeightsError(
            f"{opened.folder} holds a text encoder that was learned with the network", allowed="--to ditkit", hint="no other layout has it"
        )
    return backbone_config(opened.config.backbone, str(opened.folder))[1]


def _to_diffusers(opened: Opened, out: Path, codec: Codec) -> None:
    """The whole pipeline where there is a VAE, the transformer alone otherwise."""
    tables, cfg = family(opened.config.backbone.name), _backbone(opened)
    weights = tables.diffusers_table(cfg).export(load_all(opened.tensors))
    config = tables.config_to_diffusers(cfg)
    for text in tables.differences(cfg, "diffusers"):
        log.warning(text)
    scheduler = write_scheduler(opened.config)
    alone = "text_encoder" in tables.INDEX_KEYS  # we have none to write
    if scheduler is None and not alone:
        log.warning("diffusers has no scheduler for the %s process of these weights", opened.config.process.name)
    with atomic_folder(out) as new:
        whole = codec.name == "vae" and scheduler is not None and not alone
        transformer = new / "transformer" if whole else new
        transformer.mkdir(exist_ok=True)
        write_tensors(transformer / WEIGHTS, weights, {"format": "pt", **fingerprints(weights)})
        write_json(transformer / "config.json", config)
        if whole:
            (new / "vae").mkdir()
            codec.write(new / "vae")
            (new / "scheduler").mkdir()
            write_json(new / "scheduler" / "scheduler_config.json", scheduler)
            write_json(new / "model_index.json", _model_index(opened.config, tables, scheduler))


def _model_index(config: BundleConfig, tables: Family, scheduler: Any) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": tables.PIPELINES[0],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "transformer": ["diffusers", tables.CLASS],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if config.data.labels:
        index["id2label"] = {str(i): name for i, name in enumerate(config.data.labels)}
    return index


def _to_official(opened: Opened, out: Path) -> None:
    if out.suffix != ".safetensors" or out.exists():
        raise WeightsError(f"{out}", allowed="a new file that ends in .safetensors")
    tables, cfg = family(opened.config.backbone.name), _backbone(opened)
    for text in tables.differences(cfg, "official"):
        log.warning(text)
    weights = tables.official_table(cfg).export(load_all(opened.tensors))
    out.parent.mkdir(parents=True, exist_ok=True)
    system: Any = tables.system_of(opened.config.process.name, cfg)
    note = Note(system=system, constructor=tables.constructor_of(cfg).to_dict(), ours=tables.ours_of(cfg).to_dict())
    write_tensors(out, weights, {"ditkit": json.dumps(note.to_dict()), **fingerprints(weights)})
