"""Shards: ``.tar`` files in the layout of webdataset, read by place and written byte for byte alike.

A sample is a run of members with one key, the name up to the first dot after the last slash: ``0001.png`` with ``0001.cls``
(class number) or ``0001.txt`` (caption). Headers are read once; after that a sample is a seek and a read, so that any order
costs the same and a run resumes with one number. Names of members are keys and never become paths; links are refused.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, model_validator
from tqdm import tqdm

from ditkit.core.config import Config, read_data
from ditkit.core.errors import DitkitError
from ditkit.core.files import atomic_folder, write_json

from .pictures import ImageConfig, Kind, Pictures, held_out, refuse_missing, scanned
from .scan import Fault, Listing, Member, Sample, read_member
from .splits import split_folder
from .transforms import SUFFIXES

if TYPE_CHECKING:
    from . import Dataset

LABELS = "labels.json"  # class names in the order of their numbers, beside the shards; webdataset has no place for them
_MOST_CLASSES = 100_000  # without labels.json
_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)


class _Labels(Config):
    """Content of ``labels.json``."""

    labels: tuple[str, ...] = Field(min_length=1, max_length=_MOST_CLASSES)

    @model_validator(mode="after")
    def _distinct(self) -> _Labels:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a class name is given twice")
        return self


class ImageShards(Pictures):
    """The pictures of the ``.tar`` files of a folder, or of one such file, in the order of their names.

    Args:
        root: the folder or file.
        split: "train" or "test"; folders of these names in ``root``, or see ``ImageConfig.test_fraction``.
        progress: show a bar on stderr where it lasts.
        options: see ``ImageConfig``.
    """

    def __init__(self, root: str | Path, split: str = "train", *, progress: bool = True, **options: Any) -> None:
        config = ImageConfig.parse(options, f"options of {root}")
        is_file = Path(root).is_file()
        folder = Path(root).parent if is_file else split_folder(Path(root), split)
        files = [Path(root)] if is_file else sorted(folder.glob("*.tar"))
        names = _labels(folder, Path(root))
        listing, kind = list_shards(folder, files, config, names, progress)
        found = scanned(folder, listing.samples, listing.faults, config, progress)
        whole = is_file or folder == Path(root)
        pictures = held_out(found.pictures, config.test_fraction, split) if whole else found.pictures
        if kind == "classes" and names is None:
            names = tuple(str(i) for i in range(1 + max(int(s.label or 0) for s in listing.samples)))
        super().__init__(str(root), kind, names or () if kind == "classes" else (), found, pictures, config)


class _Group(NamedTuple):
    """The members of one sample."""

    picture: Member
    caption: Member | None
    label: Member | None


def list_shards(
    folder: Path, files: list[Path], config: ImageConfig, names: tuple[str, ...] | None, progress: bool = True
) -> tuple[Listing, Kind]:
    """The samples of these shards, and what kind they are. ``names``: of the classes, where there are any."""
    listing = Listing()
    groups: list[_Group] = []
    for path in tqdm(files, desc="list", unit=" shards", delay=2, disable=not progress):
        groups += _groups(path, listing.faults)
    kind = _kind(groups, config, folder)
    for group in groups:
        if kind != "classes":
            listing.samples.append(Sample(group.picture, group.caption if kind == "captions" else None))
            continue
        label = _label(folder, group, names)
        if isinstance(label, Fault):
            listing.faults.append(label)
        else:
            listing.samples.append(Sample(group.picture, None, label))
    if kind == "captions":
        refuse_missing(listing.samples, config)
    return listing, kind


def _kind(groups: list[_Group], config: ImageConfig, folder: Path) -> Kind:
    if config.kind != "auto":
        return config.kind
    if any(g.caption for g in groups):
        return "captions"
    if any(g.label for g in groups):
        return "classes"
    if groups:
        raise DitkitError(
            f"the shards of {folder} hold neither .txt nor .cls members", hint="kind='unlabelled' trains on the pictures alone"
        )
    return "unlabelled"


def _label(folder: Path, group: _Group, names: tuple[str, ...] | None) -> str | Fault:
    """The class name of a sample."""
    if group.label is None:
        return Fault(group.picture.name, "has no .cls member")
    try:
        text = read_member(folder, group.label._replace(size=min(group.label.size, 32))).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    limit = len(names) if names else _MOST_CLASSES
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) >= limit:
        return Fault(group.label.name, f"is {text[:20]!r}, no class number (allowed: 0 to {limit - 1})")
    return names[int(text)] if names else str(int(text))


def _labels(folder: Path, root: Path) -> tuple[str, ...] | None:
    for place in (folder, root):
        if (place / LABELS).is_file():
            return _Labels.parse(read_data(place / LABELS), str(place / LABELS)).labels
    return None


def _groups(path: Path, faults: list[Fault]) -> Iterator[_Group]:
    """The samples of one shard that have a picture; members that belong to none are added to ``faults``."""
    key, parts, seen = "", dict[str, Member](), set[str]()
    for new_key, ext, member in _members(path, faults):
        if new_key != key:
            yield from _group(parts)
            seen.add(key)
            key, parts = new_key, {}
        if key in seen or ext in parts:
            faults.append(Fault(member.name, "is given twice, or its key is: the members of a sample are neighbours"))
        else:
            parts[ext] = member
    yield from _group(parts)


def _group(parts: dict[str, Member]) -> Iterator[_Group]:
    picture = next((m for ext, m in parts.items() if ext in SUFFIXES), None)
    if picture is not None:
        yield _Group(picture, parts.get(".txt"), parts.get(".cls"))


def write_shards(dataset: Dataset, folder: str | Path, *, max_samples: int = 10_000, max_bytes: int = 1_000_000_000) -> list[Path]:
    """Write a data set as shards ``00000.tar``, ..., with ``labels.json`` where it has classes; all of it or nothing.

    Files of pictures are copied as they are; a data set that has none is written as PNG. Equal data gives equal bytes.

    Args:
        max_samples, max_bytes: of one shard; a sample is never cut in two.

    Raises:
        DitkitError: max_samples or max_bytes is not positive, the pictures have neither 1 nor 3 channels, or one is a sample twice.
    """
    if max_samples < 1 or max_bytes < 1:
        raise DitkitError(f"max_samples is {max_samples}, max_bytes is {max_bytes}", allowed="1 or more")
    if isinstance(dataset, Pictures) and dataset.config.buckets is not None and dataset.config.buckets.sizes == "all":
        raise DitkitError("buckets.sizes is 'all': a picture is a sample at each of its sizes", allowed="a set loaded without buckets")
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        names = []
        for number, samples in enumerate(_filled(_samples(dataset), max_samples, max_bytes)):
            names.append(f"{number:05d}.tar")
            _write_tar(temporary / names[-1], samples)
        if dataset.labels:
            write_json(temporary / LABELS, {"labels": list(dataset.labels)})
    return [folder / name for name in names]


def _filled(samples: Iterator[dict[str, bytes]], max_samples: int, max_bytes: int) -> Iterator[Iterator[dict[str, bytes]]]:
    """Samples in runs that fill one shard each; a run is to be used up before the next."""
    pending = next(samples, None)

    def run() -> Iterator[dict[str, bytes]]:
        nonlocal pending
        count = size = 0
        while pending is not None and (count == 0 or (count < max_samples and size + _size(pending) <= max_bytes)):
            count, size = count + 1, size + _size(pending)
            yield pending
            pending = next(samples, None)

    while pending is not None:
        yield run()


def _size(sample: dict[str, bytes]) -> int:
    """Bytes that a sample takes in a tar file."""
    return sum(tarfile.BLOCKSIZE * (1 + -(-len(data) // tarfile.BLOCKSIZE)) for data in sample.values())


def _write_tar(path: Path, samples: Iterator[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for name, data in sample.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)  # time, owner and mode stay at their defaults, so that equal data gives equal bytes
                tar.addfile(info, io.BytesIO(data))
                tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps all headers


def _samples(dataset: Dataset) -> Iterator[dict[str, bytes]]:
    """Name -> bytes of the members of each sample."""
    with_captions = getattr(dataset, "has_captions", hasattr(dataset, "captions"))
    for i in range(len(dataset)):
        ids = np.array([i])
        if isinstance(dataset, Pictures):
            suffix, picture, y = *dataset.file_of(i), dataset.labels_of(ids)
        else:
            batch = dataset.batch(ids)
            suffix, picture, y = ".png", _png(batch["x"][0].numpy()), batch.get("y")
        sample = {f"{i:08d}{suffix}": picture}
        if y is not None:
            sample[f"{i:08d}.cls"] = str(int(y[0])).encode()
        if with_captions:
            sample[f"{i:08d}.txt"] = dataset.captions(ids)[0].encode()  # type: ignore[attr-defined]
        yield sample


def _png(x: np.ndarray) -> bytes:
    """x (C, H, W) in [-1, 1] -> a file."""
    if x.shape[0] not in (1, 3):
        raise DitkitError(f"pictures have {x.shape[0]} channels", allowed="1 or 3")
    values = np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0))).save(file, "PNG")
    return file.getvalue()


def _members(path: Path, faults: list[Fault]) -> Iterator[tuple[str, str, Member]]:
    """(key, extension, where it is) of every plain member."""
    mtime_ns = path.stat().st_mtime_ns
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps all headers
                found = _KEY.fullmatch(info.name)
                if not info.isreg() or info.issparse():
                    if not info.isdir():
                        faults.append(Fault(f"{path.name}/{info.name}", "is no plain file"))
                elif found:
                    ext = "." + found[2].rpartition(".")[2].lower()
                    yield found[1], ext, Member(f"{path.name}/{info.name}", path.name, info.offset_data, info.size, mtime_ns)
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        faults.append(Fault(path.name, _reason(path, error)))


def _check_end(path: Path, offset: int) -> None:
    """tarfile takes a damaged header for the end; the real end is a block of zeros."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header and no end mark at byte {offset}")


def _reason(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return "is compressed: unpack it, parts of it cannot be read by place"
    return f"is cut off or damaged: {error}"
