"""Where things are kept that can be made again: ``$DITKIT_CACHE``, else ``ditkit`` in the user's cache folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cache_dir(name: str) -> Path:
    """The folder ``name`` of the cache; it may not exist yet. Nothing in it is needed: whoever reads it can make it again."""
    if chosen := os.environ.get("DITKIT_CACHE"):
        return Path(chosen) / name
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ditkit" / name


def keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors there. A cache that cannot be written costs time next time, nothing else."""
    from .files import write_tensors  # imports torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)
    except OSError:
        pass
