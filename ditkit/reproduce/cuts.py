"""Bases with fewer blocks than another: ``@NAME:CUT`` in a protocol is the base NAME, cut by one of these criteria.

    learned        the blocks that its TinyFusion decided on
    importance:N   N blocks stay, those whose output is least like their input (the last always)
    error:N        those without which the loss grows most
    random:N       drawn by the seed
    loss:N         the choice of N with the smallest loss right after the cut, of all or of 1,000

Losses and similarities are of 256 training samples at fixed times and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ditkit.core.backbone import Backbone
from ditkit.core.errors import ConfigError
from ditkit.core.files import MANIFEST
from ditkit.data import load
from ditkit.methods.efficiency.tinyfusion import find
from ditkit.methods.pruning import (
    base_of,
    block_similarity,
    by_loss,
    least_needed,
    most_sensitive,
    prune_pipeline,
    random_blocks,
    sensitivity,
)
from ditkit.pipeline import Pipeline
from ditkit.train.batches import Batch, Batches
from ditkit.train.objectives import objective_from
from ditkit.train.previews import validation_loss

from .bases import PACKAGE, code_hash

SAMPLES = 256


def origin(text: str, folder: Path, home: Path, data: str, seed: int, options: Mapping[str, Any] | None = None) -> str:
    """The folder of ``@NAME`` or ``@NAME:CUT``, where NAME is in ``folder``; what is cut is written below ``home``, once."""
    _, _, how = text.partition(":")
    if not how:
        return str(folder)
    code = code_hash((Path(__file__), PACKAGE / "methods" / "pruning.py"))[:16]  # another criterion is another cut
    cut = home / "cuts" / f"{how.replace(':', '-')}-seed-{seed}-{code}"
    if not (cut / MANIFEST).is_file():
        pipe = Pipeline.from_pretrained(folder, dtype="float32", device="cpu")
        prune_pipeline(pipe, choose(pipe, how, data, seed, options)).save_pretrained(cut)
    return str(cut)


def choose(pipe: Pipeline, how: str, data: str, seed: int, options: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """The blocks that stay, by a criterion of the module's list; ``options`` of the data set. Raises ConfigError for another."""
    name, _, count = how.partition(":")
    model = base_of(pipe.eager).eval()
    depth, known = len(model.blocks), options or {}
    criteria: dict[str, Callable[[int], tuple[int, ...]]] = {
        "importance": lambda n: least_needed(similarity(pipe, model, data, known), depth - n),
        "error": lambda n: most_sensitive(sensitivity(model, loss_of(pipe, data, known)), n),
        "random": lambda n: random_blocks(depth, n, seed),
        "loss": lambda n: by_loss(model, n, loss_of(pipe, data, known))[0].keep,
    }
    if how == "learned":
        return find(pipe.eager).decide().keep
    if name not in criteria or not count.isdigit():
        raise ConfigError(f"cut {how!r}", allowed=f"learned, or {', '.join(criteria)}, each with a number of blocks: random:3")
    return criteria[name](int(count))


def calibration(pipe: Pipeline, data: str, options: Mapping[str, Any]) -> Batch:
    """Training samples with times and noise that never change."""
    train = load(data, "train", **options)
    draws = objective_from("diffusion", {}, pipe.process).draws
    (batch,) = Batches(train, draws, seed=0, batch_size=1, purpose="calibration").fixed(min(SAMPLES, len(train)))
    return batch


def loss_of(pipe: Pipeline, data: str, options: Mapping[str, Any]) -> Callable[[Backbone], float]:
    """The mean loss of a network on ``calibration``, with all its labels."""
    objective, batch = objective_from("diffusion", {"label_dropout": 0.0}, pipe.process), calibration(pipe, data, options)
    return lambda model: validation_loss(model, objective, [batch], SAMPLES)


def similarity(pipe: Pipeline, model: Backbone, data: str, options: Mapping[str, Any]) -> torch.Tensor:
    """``block_similarity`` on ``calibration``."""
    batch, process = calibration(pipe, data, options).tensors, pipe.process
    x0 = batch["x"]
    t = process.at(x0.shape[1:]).sample_time(batch["time"])
    x_t = process.network_input(process.add_noise(x0, batch["noise"], t), t)
    return block_similarity(model, x_t, process.network_time(t), y=batch["y"])
