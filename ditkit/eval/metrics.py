"""Distances between two sets of features: Fréchet distance, kernel distance (KID), precision and recall.

All take features (N, d): one row a sample, in float64. Nothing here knows what the features are; ``features.py`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditkit.core.errors import DitkitError
from ditkit.core.lazy import require

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval: the spread of the estimate at this number of samples, about its value."""

    low: float
    high: float
    level: float
    num_resamples: int


@dataclass(frozen=True)
class Kid:
    """Squared maximum mean discrepancy, unbiased: the mean over subsets and its standard deviation between them."""

    value: float
    std: float
    subset_size: int
    num_subsets: int


@dataclass(frozen=True)
class PrecisionRecall:
    """Share of samples inside the manifold of the reference (precision), and of the reference inside that of the samples (recall)."""

    precision: float
    recall: float
    k: int


def as_features(x: ArrayLike, name: str = "features", least: int = 2) -> Array:
    """``x`` as (N, d) float64 with N >= ``least``, all finite. Raises DitkitError; nothing is flattened or transposed."""
    array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    if array.ndim != 2:
        raise DitkitError(f"{name} has shape {array.shape}", allowed="(N, d): one row a sample", hint="do not flatten or stack them")
    if array.shape[0] < least or array.shape[1] < 1:
        raise DitkitError(f"{name} has shape {array.shape}", allowed=f"N >= {least} samples of d >= 1 features")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        bad = int(np.argwhere(~np.isfinite(array).all(1))[0, 0])
        raise DitkitError(f"{name} is not finite in row {bad}", hint="look at that sample")
    return array


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    a, b = as_features(x, "the samples' features"), as_features(y, "the reference's features")
    if a.shape[1] != b.shape[1]:
        raise DitkitError(
            f"features of {a.shape[1]} and {b.shape[1]} numbers are compared",
            allowed="the same extractor for both",
            hint="is one transposed?",
        )
    return a, b


# ---- Fréchet distance -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Number, mean (d,) and scatter (d, d) = sum (x - mean)(x - mean)' of a set of features.

    Two are merged exactly up to rounding (Chan et al. 1979), so that it does not matter on how many processes a set lies.
    """

    num: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, x: ArrayLike) -> Moments:
        """The moments of features (N, d); N = 1 will do for a part of a set."""
        rows = as_features(x, least=1)
        mean = rows.mean(0)
        return cls(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        num, step = self.num + other.num, other.mean - self.mean
        mean = self.mean + step * (other.num / num)
        return Moments(num, mean, self.scatter + other.scatter + np.outer(step, step) * (self.num * other.num / num))

    @property
    def covariance(self) -> Array:
        """(d, d), unbiased."""
        if self.num < 2:
            raise DitkitError(f"the covariance of {self.num} sample", allowed="2 or more")
        return self.scatter / (self.num - 1)


def frechet_distance(x: ArrayLike | Moments, y: ArrayLike | Moments, *, allow_singular: bool = False) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the Gaussians fitted to two sets (Heusel et al. 2017, eq. 6).

    Args:
        x, y: features (N, d), or their moments.
        allow_singular: accept N <= d, where the covariance has no full rank and the value is badly biased.
    """
    if not (isinstance(x, Moments) or isinstance(y, Moments)):
        x, y = _pair(x, y)
    a, b = (m if isinstance(m, Moments) else Moments.of(m) for m in (x, y))
    if a.mean.shape != b.mean.shape:
        raise DitkitError(f"moments of {a.mean.size} and {b.mean.size} features are compared", allowed="the same extractor for both")
    few = min(a.num, b.num)
    if few <= a.mean.size and not allow_singular:
        raise DitkitError(
            f"{few} samples of {a.mean.size} features",
            allowed="more samples than features (N, d)",
            hint="are they transposed? Else use more samples, or allow_singular=True",
        )
    return _gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


def _gaussian_distance(m1: Array, s1: Array, m2: Array, s2: Array) -> float:
    """The root's trace is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric."""
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    distance = np.sum((m1 - m2) ** 2) + np.trace(s1) + np.trace(s2) - 2 * cross
    return max(float(distance), 0.0)


# ---- kernel distance --------------------------------------------------------------------------------------------------------


