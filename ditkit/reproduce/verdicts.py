"""From measurements to verdicts: shown, not shown, or underpowered. Each of the three is an honest end.

An effect is positive where the method is better. Two bounds are computed, over the finite samples (paired bootstrap) and over
the training seeds (Student's t); the wider counts.
    shown          the lower bound is above 0
    not shown      otherwise, and the upper bound is below the smallest effect that the protocol set out to find
    underpowered   otherwise: neither no effect nor one of that size can be excluded

Of a claim with a margin, that the method is worse by no more than that, both bounds count from -margin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .protocol import HIGHER_IS_BETTER, Comparison, Paired, Protocol, Trend
from .statistics import Array, Bound, Rows, bootstrap_bound, detectable, resampled, seed_bound, spearman, spearman_p

Verdict = Literal["shown", "not shown", "underpowered"]
Value = Callable[[Rows | None], float]  # the metric over some rows of an arm's samples (None: all)
Values = Mapping[str, Sequence[Value]]  # arm -> one for each seed


@dataclass(frozen=True)
class Effect:
    """One comparison. Values are means over seeds, the effect is positive where the method is better."""

    method: str
    baseline: str
    method_value: float
    baseline_value: float
    effect: float
    low: float
    high: float
    per_seed: tuple[float, ...]
    bootstrap: Bound
    over_seeds: Bound
    detectable: float  # with 80 % power, at the spread that was found
    verdict: Verdict | None  # None: reported as context


@dataclass(frozen=True)
class PairedResult:
    """A claim of the kind "paired"."""

    name: str
    hypothesis: str
    metric: str
    relative: bool
    smallest_effect: float
    verdict: Verdict
    effects: tuple[Effect, ...]
    context: tuple[Effect, ...]
    margin: float = 0.0


@dataclass(frozen=True)
class TrendResult:
    """A claim of the kind "trend". ``low`` and ``high`` bound |rho| of a falling (or rising, as claimed) order."""

    name: str
    hypothesis: str
    metric: str
    smallest_effect: float
    verdict: Verdict
    rho: float
    p: float
    low: float
    high: float
    per_seed: tuple[float, ...]
    monotone: bool
    arms: tuple[str, ...]
    macs: tuple[int, ...]
    values: tuple[float, ...]


ClaimResult = PairedResult | TrendResult


def verdict(low: float, high: float, smallest_effect: float) -> Verdict:
    """See the module."""
    if low > 0:
        return "shown"
    return "not shown" if high < smallest_effect else "underpowered"


def trend_verdict(rho: float, low: float, high: float, smallest_effect: float) -> Verdict:
    """Of |rho| in the claimed direction: shown if the order is perfect and the lower bound is still significant."""
    if rho >= 1 - 1e-12 and low >= smallest_effect - 1e-12:
        return "shown"
    return "not shown" if high < 1 - 1e-12 else "underpowered"


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim that needs all of its comparisons."""
    if all(v == "shown" for v in verdicts):
        return "shown"
    return "not shown" if "not shown" in verdicts else "underpowered"


def judge_paired(name: str, claim: Paired, protocol: Protocol, values: Values, size: int) -> PairedResult:
    """``values``: the metric of each arm and seed as a function of rows; ``size``: how many rows there are."""
    seeds = len(values[claim.arms[0]])
    draws = resampled(seeds, size, shared=claim.metric == "mse", num=protocol.resamples)
    tables = {arm: _Table.of(values[arm], draws) for arm in claim.arms}
    effects = tuple(_effect(c, claim, tables, judged=True) for c in claim.comparisons)
    context = tuple(_effect(c, claim, tables, judged=False) for c in claim.context)
    overall = together([e.verdict for e in effects if e.verdict is not None])
    return PairedResult(
        name, claim.hypothesis, claim.metric, claim.relative, claim.smallest_effect, overall, effects, context, claim.margin
    )


