"""A method: a strict config, functions named after the seams it wants, and what it owns, needs and breaks.

    predict, trunk   (self, nxt, value, run)        outside compiled code, once a forward
    block            (self, nxt, streams, at)       outside, around one block
    update, branch, attend, linear (self, nxt, value, site)   inside compiled blocks
    mask             (self, q, k, q_name, k_name)   an attention mask as a function of layouts

``plan`` decides in Python, once per run; its modes are the constants of the graphs. ``feed`` gives a block tensors.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from .config import Config
from .errors import Conflict, DitkitError
from .streams import Layout

if TYPE_CHECKING:
    from .backbone import Backbone
    from .run import At, Run

Stage = Literal["structure", "run time", "attention", "adaptation", "numbers"]
STAGES: tuple[Stage, ...] = ("structure", "run time", "attention", "adaptation", "numbers")


class Method(nn.Module):
    """Settings and trained parameters, never run state.

    Class attributes:
        stage: the nesting; an earlier stage of ``STAGES`` is further out. The order of attaching is irrelevant.
        owns: what only one method may decide ("reuse", "tokens", "kv.img", "depth", "weights").
        needs: traits that backbone and other methods must leave ("grid", "static tokens").
        breaks: traits it takes from others.
        exact: the output equals the base's up to rounding (batch independence binds exact methods).
        tolerance: for lossy ones, the relative error that the contract tests allow between a batch and its parts.
        inputs: names of tensors (B or 1, ...) that a run hands it, in ``run.inputs``; without them it leaves the base as it is.
    """

    name: ClassVar[str] = ""
    config_class: ClassVar[type[Config]] = Config
    stage: ClassVar[Stage] = "run time"
    owns: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-5
    inputs: ClassVar[tuple[str, ...]] = ()
    scheduled: bool = False  # the plan depends on the step: needs a solver whose steps are known in advance
    step_bound: ClassVar[bool] = False  # its learned state is for one solver and number of steps (a router)

    def __init__(self, config: Config | None = None, **values: Any) -> None:
        super().__init__()
        if config is not None and (values or not isinstance(config, self.config_class)):
            raise DitkitError(
                f"{type(self).__name__} got {config!r} and {sorted(values)}", allowed=f"a {self.config_class.__qualname__}, or its fields"
            )
        self.config: Any = self.config_class(**values) if config is None else config

    @property
    def label(self) -> str:
        """The name under which it is attached and its state kept; give two of a kind different labels."""
        return getattr(self.config, "label", "") or self.name or type(self).__name__.lower()

    @classmethod
    def tiny(cls) -> list[Method]:
        """Small instances for the contract tests, at settings at which the method does something."""
        return [cls()]

    @classmethod
    def off(cls) -> list[Method]:
        """Instances that must leave the base bit-identical (interval 1, strength 0, zero initialisation)."""
        return []

    @classmethod
    def example(cls, x: Tensor) -> dict[str, Tensor]:
        """Inputs of a run over x (B, C, ...) for the contract tests, each row a function of that row of x."""
        return {}

    def install(self, view: Backbone) -> None:
        """Once, on the view: check that it fits, build parameters. Raises Conflict."""

    def replace(self, path: str, module: nn.Module) -> nn.Module | None:
        """A substitute for the projection ``module`` at ``path`` in the view, or None. Only for what must drop the weight itself."""
        return None

    def start(self, run: Run) -> None:
        """A run begins: check that it is valid for it, set up ``run.memory[self.label]``."""

    def fresh(self, at: At) -> frozenset[str]:
        """Branches that nobody may reuse now."""
        return frozenset()

    def plan(self, at: At) -> Hashable:
        """The mode at this step and block, a function of the schedule (and of what ``start`` set up); None: absent.

        A mode names everything that changes the graph: which tensors are read, which are kept, how many tokens there are.
        """
        return ()

    def feed(self, at: At) -> dict[str, Tensor]:
        """Tensors for this block, besides what was kept: its parameters, numbers that vary by step."""
        return {}

    def reads(self, mode: Hashable, slot: str) -> bool:
        """Whether ``mode`` reads a kept value; what it does not read is not passed in."""
        return True

    def keys(self, call: str, layouts: dict[str, Layout], at: At) -> dict[str, Layout]:
        """The key layouts of an attention call, where the method adds or widens key segments."""
        return layouts

    def close(self, prediction: Tensor, run: Run) -> Tensor:
        """After guidance, before the solver: look at the prediction (B, C, ...), or amend it."""
        return prediction

    def finish(self, run: Run) -> dict[str, Any]:
        """A run ends: figures for its report. A cache reports ``hits``, the evaluations it reused."""
        return {}


def order(methods: list[Method]) -> list[Method]:
    """Outermost first: by stage, then by label."""
    return sorted(methods, key=lambda m: (STAGES.index(m.stage), m.label))


def check_conflicts(methods: list[Method], traits: frozenset[str], backbone: str, needs: frozenset[str] = frozenset()) -> None:
    """Refuse what cannot meet, with the reason. ``traits`` and ``needs`` are the backbone's."""
    for i, m in enumerate(methods):
        if hasattr(nn.ModuleDict, m.label) or "." in m.label:
            raise Conflict(f"a method's label is {m.label!r}", allowed="a word without a dot that no torch module uses itself")
        if lost := needs & m.breaks:
            raise Conflict(
                f"{backbone} needs {', '.join(sorted(lost))}, which {m.label} takes away", hint="drop the method, or see its config"
            )
        if lack := m.needs - traits:
            raise Conflict(
                f"{m.label} needs {', '.join(sorted(lack))}, which {backbone} has not",
                allowed=f"{backbone} has {', '.join(sorted(traits))}",
            )
        for n in methods[:i]:
            if m.label == n.label:
                raise Conflict(f"{m.label} is attached twice", hint="attach one of them, or give one another label")
            if both := m.owns & n.owns:
                raise Conflict(f"{n.label} and {m.label} both decide {', '.join(sorted(both))}", hint="attach one of them")
        for n in methods:
            if n is not m and (lost := m.needs & n.breaks):
                raise Conflict(f"{m.label} needs {', '.join(sorted(lost))}, which {n.label} takes away", hint="attach one of them")
