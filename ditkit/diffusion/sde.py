"""Stochastic solvers of continuous processes: SDEs with the marginals of the process, for any diffusion (SiT, 2401.08740, section 2.4).

From noise to data, with dt = t - s > 0, score = -eps / sigma and any D >= 0:

    x_s = x_t + (-dx/dt + D score) dt + sqrt(2 D dt) noise

Differs from SiT's released code where that fails: ``constant`` and ``increasing-decreasing`` work, and ``sbdm``, which is
infinite where alpha = 0, starts at t = 0.999 there. SiT's paper writes w = 2 D, so its w = sigma is half of our ``sigma``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ditkit.core.errors import DitkitError
from ditkit.core.run import Run

from .guidance import Denoise
from .noise import Draw
from .process import Prediction, Process, Time, as_time, like
from .solver import solver

Form = Literal["sbdm", "constant", "sigma", "linear", "decreasing", "increasing-decreasing"]
FormOption = Annotated[Form, Field(description="the diffusion D along the path; sbdm is that of the path's own SDE")]
Norm = Annotated[float, Field(ge=0, description="the size of D; 0 is the ODE, but for 'decreasing'")]
Method = Annotated[Literal["euler", "heun"], Field(description="heun: noise first, then a second-order step, two evaluations")]
Last = Annotated[
    Literal["mean", "euler", "tweedie", "none"],
    Field(description="the last step, without noise: mean of the SDE, Euler on the ODE, the predicted data; none: like all others"),
]
LastSize = Annotated[float, Field(gt=0, lt=1, description="length of the last step in public time")]


def diffusion(process: Process, form: Form, norm: float, t: Time) -> Tensor:
    """D at public time t, of t's shape (released code, ``compute_diffusion``)."""
    t = as_time(t)
    alpha, sigma = process.coefficients(t)
    if form == "sbdm":
        d_alpha, d_sigma = process.rates(t)
        return norm * (sigma * d_sigma - d_alpha / alpha * sigma**2)
    tau = 1 - t
    return {
        "constant": torch.full_like(sigma, norm),
        "sigma": norm * sigma,
        "linear": norm * t,
        "decreasing": 0.25 * (norm * torch.cos(math.pi * tau) + 1) ** 2,
        "increasing-decreasing": norm * torch.sin(math.pi * tau) ** 2,
    }[form]


def _grid(process: Process, times: Tensor, options: Any) -> Tensor:
    """The process's times with the last step's length; the start is moved to where D is finite."""
    start, size = float(times[0]), options.last_step_size
    if options.form == "sbdm" and float(process.coefficients(start).alpha) == 0:
        start -= 1e-3
    if options.last == "none":
        return _stretch(times, start, float(times[-1]))
    if size >= start:
        raise DitkitError(f"last_step_size is {size}", allowed=f"less than {start}")
    return torch.cat([_stretch(times[:-1], start, size), times.new_zeros(1)])


def _stretch(times: Tensor, first: float, last: float) -> Tensor:
    """The same relative spacing from ``first`` to ``last``."""
    if len(times) == 1:
        return times.new_tensor([first])
    return last + (times - times[-1]) * ((first - last) / (times[0] - times[-1]))


@solver("euler_maruyama", continuous=True, grid=_grid)
def euler_maruyama(
    denoise: Denoise,
    x: Tensor,
    process: Process,
    run: Run,
    draw: Draw,
    times: Tensor,
    *,
    form: FormOption = "sigma",
    norm: Norm = 1.0,
    method: Method = "euler",
    last: Last = "mean",
    last_step_size: LastSize = 0.04,
) -> Tensor:
    """Euler-Maruyama, or Heun's variant, on the SDE with diffusion D; the last step adds no noise."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return process.predict(denoise(x, t), x, t)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return sde_drift(predict(x, t), process, form, norm, t)

    for i in run.steps():
        t, s = times[i], times[i + 1]
        if i == run.num_steps - 1 and last != "none":
            return last_step(x, predict(x, t), process, form, norm, t, s, last)
        shake = like((2 * diffusion(process, form, norm, t) * (t - s)).sqrt(), x) * draw(i, "step")
        x = _heun(drift, x + shake, t, s) if method == "heun" else x + like(t - s, x) * drift(x, t) + shake
    return x


def sde_drift(p: Prediction, process: Process, form: Form, norm: float, t: Time) -> Tensor:
    """-dx/dt + D score: the drift from noise to data."""
    return -p.velocity - like(diffusion(process, form, norm, t) / process.coefficients(t).sigma, p.eps) * p.eps


def last_step(x: Tensor, p: Prediction, process: Process, form: Form, norm: float, t: Tensor, s: Tensor, kind: str) -> Tensor:
    """The step that adds no noise; ``kind`` as the option ``last``."""
    if kind == "tweedie":
        return p.x0
    return x + like(t - s, x) * (-p.velocity if kind == "euler" else sde_drift(p, process, form, norm, t))


def _heun(drift: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One deterministic second-order step from t to s; of first order where s = 0, where the score is not defined."""
    first, h = drift(x, t), like(t - s, x)
    return x + h * first if s == 0 else x + h * (first + drift(x + h * first, s)) / 2
