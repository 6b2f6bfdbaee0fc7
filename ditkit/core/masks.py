"""Attention masks are functions of (query layout, key layout), composed by AND and rendered once a run, outside the blocks.

So no method can lose another's mask, and no block builds one. A single window over a full grid is not made dense, see ``windows``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sparse import BLOCK, Blocks, Gathered, blocks, gather
from .streams import Layout, grid_layout
from .windows import Window

#: (query layout, key layout, query segment, key segment) -> bool (b, Nq, Nk), True where the query may look; or a window; None: everywhere
MaskFn = Callable[[Layout, Layout, str, str], "Tensor | Window | None"]
Mask = Tensor | Gathered | Blocks
Layouts = Mapping[str, Layout]


def padding(q: Layout, k: Layout, q_name: str, k_name: str) -> Tensor | None:
    """Nobody looks at padding."""
    return None if k.valid is None else k.valid[:, None, :].expand(-1, q.coords.shape[1], -1)


@dataclass(frozen=True)
class Within:
    """A mask function: the tokens of ``stream`` see each other within ``window``. Backbones and blocks may have it in ``masks``."""

    window: Window
    stream: str = "img"

    def __call__(self, q: Layout, k: Layout, q_name: str, k_name: str) -> Window | None:
        return self.window if q_name == k_name == self.stream else None


def render(functions: Sequence[MaskFn], q: Layouts, k: Layouts) -> Mask | None:
    """The AND of all functions over all segments, as what runs best: nothing, gathered tiles, blocks, or bool (b, 1, Nq, Nk)."""
    tiles: dict[tuple[str, str], list[Tensor | Window]] = {}
    for i, ql in q.items():
        for j, kl in k.items():
            if found := [m for f in functions if (m := f(ql, kl, i, j)) is not None]:
                tiles[i, j] = found
    if not tiles:
        return None
    return _windowed(tiles, q, k) or dense(tiles, q, k)


def _windowed(tiles: Mapping[tuple[str, str], Sequence[Tensor | Window]], q: Layouts, k: Layouts) -> Mask | None:
    """A single window between all tokens of one full grid, and nothing else hidden but padding of other segments; otherwise None."""
    windows = [place for place, found in tiles.items() if any(isinstance(m, Window) for m in found)]
    if len(windows) != 1 or len(tiles[windows[0]]) != 1:
        return None
    (i, j), window = windows[0], tiles[windows[0]][0]
    assert isinstance(window, Window)
    if i != j or q[i] is not k[j] or not is_full_grid(q[i]):
        return None
    seen = _seen({place: found for place, found in tiles.items() if place != (i, j)}, q, k, i)
    if seen is None:
        return None
    how, grid, device = window.how, q[i].grid, q[i].coords.device
    assert grid is not None
    window.check(len(grid))
    if how == "auto":
        worth = 2 * window.tiling(grid).keys <= q[i].total
        how = "dense" if not worth else "blocks" if device.type == "cuda" and not seen else "gathered"
    if how == "gathered":
        return gather(window, grid, i, sum(_size(u) for n, u in k.items() if n != j), device)._replace(seen=seen)
    if seen:
        return None
    queries, keys = (sum(map(_size, layouts.values())) for layouts in (q, k))
    if how == "blocks" and (device.type != "cpu" or queries % BLOCK == keys % BLOCK == 0):
        starts = [sum(_size(layouts[n]) for n in list(layouts)[: list(layouts).index(i)]) for layouts in (q, k)]
        return blocks(window, grid, starts[0], queries, starts[1], keys, device)
    return None


def _seen(tiles: Mapping[tuple[str, str], Sequence[Any]], q: Layouts, k: Layouts, grid: str) -> dict[str, Tensor] | None:
    """Segment -> which of its keys are seen (b, M), the same from every query of all segments. None: more is hidden than that."""
    seen: dict[str, Tensor] = {}
    for j in {j for _, j in tiles}:
        lines = [tiles.get((i, j), ()) for i in q]
        if j == grid or not all(found and all(m.stride(1) == 0 for m in found) for found in lines):
            return None
        first, *others = (_both([m[:, 0] for m in found]) for found in lines)
        if not all(first.is_meta or torch.equal(first, other) for other in others):
            return None
        seen[j] = first
    return seen


def dense(tiles: Mapping[tuple[str, str], Sequence[Tensor | Window]], q: Layouts, k: Layouts) -> Tensor:
    """bool (b, 1, Nq, Nk). A query that may look nowhere (padding alone) may look everywhere, so that no row is NaN."""
    made = {(i, j): _both([_tensor(m, q[i], k[j]) for m in found]) for (i, j), found in tiles.items()}
    b, device = max(t.shape[0] for t in made.values()), next(iter(made.values())).device

    def tile_of(i: str, j: str) -> Tensor:
        t = made.get((i, j))
        n, m = _size(q[i]), _size(k[j])
        return torch.ones(b, n, m, dtype=torch.bool, device=device) if t is None else t.expand(b, n, m)

    mask = torch.cat([torch.cat([tile_of(i, j) for j in k], 2) for i in q], 1)
    return (mask | ~mask.any(-1, keepdim=True))[:, None]


def _tensor(m: Tensor | Window, q: Layout, k: Layout) -> Tensor:
    if isinstance(m, Tensor):
        return m
    m.check(q.coords.shape[-1])
    return m.near(q.coords[:, :, None].unbind(-1), k.coords[:, None].unbind(-1))


def _both(parts: Sequence[Tensor]) -> Tensor:
    out = parts[0]
    for part in parts[1:]:
        out = out & part
    return out


def is_full_grid(layout: Layout) -> bool:
    """All tokens of a grid, in order, at whole coordinates from 0 (a resized stream keeps those of the grid that it came from)."""
    if layout.grid is None or layout.idx is not None or layout.total != math.prod(layout.grid):
        return False
    whole = grid_layout(layout.grid, layout.coords.device).coords
    return layout.coords is whole or (layout.coords.shape[0] == 1 and torch.equal(layout.coords, whole))


def _size(layout: Layout) -> int:
    return layout.coords.shape[1]
