"""A run: the whole changing state of one trajectory. Two runs share nothing; dropping one is its reset."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .errors import DitkitError
from .method import Method
from .streams import Streams, put_rows, rows

if TYPE_CHECKING:
    from .backbone import Backbone, Prepared

Slots = dict[str, Tensor]


@dataclass(frozen=True)
class At:
    """What a method may know outside compiled code: the schedule, the block, what its ``start`` set up."""

    run: Run
    block: int
    first: bool  # nothing of this pass has been computed yet
    fresh: frozenset[str] = frozenset()  # branches that nobody may reuse now
    memory: Any = None  # run.memory of the method
    mode: Hashable = None  # at the seam ``block`` and in ``feed``: what ``plan`` decided

    @property
    def step(self) -> int:
        return self.run.step

    @property
    def num_steps(self) -> int:
        return self.run.num_steps

    @property
    def branches(self) -> tuple[str, ...]:
        return self.run.model.blocks[self.block].branches  # type: ignore[return-value]


class Row(NamedTuple):
    """The plan of one block: the methods present, each with where it stands."""

    layers: tuple[tuple[Method, At], ...]
    outside: bool  # some method has the seam ``block`` here


class Run:
    """State of one trajectory through ``model``.

    Args:
        model: a backbone or a view of one.
        num_steps: solver steps of the trajectory (schedules count these).
        active: labels of the view's methods that take part; None: all. With none active a view is its base, bit for bit.
        inputs: tensors (B or 1, ...) that methods take besides the backbone's conditioning, by name (``model.inputs``).
    """

    def __init__(
        self,
        model: Backbone,
        num_steps: int = 1,
        active: Collection[str] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        if num_steps < 1:
            raise DitkitError(f"num_steps is {num_steps}", allowed="1 or more")
        if unknown := set(active or ()) - set(model.methods):
            raise DitkitError(f"no method {sorted(unknown)} is attached", allowed=f"labels among {sorted(model.methods)}")
        if unknown := set(inputs or ()) - set(model.inputs):
            raise DitkitError(
                f"no method takes the input {sorted(unknown)}",
                allowed=f"{sorted(model.inputs)}, which those attached take",
                hint="attach it",
            )
        self.model, self.num_steps, self.inputs = model, num_steps, dict(inputs or {})
        self.methods: list[Method] = [m for m in model.attached if active is None or m.label in active]
        self.step = 0
        self.first = True  # the forward under way is the first of its pass and evaluation
        self.t: Tensor | None = None  # the network time of the forward under way, and its conditioning
        self.prepared: Prepared | None = None
        self.times: Tensor | None = None  # (num_steps,) or (num_steps, B) network times at which steps start, where a solver knows them
        self.public_times: Tensor | None = None  # (num_steps,) the same in public time: 1 is noise, 0 is data
        self.guidance_pass: Hashable = ""
        self.evaluation = 0
        self.slots: dict[Hashable, Slots] = defaultdict(dict)  # (method, block, pass, evaluation) -> tensors
        self.memory: dict[str, dict[Any, Any]] = defaultdict(dict)  # method -> anything
        self.taps: list[tuple[int, str, Tensor]] = []  # of the last forward: block, name, value
        self.masks: dict[Hashable, Any] = {}  # rendered in this forward, and in the one before
        self.old_masks: dict[Hashable, Any] = {}
        self._plans: dict[Hashable, list[Row]] = {}
        self._last: dict[Hashable, int] = {}  # (pass, evaluation) -> the step at which it last ran
        self._count: dict[Hashable, int] = defaultdict(int)  # pass -> evaluations in this step
        self._shapes: dict[Hashable, Any] = {}
        for m in self.methods:
            m.start(self)

    def steps(self) -> Iterator[int]:
        """The steps in order; a solver iterates over these."""
        for step in range(self.num_steps):
            self.enter(step)
            yield step

    def enter(self, step: int) -> None:
        """A step begins, for a loop that is not ours: a foreign solver's. Steps may be left out, and none comes again."""
        self.step = step
        self._count.clear()

    def begin(self, guidance_pass: Hashable) -> None:
        """A forward begins: which pass, which evaluation within the step. A pass that skipped a step starts anew."""
        if self.step >= self.num_steps:
            raise DitkitError(
                f"step {self.step} of a run of {self.num_steps} steps", allowed=f"0 to {self.num_steps - 1}", hint="start a new Run"
            )
        self.guidance_pass, self.evaluation = guidance_pass, self._count[guidance_pass]
        self._count[guidance_pass] += 1
        self.taps.clear()
        key = (guidance_pass, self.evaluation)
        if self._last.get(key, self.step - 1) < self.step - 1:
            self._last.pop(key)
            self._shapes.pop(key, None)
            self._drop(key)
        self.first = key not in self._last
        self._last[key] = self.step

    def input(self, name: str, batch: int) -> Tensor | None:
        """An input for a forward of ``batch`` rows: repeated for both halves of batched guidance, or for all; None if it was not given."""
        value = self.inputs.get(name)
        if value is None or len(value) == batch:
            return value
        if batch % len(value):
            raise DitkitError(f"input {name!r} has {len(value)} rows for a batch of {batch}", allowed="1, or one for each row")
        return value.repeat(batch // len(value), *[1] * (value.dim() - 1))

    def leave(self) -> None:
        """After the last forward of a pass: what was kept for later steps is let go."""
        self._drop((self.guidance_pass, self.evaluation))

    def _drop(self, key: tuple[Hashable, int]) -> None:
        for slot in [s for s in self.slots if s[2:] == key]:  # type: ignore[index]
            del self.slots[slot]

    def check_shapes(self, s: Streams) -> None:
        """Within a run, a pass keeps its batch and token counts: what was kept would not fit otherwise."""
        now = {name: (len(st.x), st.layout.total) for name, st in s.items()}
        old = self._shapes.setdefault((self.guidance_pass, self.evaluation), now)
        if old != now:
            raise DitkitError(
                f"the streams are {now}, but were {old} earlier in this run's pass {self.guidance_pass!r}",
                hint="start a new Run, or name the guidance pass when batch and guidance change",
            )

    def plan(self) -> list[Row]:
        """The rows of this step; made once per run for each (step, first)."""
        key = (self.step, self.first)
        if key not in self._plans:
            self._plans[key] = [self._plan_block(i) for i in range(len(self.model.blocks))]
        return self._plans[key]

    def replan(self) -> None:
        """Forget the plans: for methods whose memory changed within the run."""
        self._plans.clear()

    def _plan_block(self, block: int) -> Row:
        at = At(self, block, self.first)
        fresh = frozenset().union(*(m.fresh(at) for m in self.methods))
        layers = []
        for m in self.methods:
            memory = self.memory[m.label]
            mode = m.plan(At(self, block, self.first, fresh, memory))
            if mode is not None:
                layers.append((m, At(self, block, self.first, fresh, memory, mode)))
        return Row(tuple(layers), any(hasattr(m, "block") for m, _ in layers))

    def slots_of(self, method: Method, block: int) -> Slots:
        """What this method keeps at this block in this pass and evaluation."""
        return self.slots[method.label, block, self.guidance_pass, self.evaluation]

    def close(self, prediction: Tensor) -> Tensor:
        """Hand the (guided) prediction to the methods, innermost first; the solver gets what they return."""
        for m in reversed(self.methods):
            prediction = m.close(prediction, self)
        return prediction

    def finish(self) -> dict[str, dict[str, Any]]:
        """The run is over: each method's figures, by label. A cache that reused nothing is a warning, not a silent slowdown."""
        report = {m.label: figures for m in self.methods if (figures := m.finish(self))}
        for label, figures in report.items():
            if figures.get("hits") == 0:
                warnings.warn(f"{label} is on and reused nothing in {self.num_steps} steps: its settings do not fit this run", stacklevel=2)
        return report


def gather(slots: Slots, mode: Hashable, method: Method, s: Streams) -> Slots:
    """What a mode reads of its slots, in canonical order, for the tokens at hand. ``...@stream`` holds one row per token of the stream."""
    return {key: _take(key, slots[key], s, method) for key in sorted(slots) if method.reads(mode, key)}


def _take(key: str, u: Tensor, s: Streams, method: Method) -> Tensor:
    st = s.get(key.rpartition("@")[2]) if "@" in key else None
    if st is None:
        return u
    if u.shape[:2] != (len(st.x), st.layout.total):
        raise DitkitError(
            f"{method.label} kept {key!r} for {tuple(u.shape[:2])} (batch, tokens), the stream now has {(len(st.x), st.layout.total)}",
            hint="compute the branch where the tokens change (Method.fresh), or start a new Run",
        )
    return u if st.layout.idx is None else rows(u, st.layout.idx)


def scatter(slots: Slots, kept: Slots, s: Streams) -> None:
    """Store what was handed out: detached, contiguous, token-indexed values by their rows."""
    for key, u in kept.items():
        u = u.detach()
        st = s.get(key.rpartition("@")[2]) if "@" in key else None
        if st is not None and st.layout.idx is not None:
            old = slots.get(key)
            whole = u.new_zeros(len(u), st.layout.total, *u.shape[2:]) if old is None else old
            u = put_rows(whole, u, st.layout.idx)
        slots[key] = u.contiguous()
