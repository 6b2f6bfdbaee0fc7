"""Attention masks are functions of (query layout, key layout), composed by AND and rendered once a forward, outside the blocks.

So no method can lose another's mask, and no block builds one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .streams import Layout

#: (query layout, key layout, query segment, key segment) -> bool (b, Nq, Nk), True where the query may look; None: everywhere
MaskFn = Callable[[Layout, Layout, str, str], Tensor | None]


def padding(q: Layout, k: Layout, q_name: str, k_name: str) -> Tensor | None:
    """Nobody looks at padding."""
    return None if k.valid is None else k.valid[:, None, :].expand(-1, q.coords.shape[1], -1)


def render(functions: Sequence[MaskFn], q: dict[str, Layout], k: dict[str, Layout]) -> Tensor | None:
    """The AND of all functions over all segments: None where nothing is hidden, else bool (b, 1, Nq, Nk).

    A query that may look nowhere (padding alone) may look everywhere, so that no row is NaN.
    """
    tiles: dict[tuple[str, str], Tensor] = {}
    for i, ql in q.items():
        for j, kl in k.items():
            for f in functions:
                tile = f(ql, kl, i, j)
                if tile is not None:
                    tiles[i, j] = tiles[i, j] & tile if (i, j) in tiles else tile
    if not tiles:
        return None
    b, device = max(t.shape[0] for t in tiles.values()), next(iter(tiles.values())).device

    def tile_of(i: str, j: str) -> Tensor:
        n, m = q[i].coords.shape[1], k[j].coords.shape[1]
        t = tiles.get((i, j))
        return torch.ones(b, n, m, dtype=torch.bool, device=device) if t is None else t.expand(b, n, m)

    mask = torch.cat([torch.cat([tile_of(i, j) for j in k], 2) for i in q], 1)
    return (mask | ~mask.any(-1, keepdim=True))[:, None]
