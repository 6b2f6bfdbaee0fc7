"""TaylorSeer (arXiv 2503.06923): between full steps, extrapolate a branch's output instead of reusing it.

With F the output before its gate, kept at the last full steps, and u the steps since the last of them (section 3.2, eq. 6-7):

    D^0 = F,   D^(i+1) = (D^i now - D^i at the full step before) / (steps between them),   F(u) = sum_i D^i u^i / i!

Order 0 is FORA. Written from the paper's equations; the full steps are FORA's (s = T-1 or s mod N = 0), preceded by
``warmup`` full steps, as differences need at least two. With ``of="network"`` F is the output of the whole network, so that a step
between costs nothing but the solver; this is not in the paper (its authors' "lite" mode forecasts the last block's output).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ditkit.core import registry
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.seams import Site


class TaylorSeerConfig(Config):
    """How often branches are computed, and how far the series goes."""

    interval: int = Field(3, ge=1, description="compute every N-th step; 1 computes always")
    order: int = Field(1, ge=0, le=4, description="highest difference used; 0 reuses (FORA)")
    warmup: int = Field(2, ge=1, description="full steps at the start")
    of: Literal["branches", "network"] = Field(
        "branches", description="what is extrapolated: each branch, as in the paper; or the network's output, without a call of it"
    )


@registry.register("methods", "taylorseer")
class TaylorSeer(Method):
    """Mode: "first" (nothing kept yet), "full" (compute, renew the differences) or "guess" (extrapolate). Of the network: none, blocks
    that are called are called as they are."""

    config_class = TaylorSeerConfig
    owns = frozenset({"reuse"})
    needs = frozenset({"static tokens"})  # the steps since the last full one are the same for all tokens
    scheduled = True

    def full(self, step: int, num_steps: int) -> bool:
        """Whether everything is computed at this step."""
        return step < self.config.warmup or (num_steps - 1 - step) % self.config.interval == 0

    def plan(self, at: At) -> str | None:
        if self.config.of == "network":
            return None
        if at.first:
            return "first"
        return "full" if at.fresh or self.full(at.step, at.num_steps) else "guess"

    def reads(self, mode: Any, slot: str) -> bool:
        return mode != "first"

    def feed(self, at: At) -> dict[str, Tensor]:
        """Steps since the last full one, and the weights of the series: 0 where a difference is not known yet."""
        if at.mode == "first":
            at.memory[at.run.guidance_pass, at.run.evaluation, at.block] = [at.step]
            return {}
        past = at.memory[at.run.guidance_pass, at.run.evaluation, at.block]
        u, known = float(at.step - past[-1]), len(past)
        if at.mode == "full":
            past.append(at.step)
            return {"u": torch.tensor(u), "w": torch.tensor([float(i < known) for i in range(self.config.order)])}
        return {"w": torch.tensor(self.series(u, known))}

    def series(self, u: float, known: int) -> list[float]:
        """The weights of D^0 to D^order, u steps after the last of ``known`` full ones."""
        return [u**i / math.factorial(i) * (i < known) for i in range(self.config.order + 1)]

    def predict(self, nxt: Any, x: Tensor, run: Run) -> Tensor:
        if self.config.of != "network":
            return nxt(x)
        kept, key = run.slots_of(self, 0), (run.guidance_pass, run.evaluation)
        past = run.memory[self.label].setdefault(key, [])
        if run.first:
            past.clear()
        if past and not self.full(run.step, run.num_steps):
            if len(x) != len(kept["d0"]):
                raise DitkitError(
                    f"{self.label} kept outputs for a batch of {len(kept['d0'])}, this one has {len(x)}", hint="start a new Run"
                )
            return sum(w * kept[f"d{i}"] for i, w in enumerate(self.series(float(run.step - past[-1]), len(past))) if w)  # type: ignore[return-value]
        out: Tensor = nxt(x)
        d = out.detach()
        for i in range(min(len(past), self.config.order) + 1):
            difference = (d - kept[f"d{i}"]) / (run.step - past[-1]) if i < len(past) else d
            kept[f"d{i}"], d = d, difference
        past.append(run.step)
        return out

    def branch(self, nxt: Any, h: dict[str, Tensor], site: Site) -> dict[str, Tensor]:
        orders = range(self.config.order + 1)
        if site.mode == "guess":
            kept = [site.kept(f"d{i}") for i in orders]
            return {k: sum(site.given["w"][i] * kept[i][k] for i in orders) for k in kept[0]}  # type: ignore[misc]
        out = nxt(h)
        d = out
        for i in orders:
            site.keep(f"d{i}", d)
            if i < self.config.order:
                d = {k: self.difference(d[k], k, i, site) for k in d}
        return out

    def difference(self, d: Tensor, stream: str, i: int, site: Site) -> Tensor:
        """D^(i+1); zero at the first full step, and where D^i itself was not known before."""
        if site.mode == "first":
            return torch.zeros_like(d)
        return site.given["w"][i] * (d - site.kept(f"d{i}")[stream]) / site.given["u"]

    def finish(self, run: Run) -> dict[str, Any]:
        steps = [s for s in range(run.num_steps) if s == 0 or self.full(s, run.num_steps)]
        return {"full_steps": len(steps), "hits": run.num_steps - len(steps)}

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(interval=3), cls(interval=2, order=2, of="network")]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls(interval=1), cls(interval=1, of="network")]
