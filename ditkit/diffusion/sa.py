"""SA-Solver (2309.05019): stochastic Adams, a predictor and a corrector over the last predictions, with as much noise as one likes.

With lambda = log(alpha / sigma), X the predicted data, tau >= 0 and c = 1 + tau^2, the SDE of that tau goes from t to s, h = lambda_s -
lambda_t, by (equation 17)

    x_s = (sigma_s / sigma_t) e^(-tau^2 h) x_t + c alpha_s int_0^h e^(-c u) X(lambda_s - u) du + sigma_s sqrt(1 - e^(-2 tau^2 h)) noise

tau = 0 is the ODE, tau = 1 the SDE of DDPM. X is a polynomial through the last predictions; the corrector's also goes through the one made
at the predicted x_s, and takes the same noise. One evaluation a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field
from torch import Tensor

from ditkit.core.run import Run

from .guidance import Denoise
from .multistep import Level, Past, levels_of, usable
from .noise import Draw
from .process import Process
from .solver import Clip, clipped, solver

Tau = Annotated[float, Field(ge=0, description="noise: 0 none (the ODE), 1 as much as the SDE of DDPM")]


def _in_order(interval: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError("0 <= low <= high <= 1 is needed")
    return interval


TauInterval = Annotated[
    tuple[float, float],
    AfterValidator(_in_order),
    Field(description="tau counts where a step ends at low <= t <= high, public time; elsewhere it is 0"),
]
PredictorOrder = Annotated[int, Field(ge=1, le=4, description="predictions that a step is made of; 2 for guided sampling, 3 for unguided")]
CorrectorOrder = Annotated[int, Field(ge=0, le=4, description="the same of the correction, which has one more ahead; 0: no correction")]


@solver("sa")
def sa(
    denoise: Denoise,
    x: Tensor,
    process: Process,
    run: Run,
    draw: Draw,
    times: Tensor,
    *,
    tau: Tau = 1.0,
    tau_interval: TauInterval = (0.2, 0.8),
    predictor_order: PredictorOrder = 2,
    corrector_order: CorrectorOrder = 2,
    clip: Clip = False,
) -> Tensor:
    """SA-Solver (2309.05019, algorithm 1): stochastic Adams predictor and corrector; tau 0 is deterministic."""
    levels, past, step = levels_of(process, times), list[Past](), None
    for i in run.steps():
        new = Past(clipped(process.predict(denoise(x, times[i]), x, times[i]).x0, clip), levels[i].log_ratio)
        if corrector_order and step is not None:
            x = step([new, *past[: corrector_order - 1]])
        past = [new, *usable(past)]
        last = i == run.num_steps - 1
        noisy = tau if not last and tau_interval[0] <= float(times[i + 1]) <= tau_interval[1] else 0.0
        step = Step(x, levels[i], levels[i + 1], noisy, draw(i, "step") if noisy else None)
        x = step(past[: min(predictor_order, run.num_steps - i)])
        past = usable(past)[: max(predictor_order, corrector_order) - 1]
    return x


@dataclass(frozen=True)
class Step:
    """A step from x (B, C, ...) at level ``t`` to level ``s``; called with the predictions that it is made of, newest first."""

    x: Tensor
    t: Level
    s: Level
    tau: float
    noise: Tensor | None

    def __call__(self, points: list[Past]) -> Tensor:
        c, h = 1 + self.tau**2, self.s.log_ratio - self.t.log_ratio
        decay = math.exp(-(self.tau**2) * h) if self.tau else 1.0
        x = (self.s.sigma / self.t.sigma * decay) * self.x
        for weight, point in zip(weights([self.s.log_ratio - p.log_ratio for p in points], h, c), points):
            x = x + (c * self.s.alpha * weight) * point.x0
        if self.noise is not None:
            x = x + (self.s.sigma * math.sqrt(-math.expm1(-2 * self.tau**2 * h))) * self.noise
        return x


def weights(places: list[float], h: float, c: float) -> list[float]:
    """The integral of e^(-c u) from 0 to h of each Lagrange polynomial through ``places``, values of u.

    Of two places the integral of e^(-c u) (h - u) is taken as h^2 / 2, as released: equal to third order in h.
    """
    if len(places) == 1:
        return [-math.expm1(-c * h) / c]
    moments = [-math.expm1(-c * h) / c]
    for j in range(1, len(places)):
        moments.append((j * moments[-1] - h**j * math.exp(-c * h)) / c)
    found = []
    for k, u in enumerate(places):
        others = [v for i, v in enumerate(places) if i != k]
        ascending = np.poly(others)[::-1] / math.prod(u - v for v in others)
        found.append(float(np.dot(ascending, moments)))
    if len(places) == 2:
        more = (h**2 / 2 - (h * moments[0] - moments[1])) / (places[1] - places[0])
        found = [found[0] + more, found[1] - more]
    return found
