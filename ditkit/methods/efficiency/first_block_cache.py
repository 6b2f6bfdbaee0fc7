"""First-block cache: where the first block's residual hardly moved since it was last computed, the rest of the network is reused.

With h0 the tokens that enter the first block, h1 those that leave it and hL those that leave the last, r = h1 - h0 and R = hL - h1:

    mean |r - r'| / mean |r'| < threshold   =>   hL = h1 + R',   where r' is r of the step before and R' the R last computed

A rule that spread through inference libraries (it has no paper; TeaCache, arXiv 2411.19108, decides in the same way from modulated inputs).
Nothing is learned. The mean runs over the whole batch, so a picture can depend on those beside it.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.config import Config
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.streams import Streams

FIRST, START, REST = "residual", "start/", "rest/"  # of what is kept at block 0; the last two by stream


class FirstBlockCacheConfig(Config):
    """When the rest of the network is reused."""

    threshold: float = Field(0.1, ge=0, description="largest relative change of the first block's residual at which the rest is reused")
    warmup: int = Field(1, ge=1, description="steps at the start that compute everything")
    max_reused: int = Field(0, ge=0, description="steps in a row that may reuse; 0: any number")


@registry.register("methods", "first_block_cache")
class FirstBlockCache(Method):
    """A layer around each block, outside compiled code: what it decides follows from values, and each decision waits for the device."""

    config_class = FirstBlockCacheConfig
    owns = frozenset({"reuse", "tokens"})  # what it compares must be the same tokens at every step
    needs = frozenset({"static tokens"})

    def install(self, view: Backbone) -> None:
        if len(view.blocks) < 2:
            raise Conflict(f"{view.name} has one block", allowed="two or more: the first decides about the others")

    def start(self, run: Run) -> None:
        run.memory[self.label].update(hits=0, forwards=0)

    def reads(self, mode: Any, slot: str) -> bool:
        return False  # what is kept is used here, not inside blocks

    def block(self, nxt: Any, s: Streams, at: At, **extra: Any) -> Streams:
        kept = at.run.slots_of(self, 0)
        reused = at.memory.setdefault(("reused", at.run.guidance_pass, at.run.evaluation), 0)
        if at.block == 0:
            return self._first(nxt, s, at, kept, extra)
        if reused:
            return _rested(s, kept) if at.block == len(at.run.model.blocks) - 1 else s
        y = nxt(s, **extra)
        if at.block == len(at.run.model.blocks) - 1:
            kept.update({REST + n: st.x - kept[START + n] for n, st in y.items()})
        return y

    def _first(self, nxt: Any, s: Streams, at: At, kept: dict[str, Tensor], extra: dict[str, Any]) -> Streams:
        main = at.run.model.main
        y = nxt(s, **extra)
        now = y[main].x - s[main].x
        key = ("reused", at.run.guidance_pass, at.run.evaluation)
        near = FIRST in kept and self.near(now, kept[FIRST])
        most = self.config.max_reused or at.num_steps
        near = near and at.step >= self.config.warmup and at.memory[key] < most
        at.memory[key] = at.memory[key] + 1 if near else 0
        at.memory["hits"] += near
        at.memory["forwards"] += 1
        kept[FIRST] = now.detach()
        kept.update({START + n: st.x.detach() for n, st in y.items()})
        return y

    def near(self, now: Tensor, before: Tensor) -> bool:
        """Whether the residual ``now`` (B, N, D) is within the threshold of ``before``.

        Raises:
            DitkitError: the distance is 0 or no number: a block wrote into its input, or the network says nothing.
        """
        distance = float((now - before).abs().mean() / before.abs().mean())
        if not distance > 0:
            raise DitkitError(f"the first block's distance is {distance}", allowed="above 0", hint="a block must not write into its input")
        return distance < self.config.threshold

    def finish(self, run: Run) -> dict[str, Any]:
        memory = run.memory[self.label]
        return {"hits": memory["hits"], "forwards": memory["forwards"]}

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(threshold=1e9, max_reused=2)]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls(threshold=0.0)]


def _rested(s: Streams, kept: dict[str, Tensor]) -> Streams:
    return {n: st._replace(x=st.x + kept[REST + n]) if REST + n in kept else st for n, st in s.items()}
