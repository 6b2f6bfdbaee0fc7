"""Doing what ``starts.py`` says: from the pipeline of a trained base to the pipeline of what starts from it."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ditkit.backbones.dit import DiT
from ditkit.backbones.pixart import PixArt
from ditkit.bundle import BundleConfig, Part
from ditkit.conditioning import TextEncoder, encoder_from
from ditkit.core.backbone import Backbone
from ditkit.core.errors import ConfigError, nearest
from ditkit.core.files import MANIFEST
from ditkit.data import load
from ditkit.methods.pruning import base_of
from ditkit.pipeline import Pipeline
from ditkit.train import starts as training
from ditkit.train.build import caption_card, encoder_card

from .bases import PACKAGE, code_hash
from .starts import FromDiT, Reconfigured, Start


def started(pipe: Pipeline, start: Start, seed: int) -> Pipeline:
    """The pipeline of the new network, without methods; ``seed`` draws what is new in it.

    Raises:
        ConfigError: the base does not fit the start.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _from_dit(pipe, start) if isinstance(start, FromDiT) else _reconfigured(pipe, start)


def _from_dit(pipe: Pipeline, start: FromDiT) -> Pipeline:
    encoder = encoder_from(start.encoder.name, start.encoder.config)
    model = pixart_of(base_of(pipe.eager), encoder, start)
    if start.tables == "random":
        fresh = {n: p for n, p in PixArt(model.config).named_parameters() if n.endswith("table")}
        model.load_state_dict({**model.state_dict(), **fresh})
    if encoder.learned:
        model.encoder = encoder
    card = pipe.config.data
    data = caption_card(card, load(card.name, "test", **card.config))
    return _pipeline(pipe, model, encoder, {"data": data.to_dict(), "encoder": encoder_card(encoder).to_dict()})


def pixart_of(dit: Backbone, encoder: TextEncoder, start: FromDiT) -> Any:
    """The PixArt that has a DiT's weights, sizes and positions, and is told an encoder's captions."""
    follows = {"text_dim": encoder.dim, "text_length": encoder.length, "null_caption": encoder.null_caption == "model"}
    follows |= {"input_size": dit.config.input_size} if isinstance(dit, DiT) else {}
    return training.from_dit(dit, training.FromDiT(t=start.t), Part(name="pixart", config=start.config), follows)


def _reconfigured(pipe: Pipeline, start: Reconfigured) -> Pipeline:
    old = base_of(pipe.eager)
    model = training.reset(old, Part(name=old.name, config=start.config), {}).eval()
    modules, kept = dict(model.named_modules()), old.state_dict()
    for pattern in start.redraw:
        names = [n for n in fnmatch.filter(modules, pattern) if not any(k.startswith(f"{n}.") for k in kept)]
        if not names:
            raise ConfigError(
                f"redraw {pattern!r} matches no new module", allowed="patterns: 'blocks.*.attn.down.conv'", hint=nearest(pattern, modules)
            )
        for name in names:
            modules[name].reset_parameters()
    return _pipeline(pipe, model, model.encoder or pipe.encoder, {})


def _pipeline(pipe: Pipeline, model: Backbone, encoder: TextEncoder | None, card: dict[str, Any]) -> Pipeline:
    backbone = {"name": model.name, "config": model.config.to_dict()}
    config = BundleConfig.parse({**pipe.config.to_dict(), **card, "backbone": backbone, "methods": []})
    return Pipeline(model, config, codec=pipe.codec, encoder=encoder)


def started_part(part: Part, encoder: Part | None, start: Start) -> tuple[Part, Part | None]:
    """What ``started`` makes of a backbone and its encoder, in settings."""
    if isinstance(start, Reconfigured):
        return Part(name=part.name, config={**part.config, **start.config}), encoder
    new = encoder_from(start.encoder.name, start.encoder.config)
    with torch.device("meta"):
        model = pixart_of(DiT(**part.config), new, start)
    return Part(name="pixart", config=model.config.to_dict()), start.encoder


def start_folder(folder: Path, home: Path, name: str, start: Start, seed: int) -> str:
    """The bundle of what a trained base in ``folder`` is turned into, written below ``home`` once. ``name``: of the start."""
    code = code_hash((Path(__file__), PACKAGE / "backbones" / "pixart.py", PACKAGE / "train" / "starts.py"))
    key = hashlib.sha256(json.dumps([start.to_dict(), code], sort_keys=True).encode()).hexdigest()[:16]
    made = home / "starts" / f"{name}-seed-{seed}-{key}"
    if not (made / MANIFEST).is_file():
        pipe = Pipeline.from_pretrained(folder, dtype="float32", device="cpu")
        started(pipe, start, seed).save_pretrained(made)
    return str(made)
