"""One registry: a backbone, a method or a text encoder is a file, and the file's name is the registered name.

``ditkit/backbones/dit.py`` registers ``dit``; that is also its config name, CLI name, doc page and test id. Names and
first lines are read without importing the file (so ``ditkit list`` and ``--help`` need no torch). Other packages
register through entry points of the groups ``ditkit.backbones``, ``ditkit.methods`` and ``ditkit.encoders``, or by calling ``register``.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal, TypeVar

from .errors import DitkitError, nearest

Kind = Literal["backbones", "methods", "encoders"]
_HOME = Path(__file__).resolve().parents[1]
_FOLDERS: dict[str, tuple[str, ...]] = {
    "backbones": ("backbones",),
    "methods": ("methods/efficiency", "methods/adaptation", "methods/control", "methods/editing"),
    "encoders": ("conditioning/encoders",),
}
_classes: dict[tuple[str, str], type] = {}
T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Entry:
    """A registered part: its name, the module that defines it, the first line of its docstring."""

    kind: Kind
    name: str
    module: str
    summary: str


def register(kind: Kind, name: str) -> Callable[[T], T]:
    """Class decorator. The class gets ``.name``; a second class under the same name is refused."""

    def add(cls: T) -> T:
        old = _classes.get((kind, name))
        if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            raise DitkitError(f"{kind} {name!r} is registered twice: {old.__module__} and {cls.__module__}", hint="rename one")
        cls.name = name  # type: ignore[attr-defined]
        _classes[kind, name] = cls
        return cls

    return add


def entries(kind: Kind) -> dict[str, Entry]:
    """All registered parts of a kind, by name; nothing is imported."""
    found = dict(_shipped(kind))
    for point in entry_points(group=f"ditkit.{kind}"):
        found[point.name] = Entry(kind, point.name, point.value.split(":")[0], f"from {point.value.split('.')[0]}")
    for (k, name), cls in _classes.items():
        if k == kind and name not in found:
            found[name] = Entry(kind, name, cls.__module__, (cls.__doc__ or "").split("\n")[0])
    return found


@cache
def _shipped(kind: Kind) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for folder in _FOLDERS[kind]:
        for file in sorted((_HOME / folder).glob("*.py")):
            if not file.name.startswith("_"):
                doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
                module = ".".join(("ditkit", *folder.split("/"), file.stem))
                found[file.stem] = Entry(kind, file.stem, module, doc.split("\n")[0])
    return found


def get(kind: Kind, name: str) -> type:
    """The class registered under ``name``; imports its file. Raises DitkitError naming what there is."""
    if (kind, name) not in _classes:
        known = entries(kind)
        if name not in known:
            hint = nearest(name, known) or f"ditkit list {kind}"
            raise DitkitError(f"there is no {kind[:-1]} {name!r}", allowed=", ".join(sorted(known)), hint=hint)
        importlib.import_module(known[name].module)
        if (kind, name) not in _classes:
            raise DitkitError(f"{known[name].module} registers no {kind[:-1]} {name!r}", hint="use @register with the file's name")
    return _classes[kind, name]
