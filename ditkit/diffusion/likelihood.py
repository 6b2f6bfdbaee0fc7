"""Log-likelihood by the probability-flow ODE (2011.13456, appendix D.2; SiT, released ``sample_ode_likelihood``).

log p(x) = log N(z) + integral from 0 to 1 of div v dt, along dx/dt = v from the data x to noise z. The divergence is
Hutchinson's estimate e' (dv/dx) e. One probe serves the whole solve; drawn anew at each call it would bias adaptive solvers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.run import Run

from .guidance import Denoise
from .process import Process


@dataclass(frozen=True)
class Likelihood:
    """``log_p`` (B,) in nats, ``z`` (B, C, ...) where the ODE carries the data, ``bits_per_dim`` (B,)."""

    log_p: Tensor
    z: Tensor

    @property
    def bits_per_dim(self) -> Tensor:
        return -self.log_p / (math.log(2) * self.z[0].numel())


def log_likelihood(
    denoise: Denoise,
    x: Tensor,
    process: Process,
    run: Run,
    probe: Tensor,
    *,
    method: Literal["euler", "heun"] = "heun",
    times: Sequence[float] | Tensor | None = None,
) -> Likelihood:
    """The likelihood of data x (B, C, ...) in ``run.num_steps`` steps from data to noise.

    Args:
        denoise: the network output, differentiable in x (no inference mode).
        probe: like x, of mean 0 and variance 1; +1 and -1 with equal chance have the least variance.
        times: increasing public times; default: the process's sampling times, turned around.

    Raises:
        DitkitError: the process has no dx/dt. Conflict: a method of the view reuses values between steps.
    """
    if not process.continuous or process.singular:
        raise DitkitError(f"the likelihood of the {process.name} process", allowed="flow and interpolant")
    if fixed := [m.label for m in run.methods if m.scheduled]:
        raise Conflict(f"{', '.join(fixed)} reuses values between steps, so divergences would be wrong", hint="detach it")
    if method not in ("euler", "heun"):
        raise DitkitError(f"method is {method!r}", allowed="'euler' or 'heun'")
    way = process.times(run.num_steps).flip(0) if times is None else process.times(run.num_steps, times=times)
    change = x.new_zeros(len(x))
    for i in run.steps():
        t, s = way[i], way[i + 1]
        h = float(s - t)
        v, div = _velocity_and_divergence(denoise, x, process, t, probe)
        if method == "heun":
            ahead = _velocity_and_divergence(denoise, x + h * v, process, s, probe)
            v, div = (v + ahead[0]) / 2, (div + ahead[1]) / 2
        x, change = x + h * v, change + h * div
    prior = -0.5 * (x**2).flatten(1).sum(1) - 0.5 * x[0].numel() * math.log(2 * math.pi)
    return Likelihood(prior + change, x)


def _velocity_and_divergence(denoise: Denoise, x: Tensor, process: Process, t: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = process.predict(denoise(x, t), x, t).velocity
        (grad,) = torch.autograd.grad((v * probe).sum(), x)
    return v.detach(), (grad * probe).flatten(1).sum(1)
