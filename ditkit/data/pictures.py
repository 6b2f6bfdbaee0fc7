"""A data set of scanned pictures, wherever they are kept: the common part of image folders and shards."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from ditkit.core.cache import cache_dir
from ditkit.core.errors import DitkitError

from . import NoSplit
from .buckets import Buckets, Size, grouped
from .captions import decode_caption
from .scan import Fault, Limits, Picture, Sample, Scan, read_member, scan
from .transforms import Transform, apply, check_indices, corner, crop_places, mirrored, quiet, scalings

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("ditkit.data")
Kind = Literal["classes", "captions", "unlabelled"]
_THREADS = min(8, os.cpu_count() or 1)


class ImageConfig(Transform):
    """Options of ``data.load`` for image folders and shards."""

    kind: Literal["auto", "classes", "captions", "unlabelled"] = Field("auto", description="what belongs to a picture; auto: as found")
    caption_encoding: str = Field("utf-8", description="encoding of the captions, such as cp1252")
    allow_missing_captions: bool = Field(False, description="a picture without a caption gets an empty one")
    strict_data: bool = Field(False, description="stop at the end of the scan if any file cannot be used")
    test_fraction: float = Field(0.0, ge=0, lt=1, description="share held out as split test, by content; where there is no folder test")
    cache: str = Field("auto", description="folder for what scans find. auto: .ditkit beside the data, off: keep nothing")
    limits: Limits = Limits()

    @property
    def transform(self) -> Transform:
        """Only what is done to the pictures."""
        return Transform(**{name: getattr(self, name) for name in Transform.model_fields})


class Pictures:
    """Scanned pictures with their labels or captions.

    Attributes:
        name: the path it was loaded from.
        kind: "classes", "captions" or "unlabelled".
        labels: class names in the order of their numbers; empty unless kind is "classes".
        scan: what the scan found, its faults included.
        pictures: of every sample of this split; with ``buckets.sizes`` "all" a picture is a sample at each of its sizes.
        shape: (C, H, W) of every sample; with buckets that of the largest square.
        sizes: (H, W) of every sample, where there are buckets.
        groups: where there are buckets, the numbers of the samples of each size; one batch holds samples of one group.
    """

    sizes: list[Size] | None = None
    groups: list[np.ndarray] | None = None

    def __init__(self, name: str, kind: Kind, labels: Sequence[str], found: Scan, pictures: list[Picture], config: ImageConfig) -> None:
        self.name, self.kind, self.config, self.scan, self.labels = name, kind, config, found, list(labels)
        if config.buckets is not None:
            pictures, self.sizes = at_sizes(pictures, config.buckets)
            self.groups = grouped(self.sizes)
            log.info("buckets of %s: %s", name, ", ".join(f"{len(g)} of {'x'.join(map(str, self.sizes[g[0]]))}" for g in self.groups))
        self.pictures = pictures
        self.shape = _shape(pictures, config)
        self._numbers = {label: i for i, label in enumerate(self.labels)}

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 where there are none."""
        return len(self.labels)

    @property
    def transform(self) -> Transform:
        """What is done to every picture."""
        return self.config.transform

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def has_captions(self) -> bool:
        """Whether ``captions`` has any to give."""
        return self.kind == "captions"

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """``x`` (B, C, H, W) float32 in [-1, 1], cropped in the centre and not mirrored; ``y`` (B,) int64 where there are classes."""
        indices = check_indices(indices, len(self))
        return self._with_labels(indices, self.pixels(indices))

    def augmented(self, indices: np.ndarray, *, seed: int, step: int) -> dict[str, Tensor]:
        """As ``batch``, mirrored and cropped as the configuration says: functions of (seed, step, index)."""
        indices = check_indices(indices, len(self))
        where = crop_places(indices, seed, step).tolist() if self.config.crop == "random" else None
        x = self.pixels(indices, where)
        if self.config.flip:
            flips = mirrored(indices, seed, step)
            x[flips] = x[flips].flip(-1)
        return self._with_labels(indices, x)

    def framing(self, indices: np.ndarray, *, seed: int = 0, step: int | None = None) -> np.ndarray:
        """What a network with micro-conditions is told: (B, 4), height and width of the upright picture in its file, top and left of
        the part that is shown, in pixels of the scaled picture before it is mirrored. With a step as in ``augmented``, else ``batch``.
        """
        indices = check_indices(indices, len(self))
        random = step is not None and self.config.crop == "random"
        where = crop_places(indices, seed, step or 0).tolist() if random else [None] * len(indices)
        return np.array([self._framing(i, at) for i, at in zip(indices, where)], np.int64).reshape(-1, 4)

    def captions(self, indices: np.ndarray) -> list[str]:
        """The caption of each sample, read from its file; raises DitkitError where the set has none."""
        if not self.has_captions:
            raise DitkitError(f"{self.name} has no captions (kind is {self.kind!r})", hint="put name.txt beside name.png")
        return [self._caption(self.pictures[i].sample) for i in check_indices(indices, len(self))]

    def pixels(self, indices: np.ndarray, where: Sequence[tuple[float, float]] | None = None) -> Tensor:
        """Pictures (B, C, H, W) that are not mirrored, cropped in the centre or at ``where``."""
        import torch

        places = [None] * len(indices) if where is None else where
        sizes = [self._size(i) for i in indices]
        if len(distinct := sorted({size for size in sizes if size is not None})) > 1:
            raise DitkitError(
                f"samples of sizes {distinct[0]} and {distinct[1]} are asked for together", allowed="samples of one of groups"
            )
        with quiet, ThreadPoolExecutor(_THREADS) as pool:
            rows = list(pool.map(self._load, (self.pictures[i] for i in indices), places, sizes))
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *self.shape)

    def labels_of(self, indices: np.ndarray) -> Tensor | None:
        """Class numbers (B,) int64; None where there are no classes."""
        import torch

        if self.kind != "classes":
            return None
        return torch.tensor([self._numbers[self.pictures[i].sample.label or ""] for i in indices], dtype=torch.int64)

    def file_of(self, index: int) -> tuple[str, bytes]:
        """Suffix and bytes of the file of a sample, as it is."""
        member = self.pictures[index].sample.picture
        return os.path.splitext(member.name)[1].lower(), read_member(self.scan.root, member)

    def _with_labels(self, indices: np.ndarray, x: Tensor) -> dict[str, Tensor]:
        y = self.labels_of(indices)
        return {"x": x} if y is None else {"x": x, "y": y}

    def content_keys(self, indices: np.ndarray) -> list[str]:
        """For each sample a SHA-256 of its file and of the transform, but for mirroring; of buckets its own size counts."""
        rule = json.dumps(self.transform.model_copy(update={"flip": False, "buckets": None}).to_dict(), sort_keys=True)
        sizes = ("" if self.sizes is None else f" {self.sizes[i]}" for i in indices)
        return [hashlib.sha256(f"{self.pictures[i].sha256} {rule}{size}".encode()).hexdigest() for i, size in zip(indices, sizes)]

    def _size(self, index: int) -> Size | None:
        """Height and width of a sample; None: as the picture is."""
        side = self.config.resolution
        return self.sizes[index] if self.sizes is not None else None if side is None else (side, side)

    def _framing(self, index: int, where: tuple[float, float] | None) -> tuple[int, int, int, int]:
        picture, size = self.pictures[index], self._size(index)
        left, top = (0, 0) if size is None else corner(scalings((picture.width, picture.height), size)[-1], size, where)
        return picture.height, picture.width, top, left

    def _load(self, picture: Picture, where: tuple[float, float] | None, size: Size | None) -> np.ndarray:
        member = picture.sample.picture
        try:
            return apply(self.config, read_member(self.scan.root, member), where, size)
        except MemoryError:
            raise
        except Exception as error:  # as in the scan: a damaged file makes Pillow raise almost anything
            raise _changed(member.name, error) from error

    def _caption(self, sample: Sample) -> str:
        if sample.caption is None:
            return ""
        try:
            return decode_caption(read_member(self.scan.root, sample.caption), self.config.caption_encoding)
        except (OSError, ValueError) as error:
            raise _changed(sample.caption.name, error) from error


