"""Region-Adaptive Sampling (RAS, arXiv 2502.10389): at most steps only some of the picture's tokens go through the network.

A token that is left out keeps the output computed for it last, and its last keys and values, to which the others still attend:

    O_act = softmax(Q_act [K_act ; K_old]' / sqrt d) [V_act ; V_old]

Which ones are left out is chosen from the guided output v of the step before (section 3). With m the mean over a token's pixels of the
standard deviation of v over channels, and D how often the token has been left out, they are those with the largest

    log m - kappa D

At steps before ``start`` and at ``resets`` all go through. Nothing is learned.

Differs from the released code, which ``selection="released"`` restores: there the sign of kappa is +, so that what is left out stays out,
and counts are cut to whole numbers twice. Any batch, aspect ratio and backbone; each picture has a selection of its own, in its run.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.config import Config
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.seams import Attn, Site
from ditkit.core.streams import Layout, Streams

Mode = Literal["fill"] | tuple[Literal["sparse"], int]  # all tokens, or some: with ``further`` their number is known


class RASConfig(Config):
    """How many tokens go through the network, at which steps, and which."""

    sample_ratio: float = Field(0.5, gt=0, le=1, description="part of the tokens that goes through at a sparse step; 1: the base")
    start: int = Field(4, ge=1, description="the first step that may be sparse; the one before it fills the caches")
    end: int | None = Field(None, description="steps from here on are dense; None: sparse to the last")
    resets: int | tuple[int, ...] = Field(
        8,
        description="steps that are dense again, against drift; a number: every so many steps from start on, 0: none. SD3: (12, 20) of 28",
    )
    metric: Literal["std", "l2norm", "random"] = Field(
        "std", description="m, over the channels of the output: standard deviation, norm; random: the baseline that looks at nothing"
    )
    high_ratio: float = Field(
        1.0, ge=0, le=1, description="part of those left out that is taken from the largest m; the others have the smallest. SD3: 0.3"
    )
    starvation_scale: float = Field(0.1, ge=0, description="kappa: how much a token gains each time it is left out; 0: nothing")
    ramp: int = Field(0, description="tokens more that are left out in each chunk of steps than in the one before; Lumina: 256 of 4096")
    ramp_length: int = Field(4, ge=1, description="steps of a chunk")
    ramp_multiple: int = Field(64, ge=1, description="with a ramp, counts are rounded down to multiples of it")
    kv_cache: bool = Field(True, description="tokens that are left out are still seen; without, the others attend to each other alone")
    selection: Literal["intended", "released"] = Field("intended", description="released: the published code, defects included")

    @model_validator(mode="after")
    def _fits(self) -> RASConfig:
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end {self.end} is not after start {self.start}")
        if min(self.resets if isinstance(self.resets, tuple) else (self.resets,), default=0) < 0:
            raise ValueError(f"resets {self.resets}: steps are counted from 0")
        return self

    def sparse_steps(self, num_steps: int) -> frozenset[int]:
        """The steps at which only some tokens go through. Released: ``end`` itself too, with the selection of the step before."""
        if self.sample_ratio == 1:
            return frozenset()
        end = num_steps if self.end is None else min(num_steps, self.end + (self.selection == "released"))
        resets = self.resets
        if isinstance(resets, int):
            resets = tuple(range(self.start + resets, num_steps, resets)) if resets else ()
        return frozenset(range(self.start, end)) - frozenset(resets)

    def further(self, step: int, num_steps: int) -> int:
        """Tokens left out at a sparse step beyond the average: 0, or with a ramp ramp (i - i'), i the chunk, i' the one in the middle."""
        middle = (num_steps + self.start) // self.ramp_length // 2
        return self.ramp * (step // self.ramp_length - middle)

    def left_out(self, step: int, num_steps: int, tokens: int) -> tuple[int, int]:
        """How many of ``tokens`` are left out at a sparse step: of the smallest m, of the largest."""
        count = int((1 - self.sample_ratio) * tokens)
        if self.ramp:
            count = (count + self.further(step, num_steps)) // self.ramp_multiple * self.ramp_multiple
        count = max(0, min(count, tokens - 1))
        if self.selection == "released":
            return int(count * (1 - self.high_ratio)), int(count * self.high_ratio)
        high = round(count * self.high_ratio)
        return count - high, high


@registry.register("methods", "ras")
class RAS(Method):
    """Takes tokens out before the first block and puts them back after the head; blocks see fewer tokens, and all keys."""

    config_class = RASConfig
    owns = frozenset({"tokens", "kv.img"})
    breaks = frozenset({"grid", "static tokens"})
    scheduled = True

    def __init__(self, config: RASConfig | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        self.stream, self.channels = "img", 0

    def install(self, view: Backbone) -> None:
        self.stream, self.channels = view.main, view.config.in_channels
        if self.channels == 1 and self.config.metric == "std":
            raise Conflict(f"metric is std, over the single channel of {view.name}", allowed="two channels or more", hint="metric=l2norm")

    def start(self, run: Run) -> None:
        run.memory[self.label].update(steps=self.config.sparse_steps(run.num_steps), forwards=0, shares=0.0)

    # ---- the schedule ----

    def plan(self, at: At) -> Mode | None:
        """Dense steps all hand out keys and values, so that they share one graph; only the last before a sparse one matters."""
        steps = at.memory["steps"]
        if at.step in steps and not at.first:
            return "sparse", self.config.further(at.step, at.num_steps)
        return "fill" if steps and self.config.kv_cache else None

    def fresh(self, at: At) -> frozenset[str]:
        """A dense step before a sparse one computes everything: what is seen from then on, and what a reset is for."""
        steps = at.run.memory[self.label]["steps"]
        return frozenset(at.branches) if at.step not in steps and at.step + 1 in steps else frozenset()

    def reads(self, mode: Hashable, slot: str) -> bool:
        return mode != "fill"

    # ---- some tokens ----

    def trunk(self, nxt: Any, s: Streams, run: Run) -> Tensor:
        memory, whole = run.memory[self.label], s[self.stream]
        if not memory["steps"]:
            return nxt(s)
        kept = "output", run.guidance_pass, run.evaluation
        memory["layout"] = whole.layout
        if run.first or run.step not in memory["steps"]:
            part, out = whole, nxt(s)
        else:
            part = whole.take(self._active(run, len(whole.x)))
            out = part.put(memory[kept], nxt({**s, self.stream: part}))
        memory[kept], memory["width"] = out.detach(), out.shape[-1]
        memory["forwards"] += 1
        memory["shares"] += part.x.shape[1] / whole.layout.total
        return out

    def _active(self, run: Run, batch: int) -> Tensor:
        """(batch, n) the tokens chosen for this step; guidance passes in one batch share those of their picture."""
        active = run.memory[self.label].get(("active", run.evaluation))
        if active is None:
            raise DitkitError(f"no tokens were chosen for step {run.step}", hint="hand the prediction of each step to run.close")
        return active.repeat(batch // len(active), 1)

    def keys(self, call: str, layouts: dict[str, Layout], at: At) -> dict[str, Layout]:
        if self.stream not in layouts or not self.config.kv_cache:
            return layouts
        return {**layouts, self.stream: at.memory["layout"]}

    def attend(self, nxt: Any, a: Attn, site: Site) -> dict[str, Tensor]:
        if self.stream not in a.k or not self.config.kv_cache:
            return nxt(a)
        k, v = a.k[self.stream], a.v[self.stream]
        if site.mode != "fill":
            idx = site.streams[self.stream].layout.idx
            assert idx is not None
            k, v = (site.given[f"{a.name}.{n}"].scatter(2, idx[:, None, :, None].expand_as(u), u) for n, u in (("k", k), ("v", v)))
            a = a._replace(k={**a.k, self.stream: k}, v={**a.v, self.stream: v})
        site.out.update({f"{a.name}.k": k, f"{a.name}.v": v})
        return nxt(a)

    # ---- which ----

    def close(self, prediction: Tensor, run: Run) -> Tensor:
        """Choose for the next step; no value is waited for."""
        upcoming = run.step + 1
        if upcoming in run.memory[self.label]["steps"] and upcoming != self.config.end:
            self._choose(prediction.detach(), run, upcoming)
        return prediction

    def _choose(self, prediction: Tensor, run: Run, step: int) -> None:
        memory, at = run.memory[self.label], run.evaluation
        if "patches" not in memory:
            memory["patches"] = patches(run.model, prediction, memory["layout"].total, memory["width"])
        layout, where = memory["layout"], memory["patches"]
        m = self.score(prediction, where, step)
        drops = memory.setdefault(("drops", at), torch.zeros_like(m))
        padding = None if layout.valid is None else ~layout.valid[: len(m), where.tokens]
        low, high = self.config.left_out(step, run.num_steps, len(where.tokens))
        out = self.choose(m, drops, low, high, padding)
        memory["drops", at] = drops + out
        memory["active", at] = _others(out, where.tokens, layout.total, low + high)

    def score(self, prediction: Tensor, where: Patches, step: int) -> Tensor:
        """m (B, M) for the M tokens that have pixels, from the output (B, C, ...); channels beyond the data's do not count."""
        v = prediction[:, : self.channels].float().flatten(2)
        if self.config.metric == "random":
            drawn = torch.rand(len(where.tokens), generator=torch.Generator().manual_seed(step))
            return drawn.to(v.device).expand(len(v), -1)
        by_pixel = v.std(1) if self.config.metric == "std" else v.norm(dim=1)
        return by_pixel[:, where.pixels].mean(-1)

    def choose(self, m: Tensor, drops: Tensor, low: int, high: int, padding: Tensor | None = None) -> Tensor:
        """Which tokens are left out, bool (B, M): the ``high`` largest by m and, of the others, the ``low`` smallest.

        Being left out (``drops`` times) moves a token away from both ends; released: towards the upper one. Padding is left out first.
        """
        level = m.log()
        gain = self.config.starvation_scale * (drops - drops.amin(1, keepdim=True))  # the least is taken off: no digits are lost
        upper = level + gain if self.config.selection == "released" else level - gain
        lower = level + gain
        if padding is not None:
            upper, lower = upper.masked_fill(padding, torch.inf), lower.masked_fill(padding, -torch.inf)
        out = torch.zeros_like(m, dtype=torch.bool).scatter(1, upper.argsort(dim=1, descending=True, stable=True)[:, :high], True)
        return out.scatter(1, lower.masked_fill(out, torch.inf).argsort(dim=1, stable=True)[:, :low], True)

    def finish(self, run: Run) -> dict[str, Any]:
        """``token_share``: the mean part of the tokens that went through, over all steps."""
        memory = run.memory[self.label]
        share = {"token_share": memory["shares"] / memory["forwards"]} if memory["forwards"] else {}
        return {"hits": len(memory["steps"]), **share}

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(start=2, resets=(4,))]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls(sample_ratio=1.0)]


