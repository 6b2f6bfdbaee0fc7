"""Solvers that reuse what the steps before predicted: DPM-Solver++ (2211.01095) of second and third order.

With lambda = log(alpha / sigma), h = lambda_s - lambda_t and X(lambda) the predicted data, a step from t to s is exactly (equation 9)

    x_s = (sigma_s / sigma_t) x_t + sigma_s int e^lambda X dlambda

and X is a polynomial through the last predictions. A step to sigma = 0 gives X; one from alpha = 0, whose lambda is -inf, takes X as it is.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

from pydantic import Field
from torch import Tensor

from ditkit.core.run import Run

from .guidance import Denoise
from .noise import Draw
from .process import Process
from .solver import Clip, clipped, solver

LowOrder = Annotated[
    int, Field(ge=0, description="with fewer steps than this the last one is of first order, and of 3m the one before of second")
]


Exact = Annotated[
    bool,
    Field(description="the parabola's integral as it is, of third order; released code takes half of its curvature, of second order"),
]


class Level(NamedTuple):
    """alpha, sigma and lambda = log(alpha / sigma) at a time of a trajectory."""

    alpha: float
    sigma: float
    log_ratio: float


class Past(NamedTuple):
    """Predicted data (B, C, ...), and the lambda at which they were predicted."""

    x0: Tensor
    log_ratio: float


def levels_of(process: Process, times: Tensor) -> list[Level]:
    """The level at each of the times."""
    return [Level(a, s, _log_ratio(a, s)) for a, s in zip(*(c.tolist() for c in process.coefficients(times)))]


def _log_ratio(alpha: float, sigma: float) -> float:
    if sigma == 0:
        return math.inf
    return math.log(alpha / sigma) if alpha else -math.inf


def usable(past: list[Past]) -> list[Past]:
    """Those that a polynomial in lambda can go through."""
    return [p for p in past if p.log_ratio > -math.inf]


@solver("dpm++2m")
def dpm_plus_plus_2m(
    denoise: Denoise,
    x: Tensor,
    process: Process,
    run: Run,
    draw: Draw,
    times: Tensor,
    *,
    clip: Clip = False,
    lower_order_below: LowOrder = 15,
) -> Tensor:
    """DPM-Solver++ 2M (2211.01095, algorithm 2): x_s = (sigma_s / sigma_t) x - alpha_s (e^-h - 1) D, D = x0 + (h / 2) dx0/dlambda."""
    return _dpm_plus_plus(2, denoise, x, process, run, times, clip, lower_order_below)


@solver("dpm++3m")
def dpm_plus_plus_3m(
    denoise: Denoise,
    x: Tensor,
    process: Process,
    run: Run,
    draw: Draw,
    times: Tensor,
    *,
    clip: Clip = False,
    lower_order_below: LowOrder = 15,
    exact: Exact = False,
) -> Tensor:
    """DPM-Solver++ 3M, as released with 2211.01095: a parabola through the last three predictions.

    The first two steps are of lower order. The released formula (diffusers' too) gives the parabola's curvature half of its weight.
    """
    return _dpm_plus_plus(3, denoise, x, process, run, times, clip, lower_order_below, 1.0 if exact else 0.5)


def _dpm_plus_plus(
    order: int,
    denoise: Denoise,
    x: Tensor,
    process: Process,
    run: Run,
    times: Tensor,
    clip: bool,
    lower_order_below: int,
    curvature: float = 1.0,
) -> Tensor:
    levels, past = levels_of(process, times), list[Past]()
    for i in run.steps():
        t, s = levels[i], levels[i + 1]
        x0 = clipped(process.predict(denoise(x, times[i]), x, times[i]).x0, clip)
        past = [Past(x0, t.log_ratio), *usable(past)][:order]
        left = run.num_steps - i if run.num_steps < lower_order_below else order
        count = 1 if s.sigma == 0 else min(left, len(past))
        x = (s.sigma / t.sigma) * x + s.alpha * integral(past[:count], s.log_ratio, curvature)
    return x


def integral(past: list[Past], end: float, curvature: float = 1.0) -> Tensor:
    """e^-end times the integral of e^lambda X from the newest of ``past`` to ``end``; X goes through one to three points, newest first.

    Of two points the slope's weight is (1 - e^-h) h / 2 instead of h - 1 + e^-h, as the paper has it: equal to second order in h.
    ``curvature`` multiplies the quadratic term of three.
    """
    x0, start = past[0]
    h = end - start
    whole = -math.expm1(-h)
    if len(past) == 1:
        return whole * x0
    slope = (x0 - past[1].x0) / (start - past[1].log_ratio)
    if len(past) == 2:
        return whole * (x0 + (h / 2) * slope)
    earlier = (past[1].x0 - past[2].x0) / (past[1].log_ratio - past[2].log_ratio)
    bend = (slope - earlier) / (start - past[2].log_ratio)
    slope = slope + (start - past[1].log_ratio) * bend  # at the newest point
    return whole * x0 + (h - whole) * slope + curvature * (h**2 - 2 * (h - whole)) * bend
