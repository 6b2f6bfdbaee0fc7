"""Attention within a window over a full grid, without an N x N array: gathered tiles, or FlexAttention's blocks."""

from __future__ import annotations

import math
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import Grid, Window

if TYPE_CHECKING:
    from .seams import Attn

BLOCK = 128  # FlexAttention's; its CPU kernel reads past the end of lengths that are no multiple of it (torch 2.13)


# ---- gathered tiles ---------------------------------------------------------------------------------------------------------


class Gathered(NamedTuple):
    """The queries of one segment in P tiles of n, each with its m keys gathered. Other segments see, and are seen, everywhere,
    but for keys that nobody sees."""

    segment: str
    queries: Tensor  # (P, n) rows of the segment; past the border: any row
    keys: Tensor  # (P, m)
    visible: Tensor | None  # bool (1, P, n, m + keys of other segments); None: all
    rows: Tensor  # (N,) where each row stands among the P n
    seen: dict[str, Tensor] = {}  # other segment -> bool (b, M), False: padding; absent: all are seen

    def of(self, keys: dict[str, Tensor]) -> Tensor | None:
        """Which of these keys (B, H, M, d) of all segments, one after the other, are seen at all: (B, M); None: all."""
        if not any(n in self.seen for n in keys):
            return None
        parts = [self.seen.get(n, u.new_ones(1, 1, dtype=torch.bool)).expand(len(u), u.shape[2]) for n, u in keys.items()]
        return torch.cat(parts, 1)


@lru_cache(maxsize=64)
def gather(window: Window, grid: Grid, segment: str, others: int, device: torch.device) -> Gathered:
    """The tiles of a window over a full grid; ``others``: keys of other segments. Cached, as its tensors are the same in every run."""
    with torch.inference_mode(False):
        sides, halo, start = window.tiling(grid)
        starts = [torch.arange(s, n, side) for s, n, side in zip(start, grid, sides)]
        q = [a[:, None] + torch.arange(side) for a, side in zip(starts, sides)]
        k = [a[:, None] + torch.arange(-r, side + r) for a, side, r in zip(starts, sides, halo)]
        queries, q_inside = _rows(q, grid)
        keys, k_inside = _rows(k, grid)
        near = window.near([u[:, None] for u in _first(q)], [u[None] for u in _first(k)])
        visible = near & k_inside[:, None] | ~q_inside[:, :, None]  # a query past the border is dropped, but must not be NaN
        rows = torch.empty(math.prod(grid), dtype=torch.int64)
        rows[queries[q_inside]] = q_inside.flatten().nonzero()[:, 0]
        mask = None if visible.all() else F.pad(visible, (0, others), value=True)[None].to(device)
        return Gathered(segment, queries.to(device), keys.to(device), mask, rows.to(device))


