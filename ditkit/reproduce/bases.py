"""Bases: models that experiments stand on, trained once and found again by content hash.

The hash is of the recipe and of the code that decides what its training gives; comments, docstrings and layout do not count.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch

from ditkit.bundle import find_bundle, open_bundle
from ditkit.core.cache import cache_dir
from ditkit.core.config import read_data
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.core.files import write_json
from ditkit.train import Recipe, train

log = logging.getLogger("ditkit")
PACKAGE = Path(__file__).resolve().parents[1]
PACKAGES = ("core", "nn", "diffusion", "train")  # all that computes a step; the backbone and the data set are added by name
PARTS = {"scenes": ("scene_*.py", "glyphs.py")}  # of data sets that are made of several files
NOTE = "base.json"


class Stopped(Exception):
    """A signal ended training after a checkpoint; the same command goes on from there."""


@dataclass(frozen=True)
class Base:
    """A trained model on the disk."""

    folder: Path
    hash: str
    seconds: float  # of its training, whenever that was
    reused: bool
    threads: int = 0  # that its training had; 0: not known


class BaseStore:
    """Trained bases under ``root`` (by default the user's cache), one folder a content hash; what is half trained goes on."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root) if root is not None else cache_dir("bases")
        if self.root.exists() and not self.root.is_dir():
            raise DitkitError(f"{self.root} is a file", hint="choose a folder for the bases")

    def home(self, base: Base) -> Path:
        """The folder of what is made of a base, such as its cuts: a bundle's own folder is left as it is."""
        return self.root / base.hash[:32]

    def get(self, recipe: Recipe, progress: bool = True) -> Base:
        """The base of ``recipe``, trained now unless it is there. Raises Stopped when a signal ended the training."""
        key = content_hash(recipe)
        folder = self.root / key[:32]
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if (spent := _finished(folder)) is not None:
                return Base(folder, key, **spent, reused=True)
            start = time.perf_counter()
            if not train(recipe, folder, progress=progress).finished:
                raise Stopped
            spent = {"seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}
            write_json(folder / NOTE, {"hash": key, **spent, "recipe": recipe.to_dict()})
            return Base(folder, key, **spent, reused=False)


def _finished(folder: Path) -> dict[str, Any] | None:
    """What training took, if the folder holds a whole base. A damaged one is an error, not a reason to train over it."""
    note = folder / NOTE
    if not note.is_file():
        return None
    try:
        open_bundle(folder)
    except WeightsError as error:
        raise WeightsError(f"the base in {folder} is damaged: {error.what}", hint="remove that folder; it is trained again") from None
    values = read_data(note)
    return {"seconds": float(values["seconds"]), "threads": int(values.get("threads", 0))}


def bundle_base(name: str, seconds: float = 0.0, threads: int = 0) -> Base:
    """A base that was trained before: a bundle that ditkit ships, or a folder, and what its training took, if that is known."""
    folder = find_bundle(name)
    return Base(folder, open_bundle(folder).hash, seconds, reused=True, threads=threads)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two experiments that need the same base train it once: the second waits. The lock goes with the process that holds it."""
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        _lock(file)
        yield


def _lock(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    fcntl.flock(file, fcntl.LOCK_EX)


def content_hash(recipe: Recipe) -> str:
    """SHA-256 of the recipe, the code that trains it, torch and the kind of device."""
    values = recipe.to_dict()
    for key in ("sampling", "claim"):  # what training does not see
        values.pop(key)
    device = recipe.trainer.device
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device.split(":")[0]
    backbone = recipe.backbone.name if recipe.backbone else ""
    if recipe.base is not None:
        opened = open_bundle(find_bundle(recipe.base))
        values["base"], backbone = opened.hash, opened.config.backbone.name
    if "teacher" in recipe.objective.config:  # a bundle: what is in it counts, not where it is
        values["objective"]["config"]["teacher"] = open_bundle(find_bundle(recipe.objective.config["teacher"])).hash
    told = recipe.encoder is not None or (recipe.base is not None and opened.config.encoder is not None)
    files = [*code_of(backbone, recipe.data.name, told), *(path for m in recipe.methods for path in method_files(m.name))]
    content = [values, code_hash(tuple(files)), torch.__version__, kind]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def method_files(name: str) -> tuple[Path, ...]:
    """The source of a method of ditkit and what methods of its folder share; of another package's nothing: its code is not seen."""
    found = sorted((PACKAGE / "methods").glob(f"*/{name}.py"))
    return (found[0], *sorted(found[0].parent.glob("_[a-z]*.py"))) if found else ()


def code_of(backbone: str, data: str, told: bool = False) -> tuple[Path, ...]:
    """The source files that decide what training gives. ``told``: the network is told captions."""
    files = [path for name in (*PACKAGES, *(["conditioning"] if told else [])) for path in sorted((PACKAGE / name).rglob("*.py"))]
    files += [p for p in (PACKAGE / "backbones" / f"{backbone}.py", PACKAGE / "data" / f"{data}.py") if p.is_file()]
    files += [p for pattern in PARTS.get(data, ()) for p in sorted((PACKAGE / "data").glob(pattern))]
    if not files:
        raise DitkitError(f"{PACKAGE} holds no source", hint="install ditkit with its .py files")
    return tuple(files)


def code_hash(files: tuple[Path, ...]) -> str:
    """SHA-256 of what the files do: their syntax trees without docstrings."""
    return hashlib.sha256("\n".join(_file_hash(path) for path in files).encode()).hexdigest()


@lru_cache(maxsize=1024)
def _file_hash(path: Path) -> str:
    """Of one file, as it is when it is first asked for: this process runs what it has imported."""
    text = f"{path.relative_to(PACKAGE)}\n{meaning(path.read_text(encoding='utf-8'))}"
    return hashlib.sha256(text.encode()).hexdigest()


def meaning(source: str) -> str:
    """The syntax tree without comments, docstrings and line numbers."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
            if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                node.body = body[1:]
    return ast.dump(tree)
