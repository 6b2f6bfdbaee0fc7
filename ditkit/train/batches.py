"""What a step sees, as a pure function of (seed, step): sample numbers, noise and times of the global batch, and this process's part.

So a resumed run, another split into micro-batches and another number of processes all see the same rows, and no two rows of a
step share their noise. Samples of several sizes come in groups; a batch is of one of them.
"""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
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

    Where the data set has ``groups``, each has a stream of its own: epoch after epoch without a gap, each in an order of its own. In an
    epoch every group gives the batches that its stream has filled, what is left over begins the next; which group is whose turn is drawn
    for (seed, epoch). So after E epochs a sample of a group of n was seen E times, or up to ceil(B / n) times less, and after B epochs
    exactly B times.

    Args:
        draws: shape of a sample -> random numbers for each sample, by name (``Objective.draws``).
        seed: of order and noise.
        batch_size: rows of the global batch; a multiple of ``world`` times ``parts``.
        parts: micro-batches of each process.
        purpose: keeps the numbers of training and validation apart.
    """

    def __init__(
        self,
        data: Dataset,
        draws: Callable[[tuple[int, ...]], Mapping[str, Draw]],
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
        self.data, self.draws, self.seed, self.batch_size, self.purpose = data, draws, seed, batch_size, purpose
        groups = getattr(data, "groups", None)
        self.groups: list[np.ndarray] = [np.arange(len(data))] if groups is None else groups
        share = batch_size // world
        self.rows = range(rank * share, (rank + 1) * share)

    def ids(self, step: int) -> np.ndarray:
        """Sample numbers of the global batch."""
        group, number = self.turn(step)
        numbers = self.groups[group]
        place = number * self.batch_size + np.arange(self.batch_size)
        epochs, within = place // len(numbers), place % len(numbers)
        order = [_order(self.seed, int(e), len(numbers), group)[within[epochs == e]] for e in np.unique(epochs)]
        found: np.ndarray = numbers[np.concatenate(order)]
        return found

    def turn(self, step: int) -> tuple[int, int]:
        """The group of a step, and the number of batches that it gave before."""
        sizes = [len(g) for g in self.groups]
        latest = (step + len(sizes) + 1) * self.batch_size // sum(sizes) + 2  # this epoch begins after the step
        epoch = bisect_right(range(latest), step, key=lambda e: sum(self._filled(e))) - 1
        before, after = self._filled(epoch), self._filled(epoch + 1)
        turns = _turns(self.seed, epoch, tuple(b - a for a, b in zip(before, after)))
        place = step - sum(before)
        group = int(turns[place])
        return group, before[group] + int((turns[:place] == group).sum())

    def _filled(self, epochs: int) -> list[int]:
        """Batches that each group's stream has filled after so many epochs."""
        return [epochs * len(g) // self.batch_size for g in self.groups]

    def __call__(self, step: int) -> Batch:
        ids = self.ids(step)[self.rows.start : self.rows.stop]
        augmented = getattr(self.data, "augmented", None)  # sets whose samples change from step to step
        data = augmented(ids, seed=self.seed, step=step) if augmented else self.data.batch(ids)
        return Batch(ids, {**data, **self.random(step, data["x"].shape[1:])})

    def random(self, step: int, shape: tuple[int, ...], rows: Iterable[int] | None = None) -> dict[str, Tensor]:
        """The random numbers of this process's rows, or of ``rows``, for samples of ``shape``."""
        rows = list(self.rows if rows is None else rows)
        drawn = self.draws(tuple(shape)).items()
        return {name: draw_rows(draw, self.seed, step, f"{self.purpose}.{name}", rows) for name, draw in drawn}

    def fixed(self, size: int) -> list[Batch]:
        """Samples 0 .. size - 1 of the data set, one batch for each group, with numbers that never change: for validation."""
        parts = [ids for ids in (group[group < size] for group in self.groups) if len(ids)]
        found = [(ids, self.data.batch(ids)) for ids in parts]
        return [Batch(ids, {**data, **self.random(0, data["x"].shape[1:], ids.tolist())}) for ids, data in found]


def draw_rows(draw: Draw, seed: int, step: int, purpose: str, rows: Iterable[int]) -> Tensor:
    """(number of rows, *shape): row r is a function of (seed, step, purpose, r) alone."""
    first = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=7).digest(), "little")  # so that seeds 0 and 1 share no row
    function = normal if draw.kind == "normal" else uniform
    return function([first + row for row in rows], step, purpose, draw.shape)


@lru_cache(maxsize=64)
def _order(seed: int, epoch: int, size: int, group: int = 0, purpose: int = 0x6F72646572) -> np.ndarray:
    """A permutation: the order of random keys, ties by number."""
    keys = np.random.Philox(counter=[0, 0, group, epoch], key=[seed, purpose]).random_raw(size)
    return np.argsort(keys, kind="stable")


@lru_cache(maxsize=4)
def _turns(seed: int, epoch: int, counts: tuple[int, ...]) -> np.ndarray:
    """The groups in the order of their turns, each as often as it gives a batch in this epoch."""
    return np.repeat(np.arange(len(counts)), counts)[_order(seed, epoch, sum(counts), purpose=0x7475726E73)]


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
