"""Your own pictures: ``root/class_name/*.png`` with class labels, or ``name.png`` with ``name.txt`` as captions.

``data.load("path/to/folder", resolution=64)`` scans the folder before anything else happens. Where ``root`` holds folders
``train`` and ``test``, these are the splits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ditkit.core.errors import DitkitError

from .pictures import ImageConfig, Kind, Pictures, held_out, refuse_missing, scanned
from .scan import Fault, Listing, Member, Sample
from .splits import split_folder, splits
from .transforms import SUFFIXES

_UNREADABLE = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".exr", ".hdr")


class ImageFolder(Pictures):
    """A folder of pictures with class folders, with captions, or without either.

    Args:
        root: the folder.
        split: "train" or "test"; see the module and ``ImageConfig.test_fraction``.
        progress: show a bar on stderr where it lasts.
        options: see ``ImageConfig``.
    """

    def __init__(self, root: str | Path, split: str = "train", *, progress: bool = True, **options: Any) -> None:
        config = ImageConfig.parse(options, f"options of {root}")
        folder = split_folder(Path(root), split)
        listing = list_folder(folder, progress)
        kind = _kind(listing, config, folder)
        samples, faults = _by_kind(listing, kind, config)
        found = scanned(folder, samples, faults, config, progress)
        pictures = found.pictures if folder != Path(root) else held_out(found.pictures, config.test_fraction, split)
        super().__init__(str(root), kind, _labels(Path(root), samples), found, pictures, config)


def list_folder(root: Path, progress: bool = True) -> Listing:
    """All pictures below ``root``, each with the caption of its name; names that begin with a dot are left out."""
    listing = Listing()
    with tqdm(desc="list", unit=" files", delay=2, disable=not progress) as bar:
        for folder, entries in _walk(root, listing.faults):
            files = {}
            for entry in entries:
                try:
                    status = entry.stat()
                except OSError as error:  # a link to nothing, or no permission
                    listing.faults.append(Fault(_name(folder, entry), f"cannot be read: {error.strerror or error}"))
                    continue
                name = _name(folder, entry)
                files[entry.name] = Member(name, name, 0, status.st_size, status.st_mtime_ns)
            _take(files, listing)
            bar.update(len(files))
    listing.samples.sort(key=lambda s: s.picture.name)
    return listing


def _take(files: dict[str, Member], listing: Listing) -> None:
    """Pair the pictures of one folder with its captions."""
    captions = {stem: m for stem, suffix, m in _split(files) if suffix == ".txt"}
    for stem, suffix, member in _split(files):
        if suffix in SUFFIXES:
            listing.samples.append(Sample(member, captions.get(stem)))
        elif suffix in _UNREADABLE:
            listing.faults.append(Fault(member.name, f"{suffix} pictures cannot be read: convert to .png or .jpg"))


def _split(files: dict[str, Member]) -> Iterator[tuple[str, str, Member]]:
    for name, member in files.items():
        stem, suffix = os.path.splitext(name)
        yield stem, suffix.lower(), member


def _walk(root: Path, faults: list[Fault]) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """(folder relative to root, its files) for every folder; links are followed, each folder is visited once."""
    todo, seen = [""], set()
    while todo:
        folder = todo.pop()
        real = os.path.realpath(root / folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(real) as found:
                entries = [e for e in found if not e.name.startswith(".")]
        except OSError as error:
            faults.append(Fault(folder, f"cannot be read: {error.strerror or error}"))
            continue
        todo += [_name(folder, e) for e in entries if e.is_dir()]
        yield folder, [e for e in entries if not e.is_dir()]


def _name(folder: str, entry: os.DirEntry[str]) -> str:
    return f"{folder}/{entry.name}" if folder else entry.name


def _kind(listing: Listing, config: ImageConfig, root: Path) -> Kind:
    if config.kind != "auto":
        return config.kind
    if any(s.caption is not None for s in listing.samples):
        return "captions"
    if all("/" in s.picture.name for s in listing.samples):
        return "classes"
    raise DitkitError(
        f"pictures of {root} have no captions, and not all are in class folders ({_loose(listing.samples)[0]})",
        allowed="root/class_name/*.png, or name.png beside name.txt",
        hint="sort them so, or kind='unlabelled' to train without conditions",
    )


def _by_kind(listing: Listing, kind: Kind, config: ImageConfig) -> tuple[list[Sample], list[Fault]]:
    """Samples and faults of that kind of folder."""
    if kind == "captions":
        refuse_missing(listing.samples, config)
        return listing.samples, listing.faults
    bare = [Sample(s.picture) for s in listing.samples]
    if kind == "unlabelled":
        return bare, listing.faults
    loose = [Fault(name, "is in no class folder") for name in _loose(bare)]
    classed = [s._replace(label=s.picture.name.split("/")[0]) for s in bare if "/" in s.picture.name]
    return classed, [*listing.faults, *loose]


def _loose(samples: Sequence[Sample]) -> list[str]:
    return [s.picture.name for s in samples if "/" not in s.picture.name]


def _labels(root: Path, samples: Sequence[Sample]) -> list[str]:
    """Class names of all splits: numbers must mean the same in each of them."""
    found = {s.label for s in samples if s.label is not None}
    if found:
        for folder in splits(root).values():
            found |= {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    return sorted(found)
