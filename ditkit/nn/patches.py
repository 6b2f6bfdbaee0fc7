"""Patches of pictures, clips, volumes and sequences: data (B, C, ...) <-> tokens (B, N, P), and the embedding of patches.

A token's P = C * patch numbers lie in one of two orders: "channels first" (C, pt, ph, pw), a convolution's weight; "channels last"
(pt, ph, pw, C). Embeddings and FLUX's and CogVideoX's outputs have the first, the outputs of DiT, SD3, PixArt and Wan the second.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from ditkit.core.errors import DitkitError

Order = Literal["channels first", "channels last"]
Grid = tuple[int, ...]
NAMES = {1: ("length",), 2: ("height", "width"), 3: ("frames", "height", "width")}


def patchify(x: Tensor, patch: int | Grid, order: Order = "channels first") -> Tensor:
    """(B, C, *sides) -> (B, N, C * patch): tokens row-major over the grid of patches. One to three axes.

    Args:
        patch: one side for all axes, or one for each: (pt, ph, pw).
    """
    sides = x.shape[2:]
    axes, patch = len(sides), per_axis(patch, x.dim() - 2)
    split = [n for side, p in zip(sides, patch) for n in (side // p, p)]
    grid, inner = [2 + 2 * a for a in range(axes)], [3 + 2 * a for a in range(axes)]
    token = [1, *inner] if _first(order) else [*inner, 1]
    x = x.view(*x.shape[:2], *split).permute(0, *grid, *token)
    return x.reshape(len(x), math.prod(x.shape[1 : 1 + axes]), -1)


def unpatchify(tokens: Tensor, grid: Grid, patch: int | Grid, order: Order = "channels last") -> Tensor:
    """(B, N, patch * C) -> (B, C, *sides), the inverse of ``patchify`` in the same order. The default is the order of DiT's output."""
    axes, patch = len(grid), per_axis(patch, len(grid))
    token = (-1, *patch) if _first(order) else (*patch, -1)
    x = tokens.view(len(tokens), *grid, *token)
    channel, inner = (1 + axes, 2 + axes) if _first(order) else (1 + 2 * axes, 1 + axes)
    x = x.permute(0, channel, *[n for a in range(axes) for n in (1 + a, inner + a)])
    return x.reshape(*x.shape[:2], *[g * p for g, p in zip(grid, patch)])


class PatchEmbed(nn.Linear):
    """A strided convolution of one to three axes, written as a linear layer over patches: (B, C, *sides) -> (B, N, D), contiguous.

    Args:
        patch: the side of a patch, the same on all ``axes``, or one for each axis: (pt, ph, pw).
        order: of the numbers in a patch; "channels first" is a convolution's weight, flattened.
        names: of the axes, for messages.
    """

    def __init__(
        self, in_channels: int, patch: int | Grid, dim: int, axes: int = 2, order: Order = "channels first", names: tuple[str, ...] = ()
    ) -> None:
        axes = axes if isinstance(patch, int) else len(patch)
        sides = per_axis(patch, axes)
        super().__init__(in_channels * math.prod(sides), dim)
        self.patch, self.order, self.names = sides, order, names or NAMES[axes]

    def grid(self, x: Tensor) -> Grid:
        """The token grid of x; raises DitkitError if a side is no multiple of the patch."""
        for side, p, name in zip(x.shape[2:], self.patch, self.names, strict=True):
            if side % p or side == 0:
                low = side // p * p
                raise DitkitError(f"{name} is {side}", allowed=f"multiples of {p}", hint=f"use {low or p} or {low + p}")
        return tuple(side // p for side, p in zip(x.shape[2:], self.patch))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(patchify(x, self.patch, self.order))


def per_axis(value: int | Grid, axes: int) -> Grid:
    """One number for each of ``axes`` axes. Raises DitkitError if there are not as many."""
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or min(values, default=0) < 1:
        raise DitkitError(f"{value} for {axes} axes", allowed=f"a number, or {axes} of them, from 1")
    return values


def _first(order: Order) -> bool:
    if order not in ("channels first", "channels last"):
        raise DitkitError(f"order is {order!r}", allowed="'channels first' or 'channels last'")
    return order == "channels first"