class Patches(NamedTuple):
    """Which pixels a token says something of."""

    tokens: Tensor  # (M,) the tokens that have pixels: not those between rows
    pixels: Tensor  # (M, p) where they are in the flattened picture


def patches(model: Backbone, prediction: Tensor, total: int, width: int) -> Patches:
    """Asked of the backbone: each of ``total`` output tokens of ``width`` is marked by its number, and put into a picture."""
    numbers = torch.arange(total).view(1, total, 1).expand(1, total, width)
    owner = model.unembed(numbers, torch.empty(1, *prediction.shape[1:]))[0, 0].flatten()
    tokens = owner.unique()
    if len(owner) % len(tokens):
        raise DitkitError(
            f"{len(tokens)} tokens for {len(owner)} pixels of {model.name}", allowed="the same number of pixels for each token"
        )
    pixels = owner.argsort(stable=True).view(len(tokens), -1)
    return Patches(tokens.to(prediction.device), pixels.to(prediction.device))


def _others(out: Tensor, tokens: Tensor, total: int, count: int) -> Tensor:
    """(B, total - count) the tokens, ascending, but those marked in ``out`` (B, M), of which there are ``count`` in each row."""
    marked = out.new_zeros(len(out), total).index_copy(1, tokens, out)
    return marked.to(torch.uint8).argsort(dim=1, stable=True)[:, : total - count]
