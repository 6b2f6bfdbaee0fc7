"""The splits of a data set of your own: folders ``train`` and ``test`` (or ``val``, ...) below its root."""

from __future__ import annotations

from pathlib import Path

from ditkit.core.errors import DitkitError

from . import NoSplit

_SPLITS = {"train": "train", "valid": "test", "validation": "test", "val": "test", "test": "test"}  # folder -> split


def split_folder(root: Path, split: str) -> Path:
    """``root/split`` where all folders of root are named after splits, else ``root``."""
    there = splits(root)
    if not there:
        return root
    if split not in there:
        raise NoSplit(f"{root} has no split {split!r}", allowed=", ".join(there), hint=f"make {root / split}")
    return there[split]


def splits(root: Path) -> dict[str, Path]:
    """The folders of the splits, where root holds nothing else: a class may well be called train."""
    if not root.is_dir():
        raise DitkitError(
            f"{root} is no folder", allowed="a folder of pictures, of .tar shards or of cached latents", hint="check the path"
        )
    names = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if not names <= set(_SPLITS):
        return {}
    return {split: root / name for name, split in _SPLITS.items() if name in names}
