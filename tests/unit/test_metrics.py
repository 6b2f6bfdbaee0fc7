"""Metrics: closed forms, independent implementations, strict shapes, any number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.metrics.pairwise import polynomial_kernel

from ditkit.core.errors import DitkitError
from ditkit.eval.metrics import Moments, as_features, bootstrap, frechet_distance, gather_moments, kid, precision_recall
from ditkit.testing import gathering, processes


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---- Fréchet distance


def test_a_shift_of_3_in_16_features_is_144() -> None:
    """Case A14: |m1 - m2|^2 = 16 * 9, and equal covariances cancel."""
    x = normal(64, 16)
    assert frechet_distance(x, x + 3) == pytest.approx(144, abs=1e-6)
    assert frechet_distance(torch.from_numpy(x).float(), torch.from_numpy(x + 3)) == pytest.approx(144, abs=1e-4)


def test_known_distance_of_diagonal_gaussians() -> None:
    """Commuting covariances: the trace is sum (s1 - s2)^2. Columns are orthonormalised, so that the moments are exact."""
    n, d = 50, 4
    basis = np.linalg.qr(np.c_[np.ones(n), normal(n, d)])[0][:, 1:] * np.sqrt(n - 1)
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 0.5, 0.0])
    assert frechet_distance(basis * a, basis * b) == pytest.approx(((a - b) ** 2).sum(), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_formula_with_scipys_matrix_root(seed: int) -> None:
    x, y = normal(200, 12, seed=seed) @ normal(12, 12, seed=seed + 10), normal(150, 12, seed=seed + 20) + 0.3
    s1, s2 = np.cov(x.T), np.cov(y.T)
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(want, rel=1e-9)


def test_a_set_against_itself_is_zero_even_with_constant_features() -> None:
    x = np.c_[normal(40, 5), np.zeros((40, 3))]
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "x",
    [normal(64), normal(64, 4, 4), normal(16, 64), normal(1, 16), np.zeros((0, 16)), np.full((64, 16), np.nan)],
    ids=lambda x: str(x.shape),
)
def test_bad_shapes_are_refused(x: np.ndarray) -> None:
    """Case A14: 1-D, transposed, N = 1, and what is not finite; on either side, and transposed on both."""
    good = normal(64, 16)
    for pair in ((x, good), (good, x), (x, x)):
        with pytest.raises(DitkitError):
            frechet_distance(*pair)
    with pytest.raises(DitkitError):
        kid(x, good)
    with pytest.raises(DitkitError):
        precision_recall(good, x)


def test_few_samples_only_when_asked() -> None:
    x = normal(10, 16)
    with pytest.raises(DitkitError, match="more samples than features"):
        frechet_distance(x, x)
    assert frechet_distance(x, x + 3, allow_singular=True) == pytest.approx(144, abs=1e-5)
    with pytest.raises(DitkitError):
        frechet_distance(x[:1], x, allow_singular=True)


def test_a_row_that_is_not_finite_is_named() -> None:
    x = normal(20, 3)
    x[7, 1] = np.inf
    with pytest.raises(DitkitError, match="row 7"):
        as_features(x)


def test_merged_moments_equal_those_of_the_whole() -> None:
    x = normal(100, 5) + 1e4  # a large mean would ruin sums of squares
    parts = [Moments.of(p) for p in (x[:1], x[1:40], x[40:])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    np.testing.assert_allclose(merged.covariance, np.cov(x.T), atol=1e-9)
    np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-14)
    assert merged.num == 100


# ---- kernel distance, precision and recall


def test_kid_on_the_whole_set_equals_the_double_sum() -> None:
    x, y = normal(30, 6), normal(30, 6, seed=1) + 0.5
    xx, yy, xy = (polynomial_kernel(a, b, degree=3, coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    off = ~np.eye(30, dtype=bool)
    want = xx[off].mean() + yy[off].mean() - 2 * xy.mean()
    got = kid(x, y, subset_size=30, num_subsets=2)
    assert got.value == pytest.approx(want, rel=1e-10)
    assert got.std == pytest.approx(0, abs=1e-12)


def test_kid_is_unbiased() -> None:
    """Two halves of one distribution: the mean over many draws is 0 within its error, which a biased estimate is not."""
    draws = [kid(normal(40, 4, seed=2 * i), normal(40, 4, seed=2 * i + 1), subset_size=40, num_subsets=1).value for i in range(200)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(len(draws))


def test_kid_subsets() -> None:
    x, y = normal(100, 4), normal(60, 4, seed=1)
    got = kid(x, y)
    assert (got.subset_size, got.num_subsets) == (30, 50)
    assert got == kid(x, y)
    assert got.std > 0
    for bad in (1, 61):
        with pytest.raises(DitkitError, match="2 to 60"):
            kid(x, y, subset_size=bad)


def test_precision_and_recall_on_a_line() -> None:
    """Reference 0, 1, .., 9 with k = 1: balls of radius 1 cover [-1, 10]. Samples 0.5, 1.5, 20, 21 cover only their own surroundings."""
    reference, samples = np.arange(10.0)[:, None], np.array([0.5, 1.5, 20.0, 21.0])[:, None]
    got = precision_recall(samples, reference, k=1)
    assert got.precision == 0.5
    assert got.recall == 0.3  # 0, 1, 2 lie within 1 of 0.5 or 1.5


def test_precision_and_recall_against_plain_loops() -> None:
    x, y, k = normal(25, 3), 0.7 * normal(40, 3, seed=1) + 0.4, 3

    def reach(centre: np.ndarray, centres: np.ndarray) -> float:
        return sorted(float(np.linalg.norm(centre - other)) for other in centres)[k]  # [0] is the centre itself

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        return float(np.mean([any(np.linalg.norm(p - c) <= reach(c, centres) for c in centres) for p in points]))

    got = precision_recall(x, y, k=k)
    assert got.precision == pytest.approx(share(x, y))
    assert got.recall == pytest.approx(share(y, x))


def test_a_set_against_itself_has_precision_and_recall_one() -> None:
    x = normal(50, 8)
    got = precision_recall(x, x)
    assert (got.precision, got.recall) == (1, 1)
    with pytest.raises(DitkitError, match="k is 50"):
        precision_recall(x, x, k=50)


# ---- intervals


def test_the_interval_holds_the_estimate_and_shrinks_with_samples() -> None:
    def run(n: int) -> Any:
        return bootstrap(frechet_distance, normal(n, 4), normal(n, 4, seed=1) + 1, num=100)

    small, large = run(50), run(800)
    estimate = frechet_distance(normal(800, 4), normal(800, 4, seed=1) + 1)
    assert large.low < estimate < large.high
    assert 2 < (small.high - small.low) / (large.high - large.low) < 8  # about the root of 16
    assert run(50) == small


def test_the_interval_covers_the_true_mean_difference() -> None:
    """A statistic without bias: a 90 % interval holds the truth in about 90 % of experiments."""
    hits = 0
    for i in range(100):
        x, y = normal(40, 1, seed=2 * i) + 1, normal(40, 1, seed=2 * i + 1)
        interval = bootstrap(lambda a, b: float(a.mean() - b.mean()), x, y, num=100, level=0.9)
        hits += interval.low < 1 < interval.high
    assert 80 <= hits <= 98


# ---- processes


def test_one_and_two_processes_agree(tmp_path: Path) -> None:
    """Case A14: to 1e-9, and the gathered features keep two dimensions. The processes have very different shares."""
    x = normal(64, 16)
    alone = frechet_distance(gather_moments(Moments.of(x)), Moments.of(x + 3))
    for name, rows in (("part-0", x[1:]), ("part-1", x[:1]), ("reference", x + 3)):
        np.save(tmp_path / f"{name}.npy", rows)
    for child in processes.world(2, gathering.gather, str(tmp_path)):
        child.join(50)
        assert child.exitcode == 0
    for rank in range(2):
        answer = json.loads((tmp_path / f"answer-{rank}.json").read_text())
        assert answer["distance"] == pytest.approx(alone, abs=1e-9)
        assert answer["distance"] == pytest.approx(144, abs=1e-6)
        np.testing.assert_array_equal(np.array(answer["features"]), np.r_[x[1:], x[:1]])