def scanned(root: Path, samples: Sequence[Sample], faults: Sequence[Fault], config: ImageConfig, progress: bool) -> Scan:
    """The scan that ``config`` asks for. ``root`` is a folder."""
    return scan(
        root,
        samples,
        cache=cache_folder(root, config.cache),
        faults=faults,
        limits=config.limits,
        caption_encoding=config.caption_encoding,
        strict=config.strict_data,
        refuse=None if config.buckets is None else config.buckets.fault,
        progress=progress,
    )


def at_sizes(pictures: Sequence[Picture], buckets: Buckets) -> tuple[list[Picture], list[Size]]:
    """Pictures that passed the scan, each as often as it has sizes, and these sizes."""
    found = [(p, size) for p in pictures for size in buckets.of(p.height, p.width)]
    return [p for p, _ in found], [size for _, size in found]


def cache_folder(root: Path, choice: str) -> Path | None:
    """Where scans of ``root`` are kept: ``.ditkit`` in it, or the user's cache folder where ``root`` cannot be written."""
    if choice != "auto":
        return None if choice == "off" else Path(choice)
    if os.access(root, os.W_OK):
        return root / ".ditkit"
    return cache_dir("data") / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]


def refuse_missing(samples: Sequence[Sample], config: ImageConfig) -> None:
    """Raise DitkitError naming the pictures without a caption, unless they are allowed."""
    missing = [s.picture.name for s in samples if s.caption is None]
    if missing and not config.allow_missing_captions:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise DitkitError(
            f"{len(missing)} pictures have no caption: {', '.join(missing[:10])}{more}",
            allowed="a file of the same name ending in .txt, which may be empty",
            hint="write them, or allow_missing_captions=True; or kind='classes' if the folders are classes",
        )


def held_out(pictures: list[Picture], test_fraction: float, split: str) -> list[Picture]:
    """The pictures of a split. Chosen by content: copies of a picture never stand in both, and new ones move none."""
    part = [p for p in pictures if (int(p.sha256[:13], 16) / 16**13 < test_fraction) == (split == "test")]
    if not part:
        raise NoSplit(
            f"split {split!r} is empty",
            allowed=f"folders train and test, or a larger test_fraction (it is {test_fraction})",
            hint="make one of them",
        )
    return part


def _shape(pictures: list[Picture], config: ImageConfig) -> tuple[int, int, int]:
    if config.buckets is not None:
        return config.channels, config.buckets.resolutions[-1], config.buckets.resolutions[-1]
    if config.resolution is not None:
        return config.channels, config.resolution, config.resolution
    first = pictures[0]
    for p in pictures:
        if (p.width, p.height) != (first.width, first.height):
            a, b = (f"{q.sample.picture.name} is {q.width}x{q.height}" for q in (first, p))
            raise DitkitError(f"pictures differ in size: {a}, {b}", hint="give resolution, all become squares of that side; or buckets")
    return config.channels, first.height, first.width


def _changed(name: str, error: Exception) -> DitkitError:
    return DitkitError(f"{name} passed the scan and cannot be read now: {error}", hint="start again: the scan will list it")