def _rows(places: list[Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
    """Places (P_a, n_a) on each axis -> rows of the grid (P, n), clamped to it, and whether they are inside."""
    axes = len(grid)
    spread = [
        u.view(*(len(u) if a == b else 1 for b in range(axes)), *(u.shape[1] if a == b else 1 for b in range(axes)))
        for a, u in enumerate(places)
    ]
    row: Any = 0
    for u, n in zip(spread, grid):
        row = row * n + u.clamp(0, n - 1)
    inside = reduce(torch.logical_and, [(u >= 0) & (u < n) for u, n in zip(spread, grid)])
    tiles = math.prod(len(u) for u in places)
    return row.reshape(tiles, -1), inside.reshape(tiles, -1)


def _first(places: list[Tensor]) -> list[Tensor]:
    """The coordinates (n,) of the first tile on each axis, row-major; all tiles are alike but for the border."""
    return [u.flatten() for u in torch.meshgrid(*[u[0] for u in places], indexing="ij")]


def gathered(a: Attn, g: Gathered) -> dict[str, Tensor]:
    """Attention by tiles: cost and memory are linear in the tokens of the segment."""
    q, k, v = (_tiles(u[g.segment], rows) for u, rows in ((a.q, g.queries), (a.k, g.keys), (a.v, g.keys)))
    if len(a.k) > 1:  # what is seen everywhere is seen from every tile
        k, v = (torch.cat([u, _others(o, g.segment).expand(-1, -1, u.shape[2], -1, -1)], 3) for u, o in ((k, a.k), (v, a.v)))
    out = {g.segment: _untiled(_in_tiles(q, k, v, g.visible, g.of({n: u for n, u in a.k.items() if n != g.segment})), g.rows)}
    seen = g.of(a.k)
    for n in a.q:
        if n != g.segment:
            out[n] = F.scaled_dot_product_attention(a.q[n], joined(a.k), joined(a.v), None if seen is None else seen[:, None, None])
    return {n: out[n] for n in a.q}


def _in_tiles(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, seen: Tensor | None) -> Tensor:
    """q (B, H, P, n, d), k and v (B, H, P, m, d) -> (B, H, P, n, d); ``seen`` (B, M) of the last M keys."""
    if seen is None:  # heads go to the batch, tiles to the heads: the mask is then the same for the whole batch
        out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), visible)
        return out.unflatten(0, q.shape[:2])
    mask = F.pad(seen, (k.shape[3] - seen.shape[1], 0), value=True)[:, None, None]  # (B, 1, 1, m)
    mask = mask.expand(-1, q.shape[2], -1, -1) if visible is None else mask & visible
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))  # tiles go to the batch: each sample has a mask of its own
    out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask.flatten(0, 1)[:, None])
    return out.unflatten(0, q.shape[:2]).transpose(1, 2)


def _untiled(u: Tensor, rows: Tensor) -> Tensor:
    """(B, H, P, n, d) -> (B, H, N, d)."""
    return u.flatten(2, 3).index_select(2, rows)


def joined(segments: dict[str, Tensor]) -> Tensor:
    """(B, H, N, d) of all segments, one after the other."""
    return next(iter(segments.values())) if len(segments) == 1 else torch.cat(list(segments.values()), 2)


