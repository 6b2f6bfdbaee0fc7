"""Fixed steps of higher order on dx/dt = velocity: the midpoint method, and Kutta's rule of fourth order.

Lumina-Next (2406.18583, section 2.4) samples with midpoint: two evaluations a step, of which 5 to 10 are said to be enough.
"""

from __future__ import annotations

from torch import Tensor

from ditkit.core.run import Run

from .guidance import Denoise
from .noise import Draw
from .process import Process, like
from .solver import solver


@solver("midpoint", continuous=True, inverts=True)
def midpoint(denoise: Denoise, x: Tensor, process: Process, run: Run, draw: Draw, times: Tensor) -> Tensor:
    """The midpoint method, of second order: the velocity half a step ahead. Two evaluations a step, none at its end."""
    for i in run.steps():
        t, s = times[i], times[i + 1]
        v = _velocity(denoise, process, x, t)
        x = x + like(s - t, x) * _velocity(denoise, process, x + like((s - t) / 2, x) * v, (t + s) / 2)
    return x


@solver("rk4", continuous=True, inverts=True)
def rk4(denoise: Denoise, x: Tensor, process: Process, run: Run, draw: Draw, times: Tensor) -> Tensor:
    """Runge-Kutta of fourth order by Kutta's 3/8 rule (1901): x + h (k1 + 3 k2 + 3 k3 + k4) / 8. Four evaluations a step.

    k2 at t + h/3, k3 at t + 2h/3, k4 at t + h. A step to t = 0 of a process whose velocity is not defined there is one by midpoint.
    """
    for i in run.steps():
        t, s = times[i], times[i + 1]
        h, k1 = like(s - t, x), _velocity(denoise, process, x, t)
        if s == 0 and process.singular:
            x = x + h * _velocity(denoise, process, x + h / 2 * k1, (t + s) / 2)
            continue
        k2 = _velocity(denoise, process, x + h / 3 * k1, t + (s - t) / 3)
        k3 = _velocity(denoise, process, x + h * (k2 - k1 / 3), t + 2 * (s - t) / 3)
        k4 = _velocity(denoise, process, x + h * (k1 - k2 + k3), s)
        x = x + h / 8 * (k1 + 3 * k2 + 3 * k3 + k4)
    return x


def _velocity(denoise: Denoise, process: Process, x: Tensor, t: Tensor) -> Tensor:
    return process.predict(denoise(x, t), x, t).velocity
