"""What a press of the button runs: the base, then the accelerated pipeline, live; then both again and again, in turn, for the time.

A live pass makes previews, and is the first with its settings (allocation, compilation): it warms up and is not timed. The timed
passes make none. One thread does all of it, so nothing else of the page runs meanwhile.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image

from ditkit.callback import StepEnd
from ditkit.conditioning.inputs import takes_text
from ditkit.core.errors import DitkitError
from ditkit.eval.drift import Drift, drift
from ditkit.output import Output
from ditkit.pipeline import Pipeline

from . import pictures
from .jobs import Job
from .studio import Studio

Side = Literal["base", "fast"]
PREVIEW_EVERY = 0.15  # seconds
PASSES, LONG_ENOUGH = 5, 2.0  # timed passes of each side: at most so many, and no more once they took so many seconds in all


@dataclass(frozen=True)
class Wish:
    """What the user asks for. ``class_label`` None: all classes in turn; ``methods`` "": the base alone."""

    bundle: str
    prompt: str = ""
    negative_prompt: str = ""
    class_label: int | None = None
    num_images: int = 4
    seed: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    solver: str = "ddim"
    methods: str = ""
    timed: bool = True


@dataclass(frozen=True)
class Shown:
    """One side as far as it is: a preview or the pictures, and the seconds of its timed passes."""

    image: Image.Image
    output: Output | None = None
    seconds: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Seconds of a timed pass."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class State:
    """All that the page shows of a comparison.

    Attributes:
        doing: what happens now, in words; "" when it is over.
        part: how far that is, 0 to 1.
        sides: what there is of base and accelerated.
        drift: of the accelerated from the base, once both are there.
        heat: where they differ, and the difference (of a range of 2) shown as white.
        notes: warnings of the library.
    """

    wish: Wish
    doing: str = ""
    part: float = 0.0
    base: Shown | None = None
    fast: Shown | None = None
    drift: Drift | None = None
    heat: tuple[Image.Image, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float | None:
        """How many times faster, once both are timed."""
        if self.base and self.fast and self.base.seconds and self.fast.seconds:
            return self.base.median / self.fast.median
        return None


def compare(studio: Studio, wish: Wish, job: Job) -> State:
    """Run it; every change of state is said to the job.

    Raises:
        DitkitError: a value, method or bundle that does not fit.
        Stopped: at the end of a solver step, after the user asked for it.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return _Comparison(studio, wish, job, caught).run()


class _Comparison:
    def __init__(self, studio: Studio, wish: Wish, job: Job, caught: list[warnings.WarningMessage]) -> None:
        self.studio, self.wish, self.job, self.caught = studio, wish, job, caught
        self.state = State(wish)

    def run(self) -> State:
        self.tell(doing=f"Loading {self.wish.bundle}")
        sides: dict[Side, Pipeline] = {"base": self.studio.base(self.wish.bundle)}
        if self.wish.methods:
            self.tell(doing=f"Attaching {self.wish.methods}")
            sides["fast"] = self.studio.fast(self.wish.bundle, self.wish.methods)
        outputs = {side: self.live(side, pipe) for side, pipe in sides.items()}
        if "fast" in outputs:
            base, fast = outputs["base"].x, outputs["fast"].x
            self.tell(doing="Comparing", drift=drift(fast, base), heat=pictures.heat(fast, base))
        if self.wish.timed:
            self.time(sides)
        self.tell(doing="", part=1.0)
        return self.state

    def tell(self, **changes: Any) -> None:
        """The state has changed."""
        notes = tuple(dict.fromkeys(str(w.message) for w in self.caught if issubclass(w.category, UserWarning)))
        self.state = replace(self.state, notes=notes, **changes)
        self.job.check()
        self.job.say(self.state)

    def live(self, side: Side, pipe: Pipeline) -> Output:
        """A pass with previews."""
        name = self.name(side)
        last = 0.0

        def show(end: StepEnd) -> None:
            nonlocal last
            self.job.check()
            if time.monotonic() - last >= PREVIEW_EVERY:
                doing = f"{name}: step {end.step + 1} of {end.num_inference_steps}"
                image = pictures.preview(pipe.codec, end.x0)
                self.tell(doing=doing, part=(end.step + 1) / end.num_inference_steps, **{side: Shown(image)})
                last = time.monotonic()

        self.tell(doing=f"{name}: starting", part=0.0)
        out = self.sample(pipe, show)
        self.tell(doing=f"{name}: done", part=1.0, **{side: Shown(pictures.sheet(out.images), out)})
        return out

    def time(self, sides: dict[Side, Pipeline]) -> None:
        """Timed passes in turn, without previews, while the page rests."""
        seconds: dict[Side, list[float]] = {side: [] for side in sides}
        order = list(sides)
        for k in range(PASSES):
            for side in order:
                self.tell(doing=f"Timing, pass {k + 1}: {self.name(side).lower()}", part=k / PASSES)
                self.job.settle()
                start = time.perf_counter()
                self.sample(sides[side], lambda _: self.job.check())
                seconds[side].append(time.perf_counter() - start)
            order.reverse()
            if sum(map(sum, seconds.values())) >= LONG_ENOUGH:
                break
        timed: dict[str, Shown] = {side: replace(getattr(self.state, side), seconds=tuple(s)) for side, s in seconds.items()}
        self.tell(**timed)

    def sample(self, pipe: Pipeline, callback: Callable[[StepEnd], object]) -> Output:
        w = self.wish
        return pipe(
            **_told(pipe, w),
            num_images=w.num_images,
            num_inference_steps=w.num_inference_steps,
            guidance_scale=w.guidance_scale,
            seed=w.seed,
            solver=w.solver,
            progress=False,
            callback_on_step_end=callback,
        )

    def name(self, side: Side) -> str:
        return "Base" if side == "base" else self.wish.methods


def _told(pipe: Pipeline, wish: Wish) -> dict[str, Any]:
    """The prompt or the label, as the pipeline takes it."""
    if not takes_text(pipe.model):
        return {"class_labels": wish.class_label}
    if not wish.prompt.strip():
        raise DitkitError("the prompt is empty", allowed="a few words", hint="choose one of the examples")
    return {"prompt": wish.prompt, "negative_prompt": wish.negative_prompt.strip() or None}