@dataclass(frozen=True)
class _Table:
    """An arm's metric: of all samples for each seed (S,), and of each draw of the bootstrap (R, S)."""

    values: Array
    draws: Array

    @classmethod
    def of(cls, values: Sequence[Value], draws: Sequence[Rows]) -> _Table:
        seeds = range(len(values))
        return cls(np.array([values[s](None) for s in seeds]), np.array([[values[s](rows[s]) for s in seeds] for rows in draws]))


def _effect(c: Comparison, claim: Paired, tables: Mapping[str, _Table], judged: bool) -> Effect:
    method, baseline = tables[c.method], tables[c.baseline]
    sign = 1.0 if claim.metric in HIGHER_IS_BETTER else -1.0

    def better(a: Array, b: Array) -> Array:
        if not claim.relative:
            return sign * (a - b)
        whole = np.where(b > 0, b, np.maximum(a, np.finfo(np.float64).tiny))  # a baseline without any error: the method's is the whole
        return sign * (a - b) / whole

    per_seed = better(method.values, baseline.values)
    boot = bootstrap_bound(float(per_seed.mean()), better(method.draws, baseline.draws).mean(1))
    seed = seed_bound(per_seed.tolist())
    bound = boot.widest(seed)
    return Effect(
        method=c.method,
        baseline=c.baseline,
        method_value=float(method.values.mean()),
        baseline_value=float(baseline.values.mean()),
        effect=float(per_seed.mean()),
        low=bound.low,
        high=bound.high,
        per_seed=tuple(per_seed.tolist()),
        bootstrap=boot,
        over_seeds=seed,
        detectable=detectable(float(per_seed.std(ddof=1)), 0.0, len(per_seed)),
        verdict=verdict(bound.low + claim.margin, bound.high + claim.margin, claim.smallest_effect) if judged else None,
    )


def judge_trend(name: str, claim: Trend, protocol: Protocol, values: Values, macs: Mapping[str, int], size: int) -> TrendResult:
    """Rho of the metric against multiply-adds; the bootstrap draws seeds and held-out samples, the same for all arms."""
    cost = [macs[a] for a in claim.arms]
    sign = 1.0 if claim.metric in HIGHER_IS_BETTER else -1.0
    seeds = len(values[claim.arms[0]])
    everything = [_means(claim, values, range(seeds), None), *(_means(claim, values, [s], None) for s in range(seeds))]
    rho, *per_seed = (spearman(cost, v) for v in everything)
    better = sign * rho
    low, high = np.quantile(_rhos(claim, protocol, values, cost, size) * sign, [0.05, 0.95])
    order = np.argsort(cost, kind="stable")
    return TrendResult(
        name=name,
        hypothesis=claim.hypothesis,
        metric=claim.metric,
        smallest_effect=claim.smallest_effect,
        verdict=trend_verdict(better, float(low), float(high), claim.smallest_effect),
        rho=rho,
        p=spearman_p(cost, [-sign * v for v in everything[0]]),
        low=float(low),
        high=float(high),
        per_seed=tuple(per_seed),
        monotone=bool((np.diff(sign * np.asarray(everything[0])[order]) > 0).all()),
        arms=claim.arms,
        macs=tuple(cost),
        values=tuple(everything[0]),
    )


def _means(claim: Trend, values: Values, seeds: Sequence[int] | range, rows: Rows | None) -> list[float]:
    return [float(np.mean([values[a][s](rows) for s in seeds])) for a in claim.arms]


def _rhos(claim: Trend, protocol: Protocol, values: Values, cost: Sequence[float], size: int) -> Array:
    rng = np.random.default_rng(0)
    seeds = len(values[claim.arms[0]])
    found = []
    for _ in range(protocol.resamples):
        chosen, rows = rng.integers(seeds, size=seeds).tolist(), rng.integers(size, size=size)
        found.append(spearman(cost, _means(claim, values, chosen, rows)))
    return np.asarray(found)