def _tiles(u: Tensor, rows: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, H, P, n, d)."""
    return u.index_select(2, rows.flatten()).unflatten(2, rows.shape)


def _others(segments: dict[str, Tensor], segment: str) -> Tensor:
    """(B, H, 1, M, d): the keys of all segments but one."""
    return joined({n: u for n, u in segments.items() if n != segment})[:, :, None]


# ---- FlexAttention ----------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """A BlockMask over all segments. ``dense``: the same as a tensor, on the CPU only: for gradients, and outside the compiler.

    ``orders``: which query and which key stands at each place of the mask, and at which place each query; None: all stand in order.
    """

    mask: Any
    dense: Tensor | None
    orders: tuple[Tensor, Tensor, Tensor] | None = None


@lru_cache(maxsize=64)
def blocks(window: Window, grid: Grid, q_start: int, queries: int, k_start: int, keys: int, device: torch.device) -> Blocks:
    """The mask in blocks of 128 x 128; the grid's tokens stand at ``q_start`` among the queries and ``k_start`` among the keys.

    A block is 128 tokens in a row, or a compact tile of them, whichever leaves fewer blocks to compute: a ball of radius 8 on
    128 x 128 tokens reaches 15 rows, but 9 tiles of 8 x 16. Made row of blocks by row of blocks, so that memory is linear; cached, as
    graphs are guarded on its function.
    """
    with torch.inference_mode(False):
        rows = torch.arange(math.prod(grid), device=device)
        in_rows = _block_mask(window, grid, rows, q_start, queries, k_start, keys)
        tiled = tile_order(grid, device)
        in_tiles = _block_mask(window, grid, tiled, q_start, queries, k_start, keys)
        dense = None
        if device.type == "cpu":
            i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
            dense = in_rows.mask_mod(None, None, i, j)
        if _count(in_rows) <= _count(in_tiles):
            return Blocks(in_rows, dense)
        q, k = (_moved(tiled, start, count) for start, count in ((q_start, queries), (k_start, keys)))
        return Blocks(in_tiles, dense, (q, k, q.argsort()))


def tile_order(grid: Grid, device: torch.device) -> Tensor:
    """(N,) the rows of a grid, tile by tile; a tile is of 128 tokens, about equally long on all axes. At the border tiles are cut."""
    sides = [1] * len(grid)
    while math.prod(sides) < BLOCK:
        axis = min(reversed(range(len(grid))), key=lambda a: (sides[a] >= grid[a], sides[a]))
        sides[axis] *= 2
    rows = torch.arange(math.prod(grid), device=device)
    key: Any = 0
    for coordinate, n, side in zip(_coordinates(rows, grid), grid, sides):
        key = key * -(-n // side) + coordinate // side
    return key.argsort(stable=True)


def _coordinates(rows: Tensor, grid: Grid) -> list[Tensor]:
    return [rows // math.prod(grid[a + 1 :]) % n for a, n in enumerate(grid)]


def _moved(order: Tensor, start: int, count: int) -> Tensor:
    """(count,) all tokens in order, but for those of the grid from ``start`` on."""
    moved = torch.arange(count, device=order.device)
    moved[start : start + len(order)] = order + start
    return moved


def _block_mask(window: Window, grid: Grid, order: Tensor, q_start: int, queries: int, k_start: int, keys: int) -> Any:
    """The BlockMask where the grid's tokens stand in this order."""
    from torch.nn.attention.flex_attention import BlockMask

    total, device = len(order), order.device
    places = _coordinates(order, grid)

    def visible(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
        i, j = i - q_start, j - k_start
        free = (i < 0) | (i >= total) | (j < 0) | (j >= total)
        at, to = i.clamp(0, total - 1), j.clamp(0, total - 1)
        return free | window.near([c[at] for c in places], [c[to] for c in places])

    j = torch.arange(keys, device=device)[None]
    lines = []
    for first in range(0, queries, BLOCK):
        i = torch.arange(first, min(first + BLOCK, queries), device=device)[:, None]
        line = visible(None, None, i, j)
        cut = F.pad(line, (0, -keys % BLOCK, 0, BLOCK - len(line))).view(BLOCK, -1, BLOCK)
        lines.append(torch.stack([cut.any(2).any(0), cut.all(2).all(0)]))
    some, full = torch.stack(lines, 1)
    (n, which), (n_full, which_full) = _ordered(some & ~full), _ordered(full)
    return BlockMask.from_kv_blocks(n, which, n_full, which_full, BLOCK, mask_mod=visible, seq_lengths=(queries, keys))


def _count(mask: Any) -> int:
    """Blocks that are computed."""
    return int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())


def _ordered(part: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are marked, and which: these first."""
    order = torch.argsort(part.int(), dim=1, descending=True, stable=True)
    return part.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Blocks) -> Tensor:
    """FlexAttention, compiled in any case."""
    compiling = torch.compiler.is_compiling()
    if mask.dense is not None and (q.requires_grad or not compiling):
        return F.scaled_dot_product_attention(q, k, v, mask.dense)
    width, scale = q.shape[-1], q.shape[-1] ** -0.5
    q, k, v = (F.pad(u, (0, max(0, 16 - width))) for u in (q, k, v))  # its least head width
    from torch.nn.attention.flex_attention import flex_attention

    call: Any = flex_attention if compiling else _compiled()
    if mask.orders is None:
        return call(q, k, v, block_mask=mask.mask, scale=scale)[..., :width]
    queries, keys, back = mask.orders
    q, k, v = q.index_select(2, queries), k.index_select(2, keys), v.index_select(2, keys)
    return call(q, k, v, block_mask=mask.mask, scale=scale)[..., :width].index_select(2, back)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
