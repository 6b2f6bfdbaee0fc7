"""What a caller sees of a sampling under way: ``pipe(..., callback_on_step_end=f)`` calls ``f(StepEnd)`` after each solver step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ditkit.core.run import Run
from ditkit.diffusion.guidance import Denoise
from ditkit.diffusion.process import Process, Time, as_time


@dataclass(frozen=True)
class StepEnd:
    """A solver step that is over: what the network was asked last in it, and what it foresees.

    Attributes:
        step: from 0.
        num_inference_steps: of the run; an adaptive solver may end with fewer.
        t: (B,) public time of ``x``: 0 data, 1 noise.
        x: (B, c, h, w) the noisy sample that the network saw, in the codec's latents; the solver's own tensor, to be read only.
        output: (B, ., h, w) what the (guided) network answered, likewise.
        first: number of the batch's first picture within the call.
    """

    step: int
    num_inference_steps: int
    t: Tensor
    x: Tensor
    output: Tensor
    first: int
    process: Process

    @property
    def x0(self) -> Tensor:
        """(B, c, h, w) the data that the network foresees; computed when asked for."""
        return self.process.predict(self.output, self.x, self.t).x0


StepCallback = Callable[[StepEnd], object]


class Steps:
    """Between the solver and the network: notices that a step is over, and says so. It reads and changes nothing."""

    def __init__(self, callback: StepCallback, denoise: Denoise, process: Process, run: Run, first: int) -> None:
        self.callback, self.denoise, self.process, self.run, self.first = callback, denoise, process, run, first
        self.last: tuple[int, Tensor, Time, Tensor] | None = None  # step, x, t and output of the last evaluation

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        if self.last is not None and self.last[0] != self.run.step:
            self.end()
        output = self.denoise(x, t)
        self.last = self.run.step, x, t, output
        return output

    def end(self) -> None:
        """The step of the last evaluation is over."""
        if self.last is not None:
            step, x, t, output = self.last
            self.last = None
            time = as_time(t).expand(len(x))
            self.callback(StepEnd(step, self.run.num_steps, time, x, output, self.first, self.process))
