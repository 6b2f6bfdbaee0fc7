"""Token streams: one token sequence, with everything that travels with its tokens.

A backbone's state between blocks is a dict of named streams (``img``, ``text``, ...). B batch, N tokens, D width,
A position axes; ``b`` is B or 1.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, ...]


class Layout(NamedTuple):
    """Where the tokens of a stream stand, and what they are.

    ``grid`` is None once the tokens are no full row-major grid; ``idx`` says which rows of the whole stream these are
    (None: all ``total`` of them).
    """

    coords: Tensor  # (b, N, A) coordinates on the full grid
    total: int  # tokens of the whole stream
    grid: tuple[int, ...] | None = None  # (H, W), (T, H, W), ...
    idx: Tensor | None = None  # (B, N) rows of the whole stream
    role: Tensor | None = None  # (b, N) integers; None: all 0
    segment: Tensor | None = None  # (b, N) sample, frame or clip number; None: all 0
    known: Tensor | None = None  # (b, N) bool, True: given, not to be made; None: none is
    valid: Tensor | None = None  # (b, N) bool, False: padding; None: no padding
    length: Tensor | None = None  # (b,) tokens of the whole stream that are no padding, where only some of the rows are here

    def take(self, idx: Tensor) -> Layout:
        """The rows ``idx`` (B, n) of this layout."""
        whole = idx if self.idx is None else rows(self.idx, idx)
        role, segment, known, valid = (None if u is None else rows(u, idx) for u in (self.role, self.segment, self.known, self.valid))
        length = self.valid.sum(1) if self.length is None and self.valid is not None else self.length
        return Layout(rows(self.coords, idx), self.total, None, whole, role, segment, known, valid, length)


class Stream(NamedTuple):
    """One token sequence and all that travels with its tokens."""

    x: Tensor  # (B, N, D) tokens
    layout: Layout
    c: Tensor | None = None  # (B, 1 | N, E) conditioning; N: one per token (tokens with their own time)
    rope: tuple[Tensor, Tensor] | None = None  # cos, sin, each (b, N, head width)

    def take(self, idx: Tensor) -> Stream:
        """Only the tokens ``idx`` (B, n); coordinates, conditioning and position tables follow."""
        rope = self.rope and (rows(self.rope[0], idx), rows(self.rope[1], idx))
        c = self.c if self.c is None or self.c.shape[1] == 1 else rows(self.c, idx)
        return Stream(rows(self.x, idx), self.layout.take(idx), c, rope)

    def put(self, whole: Tensor, part: Tensor | None = None) -> Tensor:
        """``whole`` (B, total, ...) with the rows of this stream replaced by ``part`` (default: its tokens)."""
        return put_rows(whole, self.x if part is None else part, self.layout.idx)

    def resize(self, grid: Grid, how: str) -> Stream:
        """The stream on another grid: ``how`` is "mean" (adaptive average pooling) or "nearest".

        Rotary tables are those of the place where a pooled token stands, the middle of its cell: the mean of turns is none.
        """
        old, grid = self.layout.grid, tuple(grid)
        if old is None or len(old) > 3:
            raise ValueError("only a full grid of one to three axes can be resized")
        if grid == old:
            return self
        c = self.c if self.c is None or self.c.shape[1] == 1 else _resized(self.c, old, grid, how)
        rope = self.rope and (_between if how == "mean" else _copied)(self.rope, old, grid)
        return Stream(_resized(self.x, old, grid, how), _resized_layout(self.layout.coords, old, grid, how), c, rope)


Streams = dict[str, Stream]


def concatenate(*streams: Stream) -> Stream:
    """One stream after the other along the tokens; what only some of them have is filled in with its meaning of None."""
    batch = max(len(s.x) for s in streams)

    def cat(parts: list[Tensor | None], fill: float) -> Tensor | None:
        if all(p is None for p in parts):
            return None
        some = next(p for p in parts if p is not None)
        whole = [some.new_full((1, s.x.shape[1], *some.shape[2:]), fill) if p is None else p for s, p in zip(streams, parts)]
        return torch.cat([w.expand(batch, *w.shape[1:]) for w in whole], 1)

    axes = max(s.layout.coords.shape[-1] for s in streams)
    coords = cat([F.pad(s.layout.coords, (0, axes - s.layout.coords.shape[-1])) for s in streams], 0)
    names = ("role", "segment", "known", "valid")
    fields = {n: cat([getattr(s.layout, n) for s in streams], n == "valid") for n in names}
    starts = [sum(s.layout.total for s in streams[:i]) for i in range(len(streams))]
    idx = None
    if any(s.layout.idx is not None for s in streams):
        every = [torch.arange(s.x.shape[1], device=s.x.device)[None] if s.layout.idx is None else s.layout.idx for s in streams]
        idx = torch.cat([i.expand(batch, -1) + start for i, start in zip(every, starts)], 1)
    assert coords is not None
    layout = Layout(coords, sum(s.layout.total for s in streams), None, idx, **fields)
    c = cat([None if s.c is None else s.c.expand(-1, s.x.shape[1], -1) for s in streams], 0)
    x = torch.cat([s.x.expand(batch, -1, -1) for s in streams], 1)
    ropes = [s.rope for s in streams]
    rope = None
    if any(r is not None for r in ropes):
        cos, sin = cat([r and r[0] for r in ropes], 1), cat([r and r[1] for r in ropes], 0)
        assert cos is not None
        assert sin is not None
        rope = (cos, sin)
    return Stream(x, layout, c, rope)


def _resized(u: Tensor, old: Grid, grid: Grid, how: str) -> Tensor:
    """u (b, N, D) of the grid ``old`` -> of ``grid``."""
    pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(old) - 1]
    maps = u.transpose(1, 2).unflatten(2, old)
    maps = pool(maps, grid) if how == "mean" else F.interpolate(maps, grid, mode="nearest")
    return maps.flatten(2).transpose(1, 2).contiguous()


@lru_cache(maxsize=64)
def _resized_layout(coords: Tensor, old: Grid, grid: Grid, how: str) -> Layout:
    """Cached: one object for one layout, so that masks rendered for it are kept (tensors are equal to themselves alone, as keys)."""
    with torch.inference_mode(False):
        return Layout(_resized(coords, old, grid, how), torch.Size(grid).numel(), grid)


def _copied(rope: tuple[Tensor, Tensor], old: Grid, grid: Grid) -> tuple[Tensor, Tensor]:
    return _resized(rope[0], old, grid, "nearest"), _resized(rope[1], old, grid, "nearest")


def _between(rope: tuple[Tensor, Tensor], old: Grid, grid: Grid) -> tuple[Tensor, Tensor]:
    """Rotary tables of the cells of adaptive pooling. A middle lies on a token or half-way between two, whose mean points there."""
    corners = []
    for high in product((0, 1), repeat=len(old)):
        flat = torch.zeros((1,) * len(old), dtype=torch.long)
        for axis, (n, m, up) in enumerate(zip(old, grid, high)):
            i = torch.arange(m)
            twice = i * n // m - (-(i + 1) * n // m) - 1  # first + last token of the cell
            flat = flat * n + ((twice + up) // 2).view([-1 if a == axis else 1 for a in range(len(old))])
        corners.append(flat.flatten().to(rope[0].device))
    cos, sin = (torch.stack([u[:, at] for at in corners]).mean(0) for u in rope)
    length = torch.hypot(cos, sin)
    return cos / length, sin / length


def rows(u: Tensor, idx: Tensor) -> Tensor:
    """Rows ``idx`` (B, n) of ``u`` (b, N, ...) along dim 1."""
    index = idx.view(*idx.shape, *[1] * (u.dim() - 2)).expand(-1, -1, *u.shape[2:])
    return u.expand(len(idx), *u.shape[1:]).gather(1, index)


def put_rows(whole: Tensor, part: Tensor, idx: Tensor | None) -> Tensor:
    """``whole`` (B, N, ...) with its rows ``idx`` (B, n) replaced by ``part``; ``part`` itself where idx is None."""
    if idx is None:
        return part
    return whole.scatter(1, idx.view(*idx.shape, *[1] * (part.dim() - 2)).expand_as(part), part)


@lru_cache(maxsize=64)
def grid_layout(grid: tuple[int, ...], device: torch.device | None = None) -> Layout:
    """The layout of a full row-major grid. Cached: equal grids share one object, and so its masks and tables."""
    with torch.inference_mode(False):
        axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float32, device=device) for n in grid], indexing="ij")
        return Layout(torch.stack(axes, -1).reshape(1, -1, len(grid)), axes[0].numel(), tuple(grid))
