"""Random numbers that depend on nothing but their key: numpy's counter-based Philox, read raw.

NumPy promises that the raw stream of a bit generator never changes, which it does not promise of ``Generator``'s methods; so the same
seed gives the same scenes under every NumPy, in any order of access.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Draws:
    """The stream of one key.

    Args:
        seed: 0 <= seed < 2**64.
        stream: which of the independent streams of that seed (a split, a purpose), 0 <= stream < 2**64.
        index: which item of that stream, 0 <= index < 2**64.
    """

    def __init__(self, seed: int, stream: int = 0, index: int = 0) -> None:
        key, counter = np.array([seed, stream], dtype=np.uint64), np.array([0, 0, index, 0], dtype=np.uint64)
        self._bits = np.random.Philox(key=key, counter=counter)
        self._ready: list[float] = []

    def uniforms(self, n: int) -> np.ndarray:
        """float64 (n,) in [0, 1): the upper 53 bits of each raw number."""
        return (self._bits.random_raw(n) >> np.uint64(11)) * 2.0**-53

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number in [low, high)."""
        if not self._ready:
            self._ready = self.uniforms(32).tolist()
        return low + (high - low) * self._ready.pop()

    def below(self, n: int) -> int:
        """One whole number of 0 .. n - 1."""
        return int(self.uniform() * n)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order (Fisher-Yates)."""
        result = list(items)
        for i in range(len(result) - 1, 0, -1):
            j = self.below(i + 1)
            result[i], result[j] = result[j], result[i]
        return result