def kid(x: ArrayLike, y: ArrayLike, *, subset_size: int | None = None, num_subsets: int = 50, seed: int = 0) -> Kid:
    """Kernel distance with k(a, b) = (a . b / d + 1)^3, unbiased (Binkowski et al. 2018, section 3).

    Args:
        x, y: features (N, d).
        subset_size: rows drawn without replacement for each estimate; default: half of the smaller set, at most 1,000.
        num_subsets: estimates whose mean and standard deviation are returned.
        seed: of the draws.
    """
    a, b = _pair(x, y)
    few = min(len(a), len(b))
    size = max(2, min(1000, few // 2)) if subset_size is None else subset_size
    if not 2 <= size <= few:
        raise DitkitError(f"subset_size is {size}", allowed=f"2 to {few}, the size of the smaller set")
    if num_subsets < 1:
        raise DitkitError(f"num_subsets is {num_subsets}", allowed="1 or more")
    rng = np.random.default_rng(seed)
    estimates = [_mmd(*(rows[rng.choice(len(rows), size, replace=False)] for rows in (a, b))) for _ in range(num_subsets)]
    return Kid(float(np.mean(estimates)), float(np.std(estimates)), size, num_subsets)


def _mmd(a: Array, b: Array) -> float:
    """Unbiased squared MMD of two sets of n rows: the diagonals k(a, a) and k(b, b) are left out."""
    n, d = a.shape
    kaa, kbb, kab = ((u @ v.T / d + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
    same = (kaa.sum() - np.trace(kaa) + kbb.sum() - np.trace(kbb)) / (n * (n - 1))
    return float(same - 2 * kab.mean())


# ---- precision and recall ---------------------------------------------------------------------------------------------------


def precision_recall(x: ArrayLike, y: ArrayLike, *, k: int = 3) -> PrecisionRecall:
    """k-nearest-neighbour manifolds (Kynkäänniemi et al. 2019, section 3): a set's manifold is the union of balls around its
    points, each reaching to the k-th nearest other point.

    Args:
        x: features (N, d) of samples; y: of the reference.
        k: neighbours; the paper uses 3.
    """
    a, b = _pair(x, y)
    if not 1 <= k < min(len(a), len(b)):
        raise DitkitError(f"k is {k}", allowed=f"1 to {min(len(a), len(b)) - 1}, below the size of both sets")
    return PrecisionRecall(_share_inside(a, b, k), _share_inside(b, a, k), k)


def _share_inside(points: Array, centres: Array, k: int) -> float:
    """Share of ``points`` within some ball of ``centres``; in chunks, so that memory does not grow with both sets."""
    neighbors = require("sklearn.neighbors", "eval")
    distance = require("scipy.spatial.distance", "eval")
    radii = neighbors.NearestNeighbors(n_neighbors=k).fit(centres).kneighbors()[0][:, -1]
    chunks = np.array_split(points, max(1, len(points) // 1000))
    inside = [(distance.cdist(chunk, centres) <= radii).any(1) for chunk in chunks]
    return float(np.concatenate(inside).mean())


# ---- intervals and processes ------------------------------------------------------------------------------------------------


def bootstrap(
    statistic: Callable[[Array, Array], float], x: ArrayLike, y: ArrayLike, *, num: int = 200, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of ``statistic(x, y)`` by resampling the rows of both sets with replacement.

    Resampled sets hold duplicates, which biases distances upwards, by much at small N. So the quantiles are of the deviations
    from the resamples' own mean, laid about the estimate: its spread, without that bias. The estimate's own bias at N remains.
    """
    a, b = _pair(x, y)
    if num < 2 or not 0 < level < 1:
        raise DitkitError(f"num is {num} and level {level}", allowed="num >= 2, level between 0 and 1")
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(*(rows[rng.integers(len(rows), size=len(rows))] for rows in (a, b))) for _ in range(num)])
    low, high = np.quantile(draws - draws.mean(), [(1 - level) / 2, (1 + level) / 2]) + statistic(a, b)
    return Interval(float(low), float(high), level, num)


def gather_moments(moments: Moments, group: Any = None) -> Moments:
    """The moments of the whole set of which each process holds a part; one process alone gets its own back.

    Sums travel in float64 and are merged in the order of the ranks, so every process has the same result.
    """
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return moments
    flat = np.concatenate([[float(moments.num)], moments.mean, moments.scatter.ravel()])
    mine = torch.from_numpy(flat).to(_device_of(group))
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    d = moments.mean.size
    parts = [Moments(int(u[0]), u[1 : 1 + d], u[1 + d :].reshape(d, d)) for u in (t.cpu().numpy() for t in every)]
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def gather_features(x: ArrayLike, group: Any = None) -> Array:
    """The features (N, d) of all processes, rank after rank; processes may hold different numbers of rows."""
    import torch
    import torch.distributed as dist

    rows = as_features(x, least=1)
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    device, world = _device_of(group), dist.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=device), group=group)
    sizes = [int(c) for c in counts]
    padded = torch.zeros(max(sizes), rows.shape[1], dtype=torch.float64, device=device)
    padded[: len(rows)] = torch.from_numpy(rows).to(device)
    every = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(every, padded, group=group)
    return np.concatenate([t[:n].cpu().numpy() for t, n in zip(every, sizes)])


def _device_of(group: Any) -> str:
    import torch.distributed as dist

    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"
