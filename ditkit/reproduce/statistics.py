"""The statistics of an experiment: paired bootstrap, bounds from a few seeds, Spearman's rho, the smallest effect that can be seen.

Bounds are one-sided at 95 % each, because hypotheses have a direction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditkit.core.errors import DitkitError
from ditkit.core.lazy import require

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
CONFIDENCE, POWER = 0.95, 0.80


@dataclass(frozen=True)
class Bound:
    """Lower and upper bound, each one-sided at 95 %."""

    low: float
    high: float

    def widest(self, other: Bound) -> Bound:
        """The lower of both lower bounds and the higher of both higher ones."""
        return Bound(min(self.low, other.low), max(self.high, other.high))


def seed_bound(effects: Sequence[float]) -> Bound:
    """Bound of the mean effect over training seeds, by Student's t: mean -+ t(0.95, S - 1) s / sqrt(S)."""
    values = np.asarray(effects, dtype=np.float64)
    if len(values) < 2:
        raise DitkitError(f"{len(values)} seed", allowed="2 or more: one says nothing of the spread between seeds")
    t = float(require("scipy.stats", "eval").t.ppf(CONFIDENCE, len(values) - 1))
    half = t * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Bound(float(values.mean()) - half, float(values.mean()) + half)


def resampled(seeds: int, size: int, *, shared: bool, num: int = 400, seed: int = 0) -> list[Rows]:
    """``num`` draws of rows (seeds, size), with replacement: which samples count, for each seed; equal arguments give equal draws,
    so that every arm sees the same ones.

    Args:
        shared: samples are the same for all seeds (held-out data), so they are drawn together.
    """
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(size, size=(1 if shared else seeds, size)) for _ in range(num))
    return [np.broadcast_to(rows, (seeds, size)) for rows in drawn]


def bootstrap_bound(estimate: float, draws: Sequence[float] | Array) -> Bound:
    """Quantiles of the draws' deviations from their own mean, laid about the estimate: duplicates bias distances upwards."""
    values = np.asarray(draws, dtype=np.float64)
    low, high = np.quantile(values - values.mean(), [1 - CONFIDENCE, CONFIDENCE]) + estimate
    return Bound(float(low), float(high))


def detectable(between_seeds: float, within_seed: float, seeds: int) -> float:
    """Smallest effect that a one-sided t test over the seeds' effects finds with 80 % power.

    delta sqrt((b^2 + w^2) / S), where a noncentral t of S - 1 degrees and noncentrality delta exceeds t(0.95, S - 1) in 80 %.
    """
    stats, optimize = require("scipy.stats", "eval"), require("scipy.optimize", "eval")
    critical = stats.t.ppf(CONFIDENCE, seeds - 1)
    delta = optimize.brentq(lambda d: stats.nct.sf(critical, seeds - 1, d) - POWER, 0.1, 50.0)
    return float(delta) * math.sqrt((between_seeds**2 + within_seed**2) / seeds)


def ranks(values: Sequence[float]) -> Array:
    """1 .. n, equal values share the mean of their ranks."""
    x = np.asarray(values, dtype=np.float64)
    below, equal = (x[None] < x[:, None]).sum(1), (x[None] == x[:, None]).sum(1)
    return below + (equal + 1) / 2


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho: the correlation of the ranks. Raises DitkitError where one side is constant."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    if scale == 0:
        raise DitkitError("rho of a constant", allowed="values that differ")
    return float(a @ b) / scale


def spearman_p(x: Sequence[float], y: Sequence[float]) -> float:
    """Exact one-sided p: share of all orders of y whose rho is at most the observed one (a falling trend)."""
    if len(x) > 8:
        raise DitkitError(f"{len(x)} points", allowed="at most 8: all orders are enumerated")
    observed = spearman(x, y)
    found = [spearman(x, order) <= observed + 1e-12 for order in itertools.permutations(y)]
    return sum(found) / len(found)
