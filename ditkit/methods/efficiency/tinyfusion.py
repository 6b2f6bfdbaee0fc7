"""TinyFusion (arXiv 2412.01199): learn which blocks of a network to keep, as those from which it recovers best, then cut the others out.

The blocks are split into groups of M, of which N stay. Each group has one number theta for each of its C(M, N) patterns; in training every
sample draws a pattern by Gumbel-softmax, hard forward and soft backward (section 3.2), while a LoRA beside it stands for the fine-tuning
that will follow (section 3.3). ``decide`` reads the most probable patterns, ``prune`` makes the plain, shallower network.

Differs from the released code: the noise is handed in, not drawn inside, and without noise the most probable patterns act, so that the
same weights always give the same pictures; groups are repeated to fill the depth; the tables of patterns move with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.config import Config
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.streams import Streams
from ditkit.methods.pruning import base_of, shorten

MAX_OPTIONS = 100_000

#: The groups of the paper's models, [N, M] from the first block on. D7 is cut from D14, the others from 28 blocks. The paper's table names
#: 1:2 for D19, which cannot give 19 blocks: these groups follow from the layers that its distillation compares.
FAMILY: dict[str, tuple[tuple[int, int], ...]] = {
    "TinyDiT-D14": ((1, 2),) * 14,
    "TinyDiT-D19": ((3, 4), (3, 4), (2, 4), (3, 4), (2, 4), (3, 4), (3, 4)),
    "TinyDiT-D7": ((1, 2),) * 7,
}


class TinyFusionConfig(Config):
    """Which patterns are searched."""

    groups: tuple[tuple[int, int], ...] = Field(
        ((1, 2),), min_length=1, description="[N, M] of each group of blocks: N of M stay; repeated until all blocks are in one"
    )
    scaling: float = Field(
        100.0, gt=0, description="logits are scaling times theta; with weights of another learning rate k times it, use k scaling, init / k"
    )
    init: float = Field(0.02, description="theta at the start: all patterns are equally probable")

    @field_validator("groups")
    @classmethod
    def _are_patterns(cls, groups: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        for n, m in groups:
            if not 1 <= n <= m:
                raise ValueError(f"[{n}, {m}] is no group: N of M blocks stay, 1 <= N <= M")
            if comb(m, n) > MAX_OPTIONS:
                raise ValueError(f"[{n}, {m}] has {comb(m, n)} patterns, at most {MAX_OPTIONS} are allowed: use smaller groups")
        return groups


@dataclass(frozen=True)
class Decision:
    """What a search found.

    Attributes:
        keep: the blocks that stay, in order.
        choices: the chosen pattern of each group, the first of equals.
        confidence: its probability without noise, of each group.
    """

    keep: tuple[int, ...]
    choices: tuple[int, ...]
    confidence: tuple[float, ...]


@registry.register("methods", "tinyfusion")
class TinyFusion(Method):
    """One gate a block and sample: x <- m block(x) + (1 - m) x with m in {0, 1}. Every block is computed; ``prune`` saves the time.

    Parameters ``gates.G`` (C,), one for each group. A dropped sample gives the weights of its block exactly no gradient, and the gate one.
    """

    config_class = TinyFusionConfig
    stage = "structure"
    owns = frozenset({"depth"})
    groups: tuple[tuple[int, int], ...]  # of this model, once attached
    place: list[tuple[int, int]]  # block -> its group, and its number there

    def install(self, view: Backbone) -> None:
        if view.skips:
            raise Conflict(f"{view.name} has long skips: the blocks at their ends cannot be left out", hint="a backbone without them")
        groups = fill_groups(self.config.groups, len(view.blocks))
        if hasattr(self, "gates"):
            if groups != self.groups:
                raise Conflict(f"{self.label} was made for {len(self.place)} blocks, not {len(view.blocks)}", hint="make another one")
            return
        self.groups = groups
        self.place = [(g, j) for g, (_, m) in enumerate(groups) for j in range(m)]
        like = next(p for p in view.parameters() if p.is_floating_point())
        self.gates = nn.ParameterList(nn.Parameter(torch.full((comb(m, n),), self.config.init, device=like.device)) for n, m in groups)
        for g, (n, m) in enumerate(groups):
            self.register_buffer(f"options_{g}", options(n, m).to(like.device, copy=True), persistent=False)

    @property
    def num_options(self) -> int:
        """Patterns of all groups together: how many random numbers a sample needs."""
        return sum(len(theta) for theta in self.gates)

    def sample(self, run: Run, gumbel: Tensor, tau: float) -> None:
        """Patterns are drawn in this run: ``gumbel`` (B, num_options) Gumbel(0, 1) noise, one row a sample; ``tau`` the temperature."""
        if gumbel.dim() != 2 or gumbel.shape[1] != self.num_options or tau <= 0:
            raise DitkitError(f"noise {tuple(gumbel.shape)} at temperature {tau}", allowed=f"(B, {self.num_options}), above 0")
        parts = gumbel.split([len(theta) for theta in self.gates], 1)
        run.memory[self.label].update(noise=parts, tau=tau)

    def masks(self, group: int, memory: dict[Any, Any]) -> Tensor:
        """(B, M) in {0, 1}, (1, M) without noise: which blocks of the group stay; the gradient is that of the soft choice."""
        logits = self.config.scaling * self.gates[group].float()
        noise = memory["noise"][group] if "noise" in memory else torch.zeros_like(logits)[None]
        chosen = gumbel_softmax(logits, noise, memory.get("tau", 1.0))
        table: Tensor = getattr(self, f"options_{group}")
        return chosen @ table

    def block(self, nxt: Any, s: Streams, at: At, **kw: Any) -> Streams:
        group, number = self.place[at.block]
        out: Streams = nxt(s, **kw)
        m = self.masks(group, at.memory)[:, number, None, None]
        if len(m) not in (1, len(out[at.run.model.main].x)):
            raise DitkitError(f"noise for {len(m)} samples, a batch of {len(out[at.run.model.main].x)}", allowed="one row a sample")
        return {n: st._replace(x=_mix(m.to(st.x.dtype), st.x, s[n].x)) for n, st in out.items()}

    @torch.no_grad()
    def decide(self) -> Decision:
        """The most probable pattern of each group."""
        choices, confidence, keep = [], [], []
        start = 0
        for g, theta in enumerate(self.gates):
            p = (self.config.scaling * theta.float()).softmax(0)
            best = int((theta == theta.max()).nonzero()[0])  # of equals the first, on every device
            table: Tensor = getattr(self, f"options_{g}")
            keep += [start + j for j in table[best].nonzero()[:, 0].tolist()]
            choices.append(best)
            confidence.append(float(p[best]))
            start += table.shape[1]
        return Decision(tuple(keep), tuple(choices), tuple(confidence))

    @torch.no_grad()
    def entropy(self) -> float:
        """Of the distribution over patterns in nats, mean over the groups; it falls as a search decides."""
        each = [torch.special.entr((self.config.scaling * theta.float()).softmax(0)).sum() for theta in self.gates]
        return float(torch.stack(each).mean())

    def finish(self, run: Run) -> dict[str, Any]:
        return {"keep": list(self.decide().keep), "blocks": len(self.place)}

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls()]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls(groups=((1, 1),))]


def _mix(m: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """m new + (1 - m) old: exactly one of the two where m is 0 or 1."""
    return m * new + (1 - m) * old


@lru_cache(maxsize=64)
def options(n: int, m: int) -> Tensor:
    """(C(m, n), m): the patterns with n ones of m, in lexicographic order of the places of the ones."""
    table = torch.zeros(comb(m, n), m)
    for row, places in zip(table, combinations(range(m), n)):
        row[list(places)] = 1
    return table


def fill_groups(groups: tuple[tuple[int, int], ...], depth: int) -> tuple[tuple[int, int], ...]:
    """The groups, repeated until they hold ``depth`` blocks. Raises Conflict if they cannot."""
    size = sum(m for _, m in groups)
    if depth % size:
        raise Conflict(f"groups {[list(g) for g in groups]} hold {size} blocks", allowed=f"a divisor of the depth, {depth}")
    return groups * (depth // size)


def gumbel_softmax(logits: Tensor, gumbel: Tensor, tau: float) -> Tensor:
    """One-hot rows of the largest logits (C,) + gumbel (B, C), with the gradient of softmax((logits + gumbel) / tau) (1611.01144)."""
    soft = ((logits + gumbel) / tau).softmax(-1)
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())


def gumbel_noise(u: Tensor) -> Tensor:
    """Gumbel(0, 1) numbers from uniform numbers u in [0, 1) that are multiples of 2^-24."""
    return -(-(u + 2.0**-25).log()).log()


def prune(view: Backbone) -> Backbone:
    """The plain network of the blocks that the search decided to keep, with the weights of the view's base; LoRA and gates are dropped.

    Raises:
        DitkitError: no TinyFusion is attached.
        Conflict: the base has methods of its own (int8), or the blocks cannot stand in other places.
    """
    return shorten(base_of(view), find(view).decide().keep)


def find(view: Backbone) -> TinyFusion:
    """The TinyFusion of a view. Raises DitkitError where there is none."""
    found = [m for m in view.attached if isinstance(m, TinyFusion)]
    if not found:
        raise DitkitError(
            "no tinyfusion is attached", allowed=f"attached: {sorted(view.methods)}", hint="with_methods(model, TinyFusion())"
        )
    return found[0]
