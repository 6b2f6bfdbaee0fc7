"""Latents computed once: ``cache_latents(dataset, codec, folder)``, and ``LatentSet`` to train on them.

What is kept is the posterior, mean and std, so that every step still draws its own sample; where pictures are mirrored, both
latents are kept and the coin is tossed at every step. Shards are named by a hash of what they hold (files, transform, codec
weights, labels, captions): a run that is cut off goes on, a changed picture costs its own encoding alone, and latents of
another codec or transform are never mistaken for these.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ditkit.codecs.base import save_codec
from ditkit.core.config import read_data
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.core.files import TensorFile, remove_temporary, write_json, write_tensors

from .latent_set import CODEC, INDEX, MIRRORED, PLAIN, CacheReport, Index, LatentSet, MappedTensors, Shard, sha256_of
from .pictures import Pictures

if TYPE_CHECKING:
    from ditkit.codecs.base import Codec

    from . import Dataset

__all__ = ["INDEX", "CacheReport", "LatentSet", "cache_latents"]
log = logging.getLogger("ditkit.data")


def cache_latents(
    dataset: Dataset,
    codec: Codec,
    folder: str | Path,
    *,
    flip: bool | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    batch_size: int = 16,
    shard_bytes: int = 128_000_000,
    progress: bool = True,
) -> LatentSet:
    """Encode every sample of ``dataset``, or only those whose latents ``folder`` lacks, and return the data set of latents.

    Args:
        flip: keep the latents of the mirrored pictures too; default: as the data set's transform says.
        dtype: of the numbers on disk.
        batch_size: pictures encoded at once, on the device of the codec.
        shard_bytes: largest size of one file; one such shard is held in memory.

    Raises:
        DitkitError: the data set crops at random, which latents cannot follow; or a latent is not finite (the picture is named).
    """
    transform = getattr(dataset, "transform", None)
    if transform is not None and transform.crop == "random":
        raise DitkitError(
            "crop is 'random': cached latents would hold one crop for ever", allowed="crop='centre'", hint="or train on pictures"
        )
    flip = bool(transform and transform.flip) if flip is None else flip
    work = _Work(dataset, codec.eval(), Path(folder), flip, dtype, batch_size)
    with tqdm(total=len(dataset), desc="latents", delay=2, disable=not progress) as bar:
        work.run(shard_bytes, bar)
    found = LatentSet(folder)
    found.report = report = CacheReport(len(dataset), work.encoded, len(dataset) - work.encoded, len(found.index.shards))
    log.info("%d latents in %s: %d encoded, %d found", report.samples, folder, report.encoded, report.reused)
    return found


class _Work:
    """One call of ``cache_latents``."""

    def __init__(self, dataset: Dataset, codec: Codec, folder: Path, flip: bool, dtype: Any, batch_size: int) -> None:
        self.dataset, self.codec, self.folder, self.dtype, self.batch_size = dataset, codec, folder, dtype, batch_size
        self.names = (*PLAIN, *MIRRORED) if flip else PLAIN
        channels, height, width = dataset.shape
        self.picture_shape = (channels, height, width)
        self.shape = codec.latent_shape(self.picture_shape)
        self.shapes = {self.shape, *(shape for _, shape in self.parts(1 << 62))}
        self.framing = isinstance(dataset, Pictures)
        self.codec_hash = codec.content_hash()
        self.with_captions = bool(getattr(dataset, "has_captions", hasattr(dataset, "captions")))
        self.encoded = 0
        self._found: dict[str, tuple[Path, int]] | None = None

    def parts(self, shard_bytes: int) -> Iterator[tuple[np.ndarray, tuple[int, int, int]]]:
        """The samples of each shard, with the shape of their latents: one bucket after the other."""
        groups = getattr(self.dataset, "groups", None)
        for numbers in [np.arange(len(self.dataset))] if groups is None else groups:
            shape = self.shape
            if groups is not None:
                shape = self.codec.latent_shape(tuple(self.dataset.batch(numbers[:1])["x"].shape[1:]))
            row_bytes = len(self.names) * int(np.prod(shape)) * getattr(torch, self.dtype).itemsize
            rows = max(1, shard_bytes // row_bytes)
            yield from ((numbers[i : i + rows], shape) for i in range(0, len(numbers), rows))

    def run(self, shard_bytes: int, bar: tqdm[Any]) -> None:
        """Make the shards that are lacking, then the index, then remove what it does not list: some whole cache always stands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporary(self.folder)
        sums = _sums(self.folder)
        shards = []
        for ids, shape in self.parts(shard_bytes):
            name, is_new = self._shard(ids, shape, bar)
            known = None if is_new else sums.get(name)
            own = None if getattr(self.dataset, "groups", None) is None else shape
            shards.append(Shard(file=name, rows=len(ids), shape=own, sha256=known or sha256_of(self.folder / name)))
        if not self.codec.has_folder and self.codec.state_dict():
            save_codec(self.codec, self.folder / CODEC)
        write_json(self.folder / INDEX, self._index(shards).to_dict())
        kept = {s.file for s in shards}
        for path in self.folder.glob("latents-*.safetensors"):
            if path.name not in kept:
                path.unlink()

    def _index(self, shards: list[Shard]) -> Index:
        return Index(
            source=str(self.dataset.name),
            shape=self.shape,
            picture_shape=self.picture_shape,
            labels=tuple(self.dataset.labels),
            captions=self.with_captions,
            mirrored=self.names != PLAIN,
            framing=self.framing,
            dtype=self.dtype,
            codec=self.codec.name,
            codec_config=self.codec.config.to_dict(),
            codec_hash=self.codec_hash,
            shards=tuple(shards),
        )

    def _shard(self, ids: np.ndarray, shape: tuple[int, ...], bar: tqdm[Any]) -> tuple[str, bool]:
        """Name of the shard of these samples, and whether it was made now."""
        keys, y, captions = self._describe(ids)
        framing = self.dataset.framing(ids).tolist() if isinstance(self.dataset, Pictures) else None
        content = json.dumps([self.names, self.dtype, keys, None if y is None else y.tolist(), captions, *([framing] if framing else [])])
        name = f"latents-{hashlib.sha256(content.encode()).hexdigest()[:24]}.safetensors"
        if self._stands(self.folder / name):
            bar.update(len(ids))
            return name, False
        tensors = self._latents(ids, keys, shape, bar)
        if y is not None:
            tensors["y"] = y
        if framing is not None:
            tensors["framing"] = torch.tensor(framing)
        write_tensors(self.folder / name, tensors, {"keys": json.dumps(keys), "captions": json.dumps(captions)})
        return name, True

    def _describe(self, ids: np.ndarray) -> tuple[list[str], Tensor | None, list[str]]:
        """Content keys, labels and captions of samples."""
        data, keys, labels = self.dataset, [], []
        for part in self._parts(ids):
            if isinstance(data, Pictures):
                content, y = data.content_keys(part), data.labels_of(part)
            else:
                batch = data.batch(part)
                content, y = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in batch["x"]], batch.get("y")
            keys += [hashlib.sha256(f"{key} {self.codec_hash}".encode()).hexdigest()[:32] for key in content]
            labels.append(y)
        captions: list[str] = data.captions(ids) if self.with_captions else []  # type: ignore[attr-defined]
        has_labels = len(data.labels) > 0
        return keys, torch.cat([y for y in labels if y is not None]) if has_labels else None, captions

    def _latents(self, ids: np.ndarray, keys: list[str], shape: tuple[int, ...], bar: tqdm[Any]) -> dict[str, Tensor]:
        """Tensors of a shard: rows found in older shards are copied, the others encoded."""
        dtype = getattr(torch, self.dtype)
        out = {name: torch.empty(len(ids), *shape, dtype=dtype) for name in self.names}
        found = self._older()
        old = [row for row, key in enumerate(keys) if key in found]
        for path in {found[keys[row]][0] for row in old}:
            here = [row for row in old if found[keys[row]][0] == path]
            mapped = MappedTensors(path)
            for name in self.names:
                out[name][here] = mapped.rows(name, np.array([found[keys[row]][1] for row in here]))
        bar.update(len(old))
        new = np.array([row for row, key in enumerate(keys) if key not in found], np.int64)
        for rows in self._parts(new):
            for name, value in self._encode(ids[rows]).items():
                out[name][rows] = value
            self.encoded += len(rows)
            bar.update(len(rows))
        return out

    @torch.no_grad()
    def _encode(self, ids: np.ndarray) -> dict[str, Tensor]:
        data = self.dataset
        x = (data.pixels(ids) if isinstance(data, Pictures) else data.batch(ids)["x"]).to(self.codec.device)
        out: dict[str, Tensor] = {}
        for names, pictures in ((PLAIN, x), (MIRRORED, x.flip(-1))):
            if names[0] in self.names:
                posterior = self.codec.encode(pictures)
                out |= {name: u.to("cpu", getattr(torch, self.dtype)) for name, u in zip(names, (posterior.mean, posterior.std))}
        for name, value in out.items():
            finite = torch.isfinite(value).flatten(1).all(1)
            if not bool(finite.all()):
                which = int(ids[int((~finite).nonzero()[0])])
                called = data.pictures[which].sample.picture.name if isinstance(data, Pictures) else f"sample {which}"
                raise DitkitError(
                    f"the codec {self.codec.name!r} makes {name} of {called} not finite",
                    hint="run the codec, and keep its latents, in float32",
                )
        return out

    def _parts(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        return (ids[i : i + self.batch_size] for i in range(0, len(ids), self.batch_size))

    def _stands(self, path: Path) -> bool:
        """A shard is whole or absent, unless the disk lies: then it is made again."""
        if not path.is_file():
            return False
        try:
            with TensorFile(path):
                return True
        except WeightsError as error:
            log.warning("%s; it is made again", error)
            path.unlink()
            return False

    def _older(self) -> dict[str, tuple[Path, int]]:
        """Where the latents of a key stand in the shards that were there before, if they hold all that is wanted."""
        if self._found is None:
            self._found = {}
            for path in sorted(self.folder.glob("latents-*.safetensors")):
                if self._stands(path):
                    self._found |= self._keys_of(path)
        return self._found

    def _keys_of(self, path: Path) -> dict[str, tuple[Path, int]]:
        dtype = getattr(torch, self.dtype)
        with TensorFile(path) as file:
            if any(
                n not in file.entries or file.entries[n].dtype != dtype or file.entries[n].shape[1:] not in self.shapes for n in self.names
            ):
                return {}
            try:
                keys = json.loads(file.metadata["keys"])
            except (KeyError, ValueError):
                return {}
            return {key: (path, row) for row, key in enumerate(keys[: file.entries["mean"].shape[0]])}


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of the shards that the index of an earlier call lists."""
    if not (folder / INDEX).is_file():
        return {}
    try:
        index = Index.parse(read_data(folder / INDEX), str(folder / INDEX))
    except DitkitError as error:
        log.warning("%s; the index is made again", error)
        return {}
    return {shard.file: shard.sha256 for shard in index.shards}
