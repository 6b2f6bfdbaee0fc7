"""digits: 1,797 real handwritten digits of 8 x 8 pixels, shipped with scikit-learn (UCI, Alpaydin and Kaynak 1998).

Values 0..16 are scaled to [-1, 1]. The split is fixed: a permutation of the whole set, whose last 360 samples are the test
split (20 %).
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditkit.core.lazy import require

TEST_SAMPLES = 360


class Digits:
    """One split of the set. x (B, 1, 8, 8) in [-1, 1], y (B,) the digit."""

    name = "digits"
    shape = (1, 8, 8)
    num_classes = 10
    labels = [str(digit) for digit in range(10)]

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self._x, self._y = x, y

    def __len__(self) -> int:
        return len(self._x)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Samples by their number in the split."""
        return {"x": torch.from_numpy(self._x[indices]), "y": torch.from_numpy(self._y[indices])}


def load(split: str = "train") -> Digits:
    """``split`` is "train" (1,437 samples) or "test" (360)."""
    x, y = _everything()
    rows = slice(None, -TEST_SAMPLES) if split == "train" else slice(-TEST_SAMPLES, None)
    return Digits(x[rows], y[rows])


@lru_cache(maxsize=1)
def _everything() -> tuple[np.ndarray, np.ndarray]:
    table = _table()
    order = np.random.RandomState(0).permutation(len(table))  # the stream of RandomState is frozen by numpy's policy
    x = (table[order, :-1].astype(np.float32) / 8 - 1).reshape(-1, 1, 8, 8)
    return x, table[order, -1].astype(np.int64)


def _table() -> np.ndarray:
    """(1797, 65): 64 pixels and the digit. The file is read where scikit-learn keeps it: importing the library takes seconds."""
    if (spec := importlib.util.find_spec("sklearn")) is not None:
        for place in spec.submodule_search_locations or ():
            if (path := Path(place) / "datasets" / "data" / "digits.csv.gz").is_file():
                return np.loadtxt(path, delimiter=",", dtype=np.uint8)
    bunch = require("sklearn.datasets", "train").load_digits()
    return np.column_stack([bunch.data, bunch.target]).astype(np.uint8)
