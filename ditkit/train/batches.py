"""What a step sees, as a pure function of (seed, step): sample numbers, noise and times of the global batch, and this process's part.

So a resumed run, another split into micro-batches and another number of processes all see the same rows, and no two rows of a
step share their noise.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ditkit.core.errors import DitkitError
from ditkit.data import Dataset
from ditkit.diffusion.noise import normal, uniform


@dataclass(frozen=True)
class Draw:
    """Random numbers that an objective needs for each sample: which kind, and their shape."""

    kind: Literal["normal", "uniform"]
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Rows of a step: their numbers in the data set, and the tensors (b, ...) by name."""

    ids: np.ndarray
    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, parts: int) -> list[Batch]:
        """Micro-batches of equal size."""
        size = len(self) // parts
        return [Batch(self.ids[i : i + size], {k: v[i : i + size] for k, v in self.tensors.items()}) for i in range(0, len(self), size)]

    def to(self, device: torch.device) -> Batch:
        """On ``device``; the copy to a GPU overlaps with what it is doing."""
        if device.type == "cpu":
            return self
        return Batch(self.ids, {k: v.pin_memory().to(device, non_blocking=True) for k, v in self.tensors.items()})


class Batches:
    """``batches(step)`` is the part of the global batch that process ``rank`` of ``world`` trains on.

    Args:
        draws: random numbers for each sample, by name (``Objective.draws``).
        seed: of order and noise.
        batch_size: rows of the global batch; a multiple of ``world`` times ``parts``.
        parts: micro-batches of each process.
        purpose: keeps the numbers of training and validation apart.
    """

    def __init__(
        self,
        data: Dataset,
        draws: Mapping[str, Draw],
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        purpose: str = "train",
    ) -> None:
        if batch_size % (world * parts):
            raise DitkitError(f"batch_size is {batch_size} for {world} processes x {parts} parts", allowed=f"multiples of {world * parts}")
        if not len(data):
            raise DitkitError(f"data set {data.name!r} is empty", hint="check its path")
        self.data, self.draws, self.seed, self.batch_size, self.purpose = data, dict(draws), seed, batch_size, purpose
        share = batch_size // world
        self.rows = range(rank * share, (rank + 1) * share)

    def ids(self, step: int) -> np.ndarray:
        """Sample numbers of the global batch: epochs follow one another without a gap, each in an order of its own."""
        place = step * self.batch_size + np.arange(self.batch_size)
        epochs, within = place // len(self.data), place % len(self.data)
        return np.concatenate([_order(self.seed, int(e), len(self.data))[within[epochs == e]] for e in np.unique(epochs)])

    def __call__(self, step: int) -> Batch:
        ids = self.ids(step)[self.rows.start : self.rows.stop]
        augmented = getattr(self.data, "augmented", None)  # sets whose samples change from step to step
        data = augmented(ids, seed=self.seed, step=step) if augmented else self.data.batch(ids)
        return Batch(ids, {**data, **self.random(step)})

    def random(self, step: int) -> dict[str, Tensor]:
        """The random numbers of this process's rows."""
        return {name: draw_rows(draw, self.seed, step, f"{self.purpose}.{name}", self.rows) for name, draw in self.draws.items()}

    def fixed(self, size: int) -> Batch:
        """Samples 0 .. size - 1 of the data set, with numbers that never change: for validation."""
        ids, rows = np.arange(size), range(size)
        drawn = {name: draw_rows(draw, self.seed, 0, f"{self.purpose}.{name}", rows) for name, draw in self.draws.items()}
        return Batch(ids, {**self.data.batch(ids), **drawn})


def draw_rows(draw: Draw, seed: int, step: int, purpose: str, rows: range) -> Tensor:
    """(len(rows), *shape): row r is a function of (seed, step, purpose, r) alone."""
    first = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=7).digest(), "little")  # so that seeds 0 and 1 share no row
    function = normal if draw.kind == "normal" else uniform
    return function([first + row for row in rows], step, purpose, draw.shape)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    """A permutation: the order of random keys, ties by number."""
    keys = np.random.Philox(counter=[0, 0, 0, epoch], key=[seed, 0x6F72646572]).random_raw(size)
    return np.argsort(keys, kind="stable")


class Prefetch:
    """Makes the batch of the next step in a thread while the current one is computed."""

    def __init__(self, batches: Batches, last: int) -> None:
        self.batches, self.last = batches, last
        self.waited = 0.0  # seconds, since it was last set to 0
        self._pool = ThreadPoolExecutor(1, "ditkit-data")
        self._next: tuple[int, Future[Batch]] | None = None

    def __call__(self, step: int) -> Batch:
        start = time.perf_counter()
        future = self._next[1] if self._next and self._next[0] == step else self._pool.submit(self.batches, step)
        batch = future.result()
        self.waited += time.perf_counter() - start
        self._next = (step + 1, self._pool.submit(self.batches, step + 1)) if step + 1 < self.last else None
        return batch

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
