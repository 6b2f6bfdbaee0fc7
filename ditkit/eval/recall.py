"""Caption recall: is the real picture of a caption among those that a sample made for it is nearest to?

For pictures with names (``emoji``) there is nothing to read off a picture as there is in ``scenes``; but there are all the other pictures.
A sample counts at k where fewer than k other real pictures are as near to it as the one that bears its caption, by the cosine
of features. Of captions that were trained on this is recall, and is called so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ditkit.core.errors import DitkitError

from .metrics import Array, as_features


@dataclass(frozen=True)
class Recall:
    """Shares in [0, 1], by k.

    Attributes:
        top: of samples whose own caption's picture is among the k nearest.
        chance: the same for a randomly chosen other caption of those asked: the mean over all of them, so without noise.
        num_samples, num_real: samples, and real pictures among which they are looked for.
    """

    top: dict[int, float]
    chance: dict[int, float]
    num_samples: int
    num_real: int


def caption_recall(samples: ArrayLike, real: ArrayLike, true: Sequence[int] | np.ndarray, k: Sequence[int] = (1, 5)) -> Recall:
    """Recall of captions.

    Args:
        samples: features (N, d).
        real: features (M, d) of all real pictures.
        true: (N,) for each sample the row of ``real`` that bears its caption; two or more different ones.
        k: how many nearest pictures are looked at.

    Raises:
        DitkitError: shapes that do not fit, a row or k out of range, or a single caption, which has no other to compare with.
    """
    a, b = as_features(samples, "the samples' features"), as_features(real, "the real pictures' features")
    rows = np.asarray(true)
    _check(a, b, rows, k)
    ranks = _ranks(a, b)[:, rows]  # (N, N): of the picture of each sample's caption, as seen from each sample
    other = rows[:, None] != rows[None, :]
    top = {n: float((ranks.diagonal() < n).mean()) for n in k}
    chance = {n: float((ranks[other] < n).mean()) for n in k}
    return Recall(top, chance, len(a), len(b))


def _ranks(a: Array, b: Array) -> np.ndarray:
    """(N, M): how many other rows of ``b`` are as near to a row of ``a`` or nearer; equally near ones count against each other."""
    similar = _unit(a) @ _unit(b).T
    ordered = np.sort(similar, axis=1)
    nearer = [len(b) - np.searchsorted(line, values) for line, values in zip(ordered, similar)]
    return np.stack(nearer) - 1


def _unit(x: Array) -> Array:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _check(a: Array, b: Array, rows: np.ndarray, k: Sequence[int]) -> None:
    if a.shape[1] != b.shape[1]:
        raise DitkitError(f"features of {a.shape[1]} and {b.shape[1]} numbers", allowed="the same extractor for both")
    if rows.shape != (len(a),) or not np.issubdtype(rows.dtype, np.integer):
        raise DitkitError(f"true is {rows.dtype} of shape {rows.shape}", allowed=f"({len(a)},) integers, one a sample")
    if rows.min() < 0 or rows.max() >= len(b):
        raise DitkitError(f"true is {rows.min()} to {rows.max()}", allowed=f"0 to {len(b) - 1}, the rows of the real pictures")
    if len(np.unique(rows)) < 2:
        raise DitkitError("all samples have the same caption", allowed="two or more different ones")
    if not k or min(k) < 1 or max(k) > len(b):
        raise DitkitError(f"k is {tuple(k)}", allowed=f"1 to {len(b)}, the number of real pictures")
