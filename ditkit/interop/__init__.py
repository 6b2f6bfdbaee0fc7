"""Other layouts of weights and other libraries' pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .stand_in import as_diffusers

__all__ = ["as_diffusers"]


def __getattr__(name: str) -> Any:
    if name == "as_diffusers":  # when it is asked for: the tables load no torch
        from .stand_in import as_diffusers

        return as_diffusers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
