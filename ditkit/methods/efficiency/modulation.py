"""Modulation ahead of time: a block's shifts, scales and gates depend on time and label alone, and are made for many steps at once.

m = ada(SiLU(c)), c = Time(t) + Label(y) (DiT, arXiv 2212.09748, section 3.2). A run whose times are known makes m of the next K steps by
one product for each block, so that the largest weights after the MLP's are read once in K steps. Samples with the same label share a row.

Nothing is approximated or learned; what changes is the size of a product, hence its rounding. Where times are not known (an adaptive
solver, training, a forward without a run) the method is absent. The head's modulation stays where it is.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.core.backbone import Backbone, Prepared
from ditkit.core.config import Config
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.seams import Site


class ModulationConfig(Config):
    """How far ahead."""

    steps: int = Field(50, ge=1, description="steps made at once; they are kept: steps x labels x 6 dim numbers a block and guidance pass")


@dataclass
class Ahead:
    """The modulation of one guidance pass for K steps from ``first`` on, of R different rows of conditioning."""

    first: int
    prepared: Prepared
    active: dict[str, Tensor]  # stream -> SiLU(c) (K, R, E)
    row: Tensor | None  # (B,) the row of each sample; None: each has its own
    tables: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # block, projection -> (K, R, P)

    def covers(self, run: Run) -> bool:
        """Whether the forward under way is among its steps."""
        steps = len(next(iter(self.active.values())))
        return self.prepared is run.prepared and self.first <= run.step < self.first + steps

    def at(self, step: int, block: int, name: str, module: nn.Module) -> Tensor:
        """What the projection ``name`` of a block gives at a step: (B, 1, P)."""
        if (block, name) not in self.tables:
            self.tables[block, name] = module(self.active[name.removesuffix(".ada")])
        table = self.tables[block, name][step - self.first]
        return (table if self.row is None else table.index_select(0, self.row))[:, None]


@registry.register("methods", "modulation")
class Modulation(Method):
    """Innermost at the projections named ``STREAM.ada``: what others add to them (LoRA), or how they are stored (int8), is kept."""

    config_class = ModulationConfig
    stage = "numbers"
    owns = frozenset({"modulation"})
    exact = True

    def install(self, view: Backbone) -> None:
        modulated = any(name.endswith(".ada") for block in view.blocks for name in block.projections())  # type: ignore[operator]
        if not modulated or type(view).conditioning is Backbone.conditioning:
            raise Conflict(
                f"no block of {view.name} is modulated by time and conditioning alone",
                allowed="projections named STREAM.ada, and a backbone with ``conditioning``",
            )

    def plan(self, at: At) -> Hashable:
        return None if at.run.times is None else ()

    def predict(self, nxt: Any, x: Tensor, run: Run) -> Tensor:
        if run.times is not None:
            self._look_ahead(run, run.times, len(x))
        return nxt(x)

    def _look_ahead(self, run: Run, times: Tensor, batch: int) -> None:
        """Further evaluations of a step (Heun) are at times that nobody announced: theirs is made as they come."""
        memory, key = run.memory[self.label], (run.guidance_pass, run.evaluation)
        assert run.t is not None
        assert run.prepared is not None
        if run.t.dim() != 1:  # a time for each token
            memory.pop(key, None)
            return
        known = memory.get(key)
        if run.evaluation == 0:
            memory.setdefault("times", []).append((run.step, run.t))
            if known is not None and known.covers(run):
                return
            again = known is not None and known.prepared is not run.prepared  # prepared at every step: nothing to look ahead with
            times = times[run.step : run.step + (1 if again else self.config.steps)]
        else:
            times = run.t[None]
        times = (times if times.dim() == 2 else times[:, None].expand(-1, batch)).to(run.t.device)
        c = run.model.conditioning(times.t(), run.prepared)
        if not c:
            raise DitkitError(f"{run.model.name} does not say what modulates its blocks", hint=f"detach {self.label}")
        memory[key] = _ahead(run.step, run.prepared, c)

    def feed(self, at: At) -> dict[str, Tensor]:
        ahead = at.memory.get((at.run.guidance_pass, at.run.evaluation))
        if ahead is None:
            return {}
        block: Any = at.run.model.blocks[at.block]
        named = {name: module for name, module in block.projections().items() if name.endswith(".ada")}
        return {n: ahead.at(at.step, at.block, n, module) for n, module in named.items() if n.removesuffix(".ada") in ahead.active}

    def linear(self, nxt: Any, x: Tensor, site: Site) -> Tensor:
        return site.given[site.branch] if site.branch in site.given else nxt(x)

    def finish(self, run: Run) -> dict[str, Any]:
        """Raises DitkitError if the network was asked at other times than announced: its modulation was wrong then."""
        seen = run.memory[self.label].get("times", [])
        if run.times is not None and seen:
            wrong = torch.stack([(t != run.times[step].to(t.device)).any() for step, t in seen]).nonzero()
            if len(wrong):
                step, t = seen[int(wrong[0])]
                raise DitkitError(
                    f"step {step} was at network time {t.tolist()}, announced was {run.times[step].tolist()}",
                    hint=f"the solver's run.times must be the times it evaluates at; or detach {self.label}",
                )
        made = -(-run.num_steps // self.config.steps)
        return {"hits": max(0, run.num_steps - made) if seen else 0}

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(steps=4)]


def _ahead(step: int, prepared: Prepared, c: dict[str, Tensor]) -> Ahead:
    """``c``: stream -> (B, K, E). Samples whose rows are equal in all streams and steps share one."""
    active = {n: F.silu(u).transpose(0, 1).contiguous() for n, u in c.items()}
    rows = torch.cat([u.flatten(1) for u in c.values()], 1)
    if len(rows) == 1 or rows.is_meta:
        return Ahead(step, prepared, active, None)
    different, row = torch.unique(rows, dim=0, return_inverse=True)
    if len(different) == len(rows):
        return Ahead(step, prepared, active, None)
    some = row.new_empty(len(different)).scatter_(0, row, torch.arange(len(rows), device=row.device))  # a sample with each row
    return Ahead(step, prepared, {n: u[:, some] for n, u in active.items()}, row)
