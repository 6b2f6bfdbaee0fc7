"""Full grids cut into (shifted) windows and put together again, for blocks that regroup their tokens.

Where only attention is windowed, ``ditkit.core.windows.Cells`` as a mask does it without moving a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.errors import DitkitError

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """Windows of ``sides`` over ``grid``, one to three axes; the grid is padded at its upper ends to P whole windows of n tokens.

    Args:
        shift: the grid is rolled by -shift first (Swin, 2103.14030); ``mask`` then keeps apart what the roll brought together.
    """

    grid: Grid
    sides: Grid
    shift: Grid = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", self.shift or (0,) * len(self.grid))
        if not len(self.grid) == len(self.sides) == len(self.shift):
            raise DitkitError(f"windows {self.sides}, shift {self.shift}", allowed=f"{len(self.grid)} numbers each, as the grid has axes")
        if any(not 0 <= s < n for s, n in zip(self.shift, self.sides)):
            raise DitkitError(f"shift {self.shift} of windows {self.sides}", allowed="from 0, less than the window's side on each axis")

    @property
    def counts(self) -> Grid:
        """Windows along each axis."""
        return tuple(math.ceil(n / side) for n, side in zip(self.grid, self.sides))

    @property
    def padded(self) -> Grid:
        """The grid that the windows cover."""
        return tuple(count * side for count, side in zip(self.counts, self.sides))

    def partition(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B P, n, ...), the windows of one sample after each other; padding is zero."""
        rest, axes = x.shape[2:], len(self.grid)
        x = x.reshape(len(x), *self.grid, -1)
        missing = [n for a, b in zip(reversed(self.padded), reversed(self.grid)) for n in (0, a - b)]
        x = self._roll(F.pad(x, (0, 0, *missing)), -1)
        x = x.view(len(x), *(n for pair in zip(self.counts, self.sides) for n in pair), -1)
        x = x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
        return x.reshape(-1, math.prod(self.sides), *rest)

    def reverse(self, x: Tensor) -> Tensor:
        """(B P, n, ...) -> (B, N, ...): the inverse of ``partition``, without the padding."""
        rest, axes = x.shape[2:], len(self.grid)
        x = x.reshape(-1, *self.counts, *self.sides, math.prod(rest))
        x = x.permute(0, *(n for a in range(axes) for n in (1 + a, 1 + axes + a)), 1 + 2 * axes)
        x = self._roll(x.reshape(len(x), *self.padded, -1), 1)
        return x[(slice(None), *(slice(n) for n in self.grid))].reshape(len(x), math.prod(self.grid), *rest)

    def mask(self, device: torch.device | None = None) -> Tensor | None:
        """bool (P, n, n), True where a query may look: not at padding, nor over the border of a rolled grid. None: everywhere.

        Queries that are padding may look everywhere, so that no row is NaN. For B samples, repeat it B times.
        """
        if not any(self.shift) and self.padded == self.grid:
            return None
        lines = [torch.arange(n, device=device) for n in self.padded]
        places = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).reshape(1, -1, len(lines))
        places = Windows(self.padded, self.sides, self.shift).partition(places)
        wrapped, real = places < places.new_tensor(self.shift), (places < places.new_tensor(self.grid)).all(-1)
        together = (wrapped[:, :, None] == wrapped[:, None]).all(-1)
        return together & real[:, None] | ~real[:, :, None]

    def _roll(self, x: Tensor, sign: int) -> Tensor:
        return torch.roll(x, [sign * s for s in self.shift], list(range(1, 1 + len(self.grid)))) if any(self.shift) else x
