"""A feature cache whose schedule is a learned table: a logit p for each step and branch, r = sigmoid(p), near 1 "compute", near 0 "reuse".

In use a branch is computed where r exceeds a threshold, so its graphs are FORA's. In training all is computed and mixed,

    A' = (1 - r) A_kept + r A_new,     kept again (mixed, detached) where r exceeds the threshold,

so that the loss has a gradient for r. The table is for one network and one number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from ditkit.core.backbone import Backbone
from ditkit.core.config import Config
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.seams import Site

from ._feature_cache import FeatureCache

if TYPE_CHECKING:
    from PIL.Image import Image

LIMIT = 5.0  # logits stay within +-LIMIT, so that none is out of reach of its gradient


class RouterConfig(Config):
    """What the table is for, and how it is read."""

    num_inference_steps: int = Field(10, ge=2, description="solver steps of the trajectories it is for")
    threshold: float = Field(0.1, ge=0, lt=1, description="a branch is computed where r exceeds this")
    ratio: float | None = Field(
        None, gt=0, lt=1, description="instead of the threshold: the share of all branch evaluations to reuse, those with the smallest r"
    )


class Mix(NamedTuple):
    """Mode of training: branches that are mixed with what was kept, and those whose result is kept."""

    mixed: tuple[str, ...]
    kept: tuple[str, ...]


class Router(FeatureCache):
    """The table: row i belongs to the i-th step executed; its columns are the branches, block by block."""

    config_class = RouterConfig
    step_bound = True
    scale: Tensor

    def __init__(self, config: Config | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        self.routers = nn.ParameterDict()  # step -> (J,) logits; steps that always compute have none
        self.columns: dict[tuple[int, str], int] = {}
        self.register_buffer("scale", torch.zeros(()))  # of errors lately, where it learns towards a ratio; 0: none yet

    def routed(self, step: int) -> bool:
        """Whether the table decides at this step; everything is computed otherwise."""
        return step > 0

    def install(self, view: Backbone) -> None:
        """Logits at N(0, 1), as released. A table that is there already must be this network's."""
        columns = {place: j for j, place in enumerate((i, n) for i, b in enumerate(view.blocks) for n in b.branches)}  # type: ignore[union-attr]
        if self.columns and self.columns != columns:
            raise Conflict(
                f"{self.label} is for a network of {len(self.columns)} branches in {len({i for i, _ in self.columns})} blocks, {view.name} "
                f"has {len(columns)} in {len(view.blocks)}",
                hint="train a router for this model",
            )
        if not self.columns:
            steps = [i for i in range(self.config.num_inference_steps) if self.routed(i)]
            self._check_ratio(len(steps))
            self.routers.update({str(i): nn.Parameter(torch.randn(len(columns))) for i in steps})
            self.to(next(view.parameters()).device)
        self.columns = columns

    def _check_ratio(self, routed: int) -> None:
        most = routed / self.config.num_inference_steps
        if self.config.ratio is not None and self.config.ratio > most:
            raise DitkitError(f"ratio is {self.config.ratio}", allowed=f"at most {most:.3f}: {self.label} may reuse at {routed} steps")

    # the table

    def rows(self) -> list[Tensor]:
        """r of each step, (J,) each, with gradients; ones where everything is computed."""
        sure = torch.ones(len(self.columns), device=self.scale.device)
        steps = range(self.config.num_inference_steps)
        return [self.routers[str(i)].clamp(-LIMIT, LIMIT).sigmoid() if self.routed(i) else sure for i in steps]

    def table(self) -> Tensor:
        """r (T, J), detached."""
        return torch.stack(self.rows()).detach()

    def level(self) -> float:
        """What r must exceed for a branch to be computed."""
        if self.config.ratio is None:
            return float(self.config.threshold)
        lowest = self._lowest()
        return float(self.table().flatten()[lowest[-1]]) if len(lowest) else -1.0

    def computed(self) -> Tensor:
        """(T, J) bool: what is computed in use. With a ratio, exactly the rest is reused; equal r in order of steps."""
        r = self.table()
        if r.is_meta:
            raise DitkitError(f"the table of {self.label} is on the meta device", hint="a model with memory: what is reused depends on it")
        if self.config.ratio is None:
            routed = torch.tensor([self.routed(i) for i in range(len(r))], device=r.device)[:, None]
            return (r > self.config.threshold) | ~routed
        chosen = torch.ones(r.numel(), dtype=torch.bool, device=r.device)
        chosen[self._lowest()] = False
        return chosen.reshape(r.shape)

    def _lowest(self) -> Tensor:
        """Places in the flat table of what the ratio reuses; the last has the largest r."""
        r = self.table()
        for i in range(len(r)):
            if not self.routed(i):
                r[i] = 2.0  # never
        return r.flatten().sort(stable=True).indices[: round(self.config.ratio * r.numel())]

    def cache_use(self) -> float:
        """The share of all branch evaluations that is reused in use; steps that always compute count too."""
        return 1 - float(self.computed().double().mean())

    @torch.no_grad()
    def clamp_(self) -> Self:
        """Bring logits that an update has carried beyond +-LIMIT back."""
        for p in self.routers.values():
            p.clamp_(-LIMIT, LIMIT)
        return self

    def picture(self, cell: int = 8) -> Image:
        """The table as a picture: steps from left to right as executed, branches from top to bottom; dark r = 1, orange: reused."""
        from PIL import Image

        grey = ((1 - self.table()) * 160).round().byte().cpu().t()
        colours = torch.stack([grey, grey, grey], -1)
        colours[~self.computed().cpu().t()] = torch.tensor([255, 165, 60], dtype=torch.uint8)
        pixels = colours.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        return Image.fromarray(pixels.numpy())

    # a run

    def start(self, run: Run) -> None:
        if run.num_steps not in (1, self.config.num_inference_steps):  # a single step computes everything, whatever the table
            raise DitkitError(
                f"{run.num_steps} steps with {self.label}",
                allowed=f"num_inference_steps={self.config.num_inference_steps}, for which its table is",
                hint="train a router for the other number",
            )
        run.memory[self.label].update(computed=self.computed().tolist(), rows=None)

    def soften(self, run: Run, rows: Sequence[Tensor]) -> None:
        """Make a run that has not begun one of training: mixed by ``rows``, r (J,) of each step."""
        level = self.level()
        run.memory[self.label].update(rows=rows, computed=[(r.detach() > level).tolist() for r in rows])
        run.replan()

    def computes(self, at: At, branch: str) -> bool:
        return bool(at.memory["computed"][at.step][self.columns[at.block, branch]])

    def plan(self, at: At) -> Any:
        if at.memory["rows"] is None or at.first or not self.routed(at.step):
            return super().plan(at)
        mixed = tuple(n for n in at.branches if n not in at.fresh)
        return Mix(mixed, tuple(n for n in at.branches if n in at.fresh or self.computes(at, n)))

    def feed(self, at: At) -> dict[str, Tensor]:
        if not isinstance(at.mode, Mix):
            return {}
        row = at.memory["rows"][at.step]
        return {f"r.{n}": row[self.columns[at.block, n]] for n in at.mode.mixed}

    def reads(self, mode: Any, slot: str) -> bool:
        return slot.split(".")[0] in mode.mixed if isinstance(mode, Mix) else super().reads(mode, slot)

    def branch(self, nxt: Any, h: dict[str, Tensor], site: Site) -> dict[str, Tensor]:
        mode = site.mode
        if not isinstance(mode, Mix):
            return super().branch(nxt, h, site)
        out = nxt(h)
        if site.branch in mode.mixed:
            w, old = 1 - site.given[f"r.{site.branch}"], site.kept("out")
            out = {k: (w * old[k] + (1 - w) * u).to(u.dtype) for k, u in out.items()}
        return site.keep("out", out) if site.branch in mode.kept else out

    def finish(self, run: Run) -> dict[str, Any]:
        computed = run.memory[self.label]["computed"][: run.num_steps]
        count, total = sum(map(sum, computed)), run.num_steps * len(self.columns)
        return {"computed": count, "hits": total - count, "cache_use": 1 - count / total}

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(num_inference_steps=6, threshold=0.47)]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls(num_inference_steps=6, threshold=0.0)]


def router_of(model: Backbone) -> Router:
    """The one router attached to a view. Raises DitkitError where there is none."""
    found = [m for m in model.attached if isinstance(m, Router)]
    if len(found) != 1:
        raise DitkitError(f"{model.name} has {len(found)} routers attached", allowed="one", hint="attach harmonica or l2c")
    return found[0]
