"""dopri5: Dormand and Prince's fifth-order method, with a step of its own for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ditkit.core.errors import DitkitError
from ditkit.core.run import Run

from .guidance import Denoise
from .noise import Draw
from .process import Process, like
from .solver import solver

# Dormand and Prince 1980: stage i is evaluated at t + NODES[i] h and x + h sum_j STAGES[i][j] k_j; the last stage is the new x
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # fifth minus fourth order

RTol = Annotated[float, Field(gt=0, description="relative error allowed in one step")]
ATol = Annotated[float, Field(gt=0, description="absolute error allowed in one step")]


@solver("dopri5", continuous=True, adaptive=True, inverts=True)
def dopri5(
    denoise: Denoise,
    x: Tensor,
    process: Process,
    run: Run,
    draw: Draw,
    times: Tensor,
    *,
    rtol: RTol = 1e-3,
    atol: ATol = 1e-6,
) -> Tensor:
    """Adaptive Runge-Kutta 5(4): each sample's steps follow its own error, so its result does not depend on its batch.

    The run's number of steps is the most that are tried; only the first and the last time are used. Six evaluations a step.
    A step of a sample is accepted if the mean square of error / (atol + rtol |x|) is at most 1.

    Raises:
        DitkitError: a sample did not arrive within the run's number of steps.
    """
    end = times[-1]
    t = times[:1].repeat(len(x))
    h = 0.05 * (end - t)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return process.predict(denoise(x, t), x, t).velocity

    v: Tensor | None = None  # at (x, t)
    for _ in run.steps():
        v = velocity(x, t) if v is None else v
        last = (end - t).abs() <= h.abs()
        h = torch.where(last, end - t, h)
        new_x, new_v, error = _step(velocity, x, t, h, v)
        ratio = (error / (atol + rtol * torch.maximum(x.abs(), new_x.abs()))).flatten(1).square().mean(1).sqrt().to(h)
        accepted = ratio <= 1
        taken = like(accepted, x).bool()
        x, v = torch.where(taken, new_x, x), torch.where(taken, new_v, v)
        t = torch.where(accepted, torch.where(last, end, t + h), t)
        if bool((t == end).all()):
            return x
        h = h * _factor(ratio)
    raise DitkitError(
        f"dopri5 has t = {t.tolist()} left after {run.num_steps} steps, not {float(end)}",
        hint="more num_inference_steps (the most that may be tried), or larger rtol and atol",
    )


def _factor(ratio: Tensor) -> Tensor:
    """0.9 ratio^(-1/5) within 1/4 and 8, rounded down to a power of 2^(1/4): rounding errors of the network, which differ between
    batch sizes, then hardly ever change a sample's steps."""
    steps = 4 * (0.9 * ratio.clamp(min=1e-10) ** -0.2).log2()
    return 2 ** (steps.floor().clamp(-8, 12) / 4)


def _step(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x and velocity at t + h, and the estimated error of that x."""
    width = like(h, x)
    k, ahead = [v], x
    for node, weights in zip(NODES[1:], STAGES[1:]):
        ahead = x + width * sum(w * u for w, u in zip(weights, k) if w)
        k.append(velocity(ahead, t + node * h))
    return ahead, k[-1], width * sum(w * u for w, u in zip(ERROR, k) if w)
