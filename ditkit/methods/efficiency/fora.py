"""FORA (arXiv 2407.01425): compute attention and MLP at every N-th step, reuse them in between.

What is kept is the branch's output *before* its gate; gates follow the current step. With s = T-1 .. 0 in execution order, a
step computes where s = T-1 or s mod N = 0 (released code), so the last step is always full. Nothing is learned.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ditkit.core import registry
from ditkit.core.config import Config
from ditkit.core.method import Method
from ditkit.core.run import At, Run

from ._feature_cache import FeatureCache


class FORAConfig(Config):
    """How often branches are computed."""

    interval: int = Field(3, ge=1, description="compute every N-th step; 1 computes always")


@registry.register("methods", "fora")
class FORA(FeatureCache):
    """Nothing but a schedule."""

    config_class = FORAConfig

    def computes(self, at: At, branch: str) -> bool:
        return (at.num_steps - 1 - at.step) % self.config.interval == 0

    def finish(self, run: Run) -> dict[str, Any]:
        steps = [s for s in range(run.num_steps) if s == 0 or (run.num_steps - 1 - s) % self.config.interval == 0]
        return {"full_steps": len(steps), "hits": run.num_steps - len(steps)}

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(interval=2), cls(interval=3)]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls(interval=1)]
