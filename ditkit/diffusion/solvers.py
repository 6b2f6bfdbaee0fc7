"""Solvers: short functions from noise to data, each with its equation.

    x = SOLVERS["ddim"](denoise, x, process, run, draw, eta=0.5)

``denoise(x, t)`` is the (guided) network output at public time t, ``draw(step, purpose)`` noise like x, ``run`` counts the
steps. Every solver takes ``spacing`` (one of the process's) or ``times`` (used as given), and refuses options it does not know.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from ditkit.core.errors import DitkitError
from ditkit.core.run import Run

from .adaptive import dopri5
from .guidance import Denoise
from .multistep import dpm_plus_plus_2m, dpm_plus_plus_3m
from .noise import Draw
from .process import Coefficients, Prediction, Process, like, posterior
from .runge_kutta import midpoint, rk4
from .sa import sa
from .sde import euler_maruyama
from .solver import SOLVERS, Clip, Solver, clipped, solver

__all__ = [
    "SOLVERS",
    "Solver",
    "ddim",
    "ddim_step",
    "ddpm",
    "ddpm_step",
    "dopri5",
    "dpm_plus_plus_2m",
    "dpm_plus_plus_3m",
    "euler",
    "euler_maruyama",
    "heun",
    "midpoint",
    "rk4",
    "sa",
    "solver",
]

Eta = Annotated[float, Field(ge=0, description="0: deterministic; 1: as much noise as DDPM's posterior")]


@solver("ddpm")
def ddpm(denoise: Denoise, x: Tensor, process: Process, run: Run, draw: Draw, times: Tensor, *, clip: Clip = False) -> Tensor:
    """Ancestral sampling (2006.11239, algorithm 2), with the learned variance where there is one."""
    levels = chain(process, times)
    for i in run.steps():
        p = process.predict(denoise(x, times[i]), x, times[i])
        noise = draw(i, "step") if times[i + 1] > 0 else None
        x = ddpm_step(x, p, levels[i], levels[i + 1], noise, clip)
    return x


def ddpm_step(x: Tensor, p: Prediction, t: Coefficients, s: Coefficients, noise: Tensor | None, clip: bool = False) -> Tensor:
    """x_s = E q(x_s | x_t, x0) + exp(log_variance / 2) noise, log_variance = f log(beta) + (1 - f) log(beta~) (2102.09672, eq. 15)."""
    q = posterior(t, s)
    mean = like(q.x0_weight, x) * clipped(p.x0, clip) + like(q.x_weight, x) * x
    if noise is None:
        return mean
    fraction = 0.0 if p.fraction is None else p.fraction
    log_variance = fraction * like(q.large.log(), x) + (1 - fraction) * like(q.small.log(), x)
    return mean + (0.5 * log_variance).exp() * noise


@solver("ddim", inverts=True)
def ddim(
    denoise: Denoise, x: Tensor, process: Process, run: Run, draw: Draw, times: Tensor, *, eta: Eta = 0.0, clip: Clip = False
) -> Tensor:
    """DDIM (2010.02502): the probability-flow ODE, exact where the prediction is constant; eta adds noise."""
    if eta and times[0] < times[-1]:
        raise DitkitError(f"eta {eta} along increasing times", allowed="eta 0: inversion adds no noise")
    levels = chain(process, times)
    for i in run.steps():
        p = process.predict(denoise(x, times[i]), x, times[i])
        noise = draw(i, "step") if eta and times[i + 1] > 0 else None
        x = ddim_step(x, p, levels[i], levels[i + 1], eta, noise, clip)
    return x


def ddim_step(
    x: Tensor, p: Prediction, t: Coefficients, s: Coefficients, eta: float = 0.0, noise: Tensor | None = None, clip: bool = False
) -> Tensor:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - d^2) eps + d noise, d = eta * posterior deviation (2010.02502, eq. 12 and 16).

    With eta 0 it also goes from s to a noisier t (inversion).
    """
    x0, eps = p.x0, p.eps
    if clip:
        x0 = clipped(x0, clip)
        eps = (x - like(t.alpha, x) * x0) * like(1 / t.sigma, x)
    if not eta or noise is None:
        return like(s.alpha, x) * x0 + like(s.sigma, x) * eps
    d = eta * posterior(t, s).small.sqrt()
    return like(s.alpha, x) * x0 + like((s.sigma**2 - d**2).clamp(min=0).sqrt(), x) * eps + like(d, x) * noise


@solver("euler", continuous=True, inverts=True)
def euler(denoise: Denoise, x: Tensor, process: Process, run: Run, draw: Draw, times: Tensor) -> Tensor:
    """Euler's method on dx/dt = velocity; of a Gaussian process, that is ddim."""
    for i in run.steps():
        t, s = times[i], times[i + 1]
        x = x + like(s - t, x) * process.predict(denoise(x, t), x, t).velocity
    return x


@solver("heun", continuous=True, inverts=True)
def heun(denoise: Denoise, x: Tensor, process: Process, run: Run, draw: Draw, times: Tensor) -> Tensor:
    """Heun's second-order method: the mean of the velocities at both ends of a step (EDM, 2206.00364, algorithm 1).

    Two evaluations a step, but for a step to t = 0 of a process whose velocity is not defined there.
    """
    for i in run.steps():
        t, s = times[i], times[i + 1]
        v = process.predict(denoise(x, t), x, t).velocity
        ahead = x + like(s - t, x) * v
        if s > 0 or not process.singular:
            v = (v + process.predict(denoise(ahead, s), ahead, s).velocity) / 2
        x = x + like(s - t, x) * v
    return x


def chain(process: Process, times: Tensor) -> list[Coefficients]:
    """alpha and sigma at each of the times."""
    return [Coefficients(alpha, sigma) for alpha, sigma in zip(*process.coefficients(times))]
