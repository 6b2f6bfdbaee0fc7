"""PAB-style broadcast (arXiv 2408.12588): reuse each kind of attention for its own number of steps, in the middle of the run.

The paper finds that attention changes little in the middle of sampling, cross-attention least, spatial attention most, so each kind
is computed every so many steps there (section 3.2) and always outside. Branches are named by kind as blocks name them; what is kept
is their output before its gate. Nothing is learned.

Differs from the paper: times are those of evenly spaced steps, u = 1 - step / num_steps, whatever the solver's own, so that the
schedule is known in advance; the rule within the window is diffusers' (a step computes where step mod range = 0).
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from ditkit.core import registry
from ditkit.core.config import Config
from ditkit.core.method import Method
from ditkit.core.run import At, Run

from ._feature_cache import FeatureCache


class PABConfig(Config):
    """How long each kind of branch is reused. Defaults: the paper's PAB 246 (spatial 2, temporal 4, cross 6), in diffusers' window."""

    spatial: int = Field(2, ge=1, description="self-attention is computed every so many steps within the window; 1: always")
    temporal: int = Field(4, ge=1, description="attention between frames, where blocks have it")
    cross: int = Field(6, ge=1, description="attention to the text, where it is a branch of its own")
    mlp: int = Field(1, ge=1, description="MLPs; the paper's release has them as an option, at single steps")
    window: tuple[float, float] = Field((0.1, 0.8), description="reuse where the time u, from 1 (noise) to 0, lies strictly between these")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.window
        if not 0 <= low < high <= 1:
            raise ValueError(f"window is {self.window}: wants 0 <= low < high <= 1")
        return self

    def interval(self, branch: str) -> int:
        """Of the branch's kind: ``cross``, ``temporal`` and ``mlp`` by name, all others are spatial attention."""
        ranges = {"cross": self.cross, "temporal": self.temporal, "mlp": self.mlp}
        return ranges.get(branch, self.spatial)


@registry.register("methods", "pab")
class PAB(FeatureCache):
    """Nothing but a schedule for each kind of branch."""

    config_class = PABConfig

    def computes(self, at: At, branch: str) -> bool:
        return self._computes(at.step, at.num_steps, branch)

    def _computes(self, step: int, num_steps: int, branch: str) -> bool:
        low, high = self.config.window
        return step % self.config.interval(branch) == 0 or not low < 1 - step / num_steps < high

    def finish(self, run: Run) -> dict[str, Any]:
        kinds = sorted({name for block in run.model.blocks for name in block.branches})  # type: ignore[union-attr]
        reused = {kind: sum(not self._computes(s, run.num_steps, kind) for s in range(1, run.num_steps)) for kind in kinds}
        return {"reused_steps": reused, "hits": sum(reused.values())}

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(spatial=2, cross=3, window=(0.0, 1.0)), cls(spatial=3, mlp=2, window=(0.1, 0.9))]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls(spatial=1, temporal=1, cross=1, mlp=1)]
