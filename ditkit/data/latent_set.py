"""The data set of cached latents: posteriors on disk, a new sample of each at every step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ditkit.core.config import Config, read_data
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.core.files import TensorFile
from ditkit.diffusion.noise import normal

from . import NoSplit
from .buckets import grouped
from .splits import split_folder
from .transforms import check_indices, mirrored, sample_seeds

if TYPE_CHECKING:
    from ditkit.codecs.base import Codec

INDEX = "latents.json"
CODEC = "codec"  # folder with the weights of a codec that was trained here; a VAE stays where it is
PLAIN, MIRRORED = ("mean", "std"), ("mean_mirrored", "std_mirrored")


@dataclass(frozen=True)
class CacheReport:
    """What ``cache_latents`` did: samples in all, of which encoded now, and of which found in the folder."""

    samples: int
    encoded: int
    reused: int
    shards: int


class Shard(Config):
    """One file of latents."""

    file: str = Field(pattern=r"^latents-[0-9a-f]{24}\.safetensors$", description="its name, a hash of its content")
    rows: int = Field(ge=1, description="samples")
    shape: tuple[int, int, int] | None = Field(None, description="(c, h, w) of its latents, where pictures are in buckets")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the file")


class Index(Config):
    """Content of ``latents.json``."""

    format: Literal[1] = 1
    source: str = Field(description="data set that was encoded")
    shape: tuple[int, int, int] = Field(description="(c, h, w) of a latent; in buckets of the largest square")
    picture_shape: tuple[int, int, int] = Field(description="(C, H, W) of a picture; likewise")
    labels: tuple[str, ...] = Field((), description="class names; empty: no labels")
    captions: bool = Field(False, description="captions are kept")
    mirrored: bool = Field(description="latents of the mirrored pictures are kept")
    framing: bool = Field(False, description="sizes of the originals, and what is shown of them, are kept")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(description="of the latents")
    codec: str = Field(description="name of the codec")
    codec_config: dict[str, Any] = Field(description="its configuration")
    codec_hash: str = Field(description="its content hash")
    shards: tuple[Shard, ...] = Field(min_length=1, description="files in the order of the samples")

    @model_validator(mode="after")
    def _positive(self) -> Index:
        if min(*self.shape, *self.picture_shape, *(side for s in self.shards for side in s.shape or ())) < 1:
            raise ValueError(f"shape {self.shape}, picture_shape {self.picture_shape} or a shard's has an empty side")
        if any(s.shape is not None and s.shape[0] != self.shape[0] for s in self.shards):
            raise ValueError(f"shards differ in channels from shape {self.shape}")
        return self


class LatentConfig(Config):
    """Options of ``data.load`` for cached latents."""

    flip: bool | None = Field(None, description="mirror half of the samples at every step; absent: if the mirrored latents are there")
    vae: str | None = Field(None, description="where the VAE is now, if it is not where it was when the latents were made")


class MappedTensors:
    """A tensor file of which rows are read by their number, without reading the rest."""

    def __init__(self, path: Path) -> None:
        with TensorFile(path) as file:
            self.metadata, self.entries = file.metadata, file.entries
        with path.open("rb") as raw:
            self._data = 8 + int.from_bytes(raw.read(8), "little")
        self._bytes = np.memmap(path, np.uint8, "r")

    def rows(self, name: str, indices: np.ndarray) -> Tensor:
        """Rows of the tensor ``name``, copied."""
        entry = self.entries[name]
        start, end = self._data + entry.start, self._data + entry.end
        picked = self._bytes[start:end].reshape(entry.shape[0], -1)[indices]
        return torch.from_numpy(np.asarray(picked)).view(entry.dtype).reshape(len(indices), *entry.shape[1:])


class LatentSet:
    """Cached latents as a data set: ``shape`` is (c, h, w), labels and captions are those of the source, and so are ``groups`` (buckets).

    Args:
        root: a folder made by ``cache_latents``, or one with such folders named train and test.
        options: see ``LatentConfig``.

    Raises:
        DitkitError: ``flip`` without the mirrored latents. WeightsError: a shard is missing, cut off or of another shape.
    """

    report: CacheReport | None = None  # what was done, where ``cache_latents`` returned this

    def __init__(self, root: str | Path, split: str = "train", **options: Any) -> None:
        self.config = LatentConfig.parse(options, f"options of {root}")
        self.name, self.folder = str(root), _find(Path(root), split)
        self.index = index = Index.parse(read_data(self.folder / INDEX), str(self.folder / INDEX))
        self.flip = index.mirrored if self.config.flip is None else self.config.flip
        if self.flip and not index.mirrored:
            raise DitkitError(f"{self.folder} lacks the latents of the mirrored pictures", hint="cache_latents(..., flip=True) adds them")
        self.shape, self.picture_shape = index.shape, index.picture_shape
        self.labels, self.num_classes = list(index.labels), len(index.labels)
        self._starts = np.cumsum([0, *(s.rows for s in index.shards)])
        labels = [self._check(s) for s in index.shards]
        self._y = torch.cat([y for y in labels if y is not None]) if index.labels else None
        self.groups = None
        if any(s.shape is not None for s in index.shards):
            self.groups = grouped([self._shape(i) for i, s in enumerate(index.shards) for _ in range(s.rows)])
        self._file = lru_cache(maxsize=64)(self._open)
        self._texts = lru_cache(maxsize=8)(self._captions_of)

    @property
    def has_captions(self) -> bool:
        """Whether ``captions`` has any to give."""
        return self.index.captions

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """``x`` (B, c, h, w) float32, the means of the posteriors, not mirrored; and ``y`` (B,) int64 where there are labels."""
        indices = check_indices(indices, len(self))
        x = self._rows("mean", indices)
        return {"x": x} if self._y is None else {"x": x, "y": self._y[indices]}

    def augmented(self, indices: np.ndarray, *, seed: int, step: int) -> dict[str, Tensor]:
        """As ``batch``, but samples of the posteriors, half of them mirrored if ``flip``: functions of (seed, step, index)."""
        indices = check_indices(indices, len(self))
        flips = mirrored(indices, seed, step) if self.flip else torch.zeros(len(indices), dtype=torch.bool)
        shape = self._shape_of(indices)
        x = torch.empty(len(indices), *shape)
        eps = normal(sample_seeds(indices, seed), step, "posterior", shape)
        for chosen, (mean, std) in ((~flips, PLAIN), (flips, MIRRORED)):
            if chosen.any():
                rows = indices[chosen.numpy()]
                x[chosen] = self._rows(mean, rows) + self._rows(std, rows) * eps[chosen]
        return {"x": x} if self._y is None else {"x": x, "y": self._y[indices]}

    def captions(self, indices: np.ndarray) -> list[str]:
        """The caption of each sample; raises DitkitError where none were cached."""
        if not self.index.captions:
            raise DitkitError(f"{self.folder} holds no captions", hint="cache a data set that has them")
        indices = check_indices(indices, len(self))
        shards = self._shards_of(indices)
        return [self._texts(int(s))[int(i - self._starts[s])] for s, i in zip(shards, indices)]

    def codec(self) -> Codec:
        """The codec that decodes these latents: the one kept in the cache, or a VAE where it lies.

        Raises:
            DitkitError: its weights are not those that made the latents.
        """
        from ditkit.codecs import codec_from, load_codec

        if (self.folder / CODEC).is_dir():
            codec = load_codec(self.folder / CODEC)
        else:
            moved = {} if self.config.vae is None else {"path": self.config.vae}
            codec = codec_from(self.index.codec, {**self.index.codec_config, **moved})
        if codec.content_hash() != self.index.codec_hash:
            raise DitkitError(f"this codec is not the one that made the latents of {self.folder}", hint="load its weights, or cache again")
        return codec

    def verify(self) -> None:
        """Read all of every shard; raises WeightsError naming one whose bytes were altered."""
        for shard in self.index.shards:
            if sha256_of(self.folder / shard.file) != shard.sha256:
                raise WeightsError(f"{self.folder / shard.file} was altered", hint="delete it and run cache_latents again")

    @property
    def framing(self) -> Callable[..., np.ndarray] | None:
        """As ``Pictures.framing``, where it was kept; latents are cut in the centre at every step."""
        return (lambda indices, **_: self._framing(check_indices(indices, len(self)))) if self.index.framing else None

    def _framing(self, indices: np.ndarray) -> np.ndarray:
        found = np.empty((len(indices), 4), np.int64)
        shards = self._shards_of(indices)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self._file(int(shard)).rows("framing", indices[here] - self._starts[shard]).numpy()
        return found

    def _shards_of(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, indices, side="right") - 1

    def _shape(self, shard: int) -> tuple[int, int, int]:
        return self.index.shards[shard].shape or self.index.shape

    def _shape_of(self, indices: np.ndarray) -> tuple[int, int, int]:
        """The one shape of these samples."""
        found = sorted({self._shape(int(s)) for s in np.unique(self._shards_of(indices))} or {self.shape})
        if len(found) > 1:
            raise DitkitError(f"latents of shapes {found[0]} and {found[1]} are asked for together", allowed="samples of one of groups")
        return found[0]

    def _rows(self, name: str, indices: np.ndarray) -> Tensor:
        x = torch.empty(len(indices), *self._shape_of(indices))
        shards = self._shards_of(indices)
        for shard in np.unique(shards):
            here = shards == shard
            x[torch.from_numpy(here)] = self._file(int(shard)).rows(name, indices[here] - self._starts[shard]).float()
        if not bool(torch.isfinite(x).all()):
            raise WeightsError(f"{self.folder}: {name!r} is not finite in samples {indices.tolist()}", hint="verify() names the file")
        return x

    def _open(self, shard: int) -> MappedTensors:
        return MappedTensors(self.folder / self.index.shards[shard].file)

    def _captions_of(self, shard: int) -> list[str]:
        texts: list[str] = json.loads(self._file(shard).metadata["captions"])
        return texts

    def _check(self, shard: Shard) -> Tensor | None:
        """Header of a shard against the index; its labels."""
        names = (*PLAIN, *MIRRORED) if self.index.mirrored else PLAIN
        expect: dict[str, tuple[int, ...]] = {name: (shard.rows, *(shard.shape or self.index.shape)) for name in names}
        if self.index.framing:
            expect["framing"] = (shard.rows, 4)
        if self.index.labels:
            expect["y"] = (shard.rows,)
        with TensorFile(self.folder / shard.file) as file:
            file.check(expect)
            if not self.index.labels:
                return None
            y = file.read("y")
        if y.dtype != torch.int64 or not bool(((y >= 0) & (y < self.num_classes)).all()):
            raise WeightsError(f"{file.path}: 'y' is out of range", allowed=f"0 to {self.num_classes - 1}", hint="cache again")
        return y


def _find(root: Path, split: str) -> Path:
    folder = root if (root / INDEX).is_file() else split_folder(root, split)
    if not (folder / INDEX).is_file():
        raise DitkitError(f"{folder} holds no cached latents", hint="make them with cache_latents")
    if folder == root and split != "train":
        raise NoSplit(f"{root} holds one set of latents, for split 'train'", hint=f"cache split {split!r} in a folder {split}/")
    return folder


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
