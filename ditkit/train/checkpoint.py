"""Checkpoints: ``step-N/`` folders that are whole or absent, with the resolved recipe and a manifest of SHA-256.

A save goes: temporary folder, flush of every file, manifest, rename, then ``latest``, then pruning; at least two are kept. So
whatever kills the process, a loadable checkpoint stays. One process writes ``model``, ``ema`` and ``optimizer`` as tensor
files; several write their shards through torch's distributed checkpoint (DCP), also as tensor files; each reads both.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ditkit
from ditkit.core.errors import ConfigError, WeightsError
from ditkit.core.files import TensorFile, atomic_file, atomic_folder, remove_temporary, verify_manifest, write_json, write_tensors

from .distributed import World
from .recipe import Recipe, differences, dump_recipe, load_recipe

LATEST, STATE, RECIPE = "latest", "state.json", "recipe.yaml"
FREE = (  # may differ between the sessions of one run: nothing that is learned depends on it
    "claim",
    "sampling",
    *(f"trainer.{k}" for k in ("steps", "save_every", "keep", "sample_every", "validate_every", "validation_samples", "log_every")),
    *(f"trainer.{k}" for k in ("accumulation", "device", "compile", "activation_checkpointing", "replicas")),
)
TUNED = tuple(  # may differ, with a word
    f"trainer.{k}"
    for k in ("learning_rate", "betas", "weight_decay", "warmup_steps", "schedule", "grad_clip", "ema_decay", "spike_sigma", "dtype")
)
Groups = Mapping[str, Mapping[str, Tensor]]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its step, folder and plain state."""

    step: int
    folder: Path
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: holds the ``step-N`` folders.
        keep: how many of the newest stay, 2 or more.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world

    def save(self, step: int, groups: Groups, state: Mapping[str, Any], recipe: Recipe) -> None:
        """Write ``step-N`` with the tensors of each group; all processes must call it."""
        target = self.folder / f"step-{step}"
        with atomic_folder(target) if self.world.first else nullcontext() as mine:
            new = Path(self.world.tell(str(mine)))
            if self.world.size == 1:
                for name, tensors in groups.items():
                    write_tensors(new / f"{name}.safetensors", _named(name, tensors))
            else:
                _write_shards(new, groups)
            if self.world.first:
                write_json(new / STATE, {"format": 1, "step": step, **state, **environment(self.world)})
                with atomic_file(new / RECIPE) as file:
                    file.write(dump_recipe(recipe).encode("utf-8"))
            self.world.wait()
        if self.world.first:
            with atomic_file(self.folder / LATEST) as file:
                file.write(f"{target.name}\n".encode())
            self._prune()
        self.world.wait()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are all as they were written; damaged ones are set aside, with a word."""
        found = None
        if self.world.first and self.folder.is_dir():
            remove_temporary(self.folder)
            found = next((c for c in map(self._verified, sorted(self.steps(), reverse=True)) if c is not None), None)
        return self.world.tell(found)

    def load(self, checkpoint: Checkpoint, groups: Groups) -> None:
        """Copy the checkpoint into the tensors of each group, one by one.

        Raises:
            WeightsError: a tensor is missing, extra or misshapen.
        """
        whole = all((checkpoint.folder / f"{name}.safetensors").is_file() for name in groups)
        if self.world.size > 1 or not whole:
            return _read_shards(checkpoint.folder, groups, self.world)
        for group, tensors in groups.items():
            with torch.no_grad(), TensorFile(checkpoint.folder / f"{group}.safetensors") as file:
                named = _named(group, tensors)
                file.check({name: tuple(t.shape) for name, t in named.items()})
                for name, t in named.items():
                    t.copy_(file.read(name))

    def steps(self) -> list[int]:
        """Steps of the checkpoints that exist."""
        if not self.folder.is_dir():
            return []
        return [int(m[1]) for p in self.folder.iterdir() if p.is_dir() and (m := re.fullmatch(r"step-(\d+)", p.name))]

    def _verified(self, step: int) -> Checkpoint | None:
        folder = self.folder / f"step-{step}"
        try:
            verify_manifest(folder)
            return Checkpoint(step, folder, _read_state(folder))
        except WeightsError as error:
            aside = folder.with_name(f"damaged-{folder.name}")
            _log.warning("checkpoint %s is damaged (%s): it is kept as %s, the one before is used", folder.name, error, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            return None

    def _prune(self) -> None:
        for step in sorted(self.steps())[: -self.keep]:
            folder = self.folder / f"step-{step}"
            # renamed first: a folder that is half removed must not look like a checkpoint
            leaving = folder.with_name(f".{folder.name}.tmp-pruned")
            os.replace(folder, leaving)
            shutil.rmtree(leaving, ignore_errors=True)


def check_same_run(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on from a checkpoint of another recipe; a changed learning rate and its like are said and taken.

    Raises:
        ConfigError: naming the keys.
    """
    changed = differences(load_recipe(folder / RECIPE).to_dict(), recipe.to_dict())
    changed = [k for k in changed if not any(k == f or k.startswith(f + ".") for f in FREE)]
    if refused := [k for k in changed if k not in TUNED]:
        raise ConfigError(
            f"{folder} was written with other values of {', '.join(refused)}",
            allowed="the recipe it was trained with, but for cadence, length, device and the optimiser's numbers",
            hint="choose another --out, or --no-resume to start anew",
        )
    if changed:
        _log.warning("from here on with other values of %s than %s", ", ".join(changed), folder)


def environment(world: World) -> dict[str, Any]:
    """What a result may depend on besides the recipe."""
    return {
        "versions": {
            "ditkit": ditkit.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": world.size,
        "random_numbers": "philox4x64 by (seed, step, purpose, row)",
    }


def _named(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}.{name}": t for name, t in tensors.items()}


def _flat(groups: Groups) -> dict[str, Tensor]:
    return {name: t.detach() for group, tensors in groups.items() for name, t in _named(group, tensors).items()}


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["format"] != 1:
            raise WeightsError(f"{folder} has format {state['format']}", allowed="1", hint="a newer ditkit wrote it")
        return dict(state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{folder / STATE} cannot be read: {error}", hint="use an earlier checkpoint") from None


def _write_shards(folder: Path, groups: Groups) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings(action="ignore"):  # torch warns about its own use of storages and collectives
        dcp.save(_flat(groups), storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))


def _read_shards(folder: Path, groups: Groups, world: World) -> None:
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    flat = _flat(groups)
    found = reader.read_metadata().state_dict_metadata
    shapes = {name: tuple(getattr(meta, "size", ())) for name, meta in found.items()}
    wrong = [n for n in {*flat, *shapes} if n not in flat or n not in shapes or shapes[n] != tuple(flat[n].shape)]
    if wrong:
        raise WeightsError(
            f"{folder}: {sorted(wrong)[:5]} are missing, unknown or misshapen", hint="resume with the recipe it was saved with"
        )
    with warnings.catch_warnings(action="ignore"):  # torch warns about its own use of storages and collectives
        dcp.load(flat, storage_reader=reader, no_dist=world.size == 1)
