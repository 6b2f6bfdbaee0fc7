"""CLEAR over several processes, without approximation (arXiv 2412.16112, section 3.4): each has a strip of rows, and all of the text.

An image token needs keys of ceil(r) - 1 further rows on either side: neighbours exchange these, 2 (ceil(r) - 1) W 2 D numbers a layer. Text
needs all keys: each process attends to its strip (the first one to the text as well), and the parts are merged by their normalisers,

    O = sum_g e^(lse_g - lse) O_g,   lse = log sum_g e^lse_g

where the paper takes the mean of the O_g, which is only near it. Inference alone: nothing is sent backwards.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ditkit.core.backbone import Backbone, run_blocks
from ditkit.core.config import Config
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.masks import Within, render
from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.core.seams import Attn, Site, sdpa
from ditkit.core.streams import Layout, Stream, Streams, grid_layout
from ditkit.core.windows import Ball, How


class StripsConfig(Config):
    """The window."""

    radius: float = Field(8.0, gt=0, description="in tokens, strict, as CLEAR's")
    how: How = Field("auto", description="how a strip's window is computed")


class Place(NamedTuple):
    """Which of how many processes this is."""

    rank: int
    world: int


class Strips(Method):
    """Attach it instead of CLEAR, in every process of an initialised group, to the same weights; call it with the same inputs."""

    name, config_class, stage = "strips", StripsConfig, "attention"
    owns = frozenset({"window", "tokens", "kv.img"})
    needs = breaks = frozenset({"grid"})

    @property
    def reach(self) -> int:
        """Rows that are needed from either side."""
        return math.ceil(self.config.radius) - 1

    def install(self, view: Backbone) -> None:
        if not dist.is_initialized():
            raise Conflict("there is no process group", hint='torchrun, and torch.distributed.init_process_group("gloo")')
        self.stream = view.main

    def start(self, run: Run) -> None:
        if run.model._call is not run_blocks:
            raise DitkitError("the exchange between processes cannot be compiled", hint="attach strips to a view that is not compiled")

    def trunk(self, nxt: Any, s: Streams, run: Run) -> Tensor:
        part = nxt({**s, self.stream: self.strip(s[self.stream])}).contiguous()
        parts = [torch.empty_like(part) for _ in range(place().world)]
        dist.all_gather(parts, part)
        return torch.cat(parts, 1)

    def strip(self, img: Stream) -> Stream:
        """The rows of this process, as a grid of their own that keeps its coordinates. Raises DitkitError for strips that are too thin."""
        (rank, world), grid = place(), img.layout.grid
        if grid is None or len(grid) != 2 or grid[0] % world or grid[0] // world < self.reach:
            allowed = f"rows that {world} processes share equally, {self.reach} or more each"
            raise DitkitError(f"a grid of {grid}", allowed=allowed, hint="fewer processes, or a smaller radius")
        n = img.layout.total // world
        idx = torch.arange(rank * n, (rank + 1) * n, device=img.x.device).expand(len(img.x), -1)
        layout = Layout(img.layout.coords[:, idx[0]], n, (grid[0] // world, grid[1]))
        return img.take(idx)._replace(layout=layout)

    def attend(self, nxt: Any, a: Attn, site: Site) -> dict[str, Tensor]:
        main = self.stream
        if main not in a.k:
            return nxt(a)
        if a.mask is not None or any(u.requires_grad for u in a.q.values()):
            raise DitkitError("hidden keys, or gradients", allowed="text without a mask, inference under no_grad")
        out = {n: everywhere(a.q[n], a, main) for n in a.q if n != main}
        if main in a.q:
            out[main] = self.near(a)
        return {n: out[n] for n in a.q}

    def near(self, a: Attn) -> Tensor:
        """The strip's queries; its window over strip and halo is computed as over a grid, whose outer rows are asked nothing."""
        main, (rank, world) = self.stream, place()
        rows, width = a.q_layout[main].grid  # type: ignore[misc]
        k, v = with_halo(torch.stack([a.k[main], a.v[main]]), self.reach * width)
        top, bottom = (self.reach * (width if there else 0) for there in (rank > 0, rank < world - 1))
        layout = grid_layout((rows + (top + bottom) // width, width), k.device)
        layouts = {**a.k_layout, main: layout}
        mask = render([Within(Ball(radius=self.config.radius, how=self.config.how), main)], {main: layout}, layouts)
        q = {main: F.pad(a.q[main], (0, 0, top, bottom))}
        whole = sdpa(Attn(a.name, q, {**a.k, main: k}, {**a.v, main: v}, {main: layout}, layouts, mask))[main]
        return whole[:, :, top : top + rows * width]


def place() -> Place:
    """Of this process."""
    return Place(dist.get_rank(), dist.get_world_size())


def with_halo(kv: Tensor, tokens: int) -> Tensor:
    """(..., n, d) -> with the last ``tokens`` of the process before, and the first of the one after, where there are such."""
    rank, world = place()
    if not tokens:
        return kv
    mine = {rank - 1: kv[..., :tokens, :].contiguous(), rank + 1: kv[..., -tokens:, :].contiguous()}
    theirs = {peer: torch.empty_like(u) for peer, u in mine.items() if 0 <= peer < world}
    calls = [dist.P2POp(call, u[peer], peer) for peer in theirs for call, u in ((dist.isend, mine), (dist.irecv, theirs))]
    for work in dist.batch_isend_irecv(calls) if calls else ():
        work.wait()
    return torch.cat([u for u in (theirs.get(rank - 1), kv, theirs.get(rank + 1)) if u is not None], -2)


def everywhere(q: Tensor, a: Attn, main: str) -> Tensor:
    """Queries (B, H, T, d) that every process has, over all keys: of the strips, and once over those that every process has."""
    names = [n for n in a.k if n == main or place().rank == 0]
    k, v = (torch.cat([u[n] for n in names], 2).repeat_interleave(q.shape[1] // u[main].shape[1], 1) for u in (a.k, a.v))
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    own = scores.logsumexp(-1)
    each = [torch.empty_like(own) for _ in range(place().world)]
    dist.all_gather(each, own.contiguous())
    out = (scores - torch.stack(each).logsumexp(0)[..., None]).exp() @ v.float()
    dist.all_reduce(out)
    return out.to(q.dtype)
