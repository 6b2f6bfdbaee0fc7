"""Solvers: short functions from noise to data, each with its equation.

    x = SOLVERS["ddim"](denoise, x, process, run, draw, eta=0.5)

``denoise(x, t)`` is the (guided) network output at public time t, ``draw(step, purpose)`` noise like x, ``run`` counts the
steps. Every solver takes ``spacing`` (one of the process's) or ``times`` (used as given), and refuses options it does not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import Field, create_model
from torch import Tensor

from ditkit.core.config import Config
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.run import Run

from .guidance import Denoise
from .noise import Draw
from .process import Coefficients, Prediction, Process, like, posterior


class Update(Protocol):
    """What a solver is inside: x (B, C, ...) at times[0] -> x at times[-1]."""

    def __call__(self, denoise: Denoise, x: Tensor, process: Process, run: Run, draw: Draw, times: Tensor, **options: Any) -> Tensor: ...


@dataclass(frozen=True)
class Solver:
    """A registered solver: the function, its options, and which processes it fits."""

    name: str
    summary: str
    function: Update
    options: type[Config]
    processes: tuple[str, ...] = ()  # empty: all
    adaptive: bool = False  # steps are chosen from the samples, not known in advance

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        process: Process,
        run: Run,
        draw: Draw,
        *,
        spacing: str = "",
        times: Sequence[float] | Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Solve from x (B, C, ...) at the first time to the last one, in ``run.num_steps`` steps.

        Raises:
            DitkitError: an unknown option or value, a process it does not fit, times or a spacing the process does not have.
            Conflict: the solver is adaptive and a method of the view is scheduled by step.
        """
        values = self.options.parse(options, f"solver {self.name}")
        if self.processes and process.name not in self.processes:
            raise DitkitError(f"solver {self.name} with the {process.name} process", allowed=f"{', '.join(self.processes)} processes")
        if self.adaptive and (fixed := [m.label for m in run.methods if m.scheduled]):
            raise Conflict(
                f"{self.name} chooses its steps from the samples, {', '.join(fixed)} is scheduled by step", hint="a solver of fixed steps"
            )
        grid = process.times(run.num_steps, spacing, times)
        return self.function(denoise, x, process, run, draw, grid, **{key: getattr(values, key) for key in type(values).model_fields})


SOLVERS: dict[str, Solver] = {}


def solver(name: str, *, processes: tuple[str, ...] = (), adaptive: bool = False) -> Callable[[Any], Any]:
    """Register a function as a solver; its keyword-only parameters become its options."""

    def add(function: Any) -> Any:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        fields: dict[str, Any] = {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
        options = create_model(f"{name} options", __base__=Config, **fields)
        SOLVERS[name] = Solver(name, (function.__doc__ or "").split("\n")[0], function, options, processes, adaptive)
        return function

    return add


Eta = Annotated[float, Field(ge=0, description="0: deterministic; 1: as much noise as DDPM's posterior")]
Clip = Annotated[bool, Field(description="clip predicted data to [-1, 1]; for pixels, not for latents")]


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


@solver("ddim")
def ddim(
    denoise: Denoise, x: Tensor, process: Process, run: Run, draw: Draw, times: Tensor, *, eta: Eta = 0.0, clip: Clip = False
) -> Tensor:
    """DDIM (2010.02502): the probability-flow ODE, exact where the prediction is constant; eta adds noise."""
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


@solver("euler", processes=("flow", "interpolant", "edm"))
def euler(denoise: Denoise, x: Tensor, process: Process, run: Run, draw: Draw, times: Tensor) -> Tensor:
    """Euler's method on dx/dt = velocity; of a Gaussian process, that is ddim."""
    for i in run.steps():
        t, s = times[i], times[i + 1]
        x = x + like(s - t, x) * process.predict(denoise(x, t), x, t).velocity
    return x


def chain(process: Process, times: Tensor) -> list[Coefficients]:
    """alpha and sigma at each of the times."""
    return [Coefficients(alpha, sigma) for alpha, sigma in zip(*process.coefficients(times))]


def clipped(x0: Tensor, clip: bool) -> Tensor:
    """Predicted data, in [-1, 1] if ``clip``."""
    return x0.clamp(-1, 1) if clip else x0
