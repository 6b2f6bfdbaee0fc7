"""What a solver is: a short function, its options, which processes it fits, and a strict call."""

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
from .process import Process

Clip = Annotated[bool, Field(description="clip predicted data to [-1, 1]; for pixels, not for latents")]


class Update(Protocol):
    """What a solver is inside: x (B, C, ...) at times[0] -> x at times[-1]."""

    def __call__(self, denoise: Denoise, x: Tensor, process: Process, run: Run, draw: Draw, times: Tensor, **options: Any) -> Tensor: ...


@dataclass(frozen=True)
class Solver:
    """A registered solver.

    Attributes:
        options: its keyword options, as a strict configuration.
        continuous: needs dx/dt, which a process of discrete levels has not.
        adaptive: steps are chosen from the samples, not known in advance.
        inverts: also goes from data to noise, along increasing times.
        grid: amends the process's times; not called for times that the user gave.
    """

    name: str
    summary: str
    function: Update
    options: type[Config]
    continuous: bool = False
    adaptive: bool = False
    inverts: bool = False
    grid: Callable[[Process, Tensor, Any], Tensor] | None = None

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
        self._check(process, run)
        process = process.at(x.shape[1:])
        way = process.times(run.num_steps, spacing, times)
        if way[0] < way[-1] and not self.inverts:
            raise DitkitError(f"solver {self.name} along increasing times", allowed="decreasing times: from noise to data")
        if times is None and self.grid is not None:
            way = self.grid(process, way, values)
        run.times = None if self.adaptive else process.network_time(way[:-1])
        run.public_times = None if self.adaptive else way[:-1]
        return self.function(denoise, x, process, run, draw, way, **{key: getattr(values, key) for key in type(values).model_fields})

    def _check(self, process: Process, run: Run) -> None:
        if self.continuous and not process.continuous:
            raise DitkitError(
                f"solver {self.name} with the {process.name} process, which has no dx/dt",
                allowed=", ".join(s.name for s in SOLVERS.values() if not s.continuous),
            )
        if self.adaptive and (fixed := [m.label for m in run.methods if m.scheduled]):
            raise Conflict(
                f"{self.name} chooses its steps from the samples, {', '.join(fixed)} is scheduled by step", hint="a solver of fixed steps"
            )


SOLVERS: dict[str, Solver] = {}


def solver(name: str, **traits: Any) -> Callable[[Any], Any]:
    """Register a function as a solver; its keyword-only parameters become its options. ``traits``: fields of ``Solver``."""

    def add(function: Any) -> Any:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        fields: dict[str, Any] = {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
        options = create_model(f"{name} options", __base__=Config, **fields)
        SOLVERS[name] = Solver(name, (function.__doc__ or "").split("\n")[0], function, options, **traits)
        return function

    return add


def clipped(x0: Tensor, clip: bool) -> Tensor:
    """Predicted data, in [-1, 1] if ``clip``."""
    return x0.clamp(-1, 1) if clip else x0
