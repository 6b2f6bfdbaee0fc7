"""Registered backbones, imported when first used: ``ditkit.backbones.NAME`` for the class in the file of that name."""

from __future__ import annotations

from typing import Any

from ditkit.core import registry


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    wanted = name.lower().replace("_", "")
    for known in registry.entries("backbones"):
        if known.replace("_", "") == wanted:
            cls = registry.get("backbones", known)
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"ditkit.backbones has no {name!r}; there are {', '.join(registry.entries('backbones'))}")
