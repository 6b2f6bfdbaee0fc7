"""What kind of data set stands at a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .folder import ImageFolder
from .latent_set import INDEX, LatentSet
from .shards import ImageShards
from .splits import splits


def open_path(path: str | Path, split: str = "train", *, progress: bool = True, **options: Any) -> Any:
    """The data set in a folder: cached latents, ``.tar`` shards, or pictures. Or in one ``.tar`` file."""
    root = Path(path)
    if root.is_file() and root.suffix == ".tar":
        return ImageShards(root, split, progress=progress, **options)
    folders = [root, *splits(root).values()]
    if any((folder / INDEX).is_file() for folder in folders):
        return LatentSet(root, split, **options)
    if any(any(folder.glob("*.tar")) for folder in folders):
        return ImageShards(root, split, progress=progress, **options)
    return ImageFolder(root, split, progress=progress, **options)
