"""FORA (arXiv 2407.01425): compute attention and MLP at every N-th step, reuse them in between.

What is kept is the branch's output *before* its gate; gates follow the current step. With s = T-1 .. 0 in execution order, a
step computes where s = T-1 or s mod N = 0 (released code), so the last step is always full. Nothing is learned.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from pydantic import Field
from torch import Tensor

from ditkit.core import registry
from ditkit.core.config import Config
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.seams import Site


class FORAConfig(Config):
    """How often branches are computed."""

    interval: int = Field(3, ge=1, description="compute every N-th step; 1 computes always")


@registry.register("methods", "fora")
class FORA(Method):
    """Mode: the branches that are computed; the others are reused."""

    config_class = FORAConfig
    owns = frozenset({"reuse"})
    scheduled = True

    def plan(self, at: At) -> Hashable:
        full = at.first or (at.num_steps - 1 - at.step) % self.config.interval == 0
        return tuple(n for n in at.branches if full or n in at.fresh)

    def reads(self, mode: Any, slot: str) -> bool:
        return slot.split(".")[0] not in mode

    def branch(self, nxt: Any, h: dict[str, Tensor], site: Site) -> dict[str, Tensor]:
        if site.branch not in site.mode:  # type: ignore[operator]
            return site.kept("out")
        return site.keep("out", nxt(h))

    def finish(self, run: Run) -> dict[str, Any]:
        steps = [s for s in range(run.num_steps) if s == 0 or (run.num_steps - 1 - s) % self.config.interval == 0]
        return {"full_steps": len(steps), "hits": run.num_steps - len(steps)}

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(interval=2), cls(interval=3)]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls(interval=1)]
