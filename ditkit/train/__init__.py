"""Training: recipes, the one loop, and what it stands on. ``from ditkit.train import load_recipe, train``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from .loop import TrainResult, train

__all__ = ["Recipe", "TrainResult", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    if name in ("train", "TrainResult"):
        from . import loop

        return getattr(loop, name)
    raise AttributeError(f"module 'ditkit.train' has no attribute {name!r}")
