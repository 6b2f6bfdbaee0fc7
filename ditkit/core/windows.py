"""Windows: which keys a query sees, said by shape. A mask function may return one of these instead of a tensor; over a full grid it is
then computed in gathered tiles or in FlexAttention's blocks (``sparse``) rather than as a dense mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import DitkitError

Grid = tuple[int, ...]
How = Literal["auto", "dense", "gathered", "blocks"]


class Tiling(NamedTuple):
    """Along each axis: the side of a tile of queries, how many more keys it sees on either side, where the first tile starts (<= 0)."""

    sides: Grid
    halo: Grid
    start: Grid

    @property
    def keys(self) -> int:
        """How many keys a query is compared with."""
        return math.prod(side + 2 * r for side, r in zip(self.sides, self.halo))


@dataclass(frozen=True)
class Window:
    """Which keys a query sees, from their coordinates alone.

    ``how``: what to compute it by where the tokens are a full grid; elsewhere a window is always dense. "auto" chooses by size
    and device.
    """

    how: How = "auto"

    @property
    def axes(self) -> int:
        """For grids of how many axes it is; 0: any number."""
        return 0

    def near(self, q: Sequence[Tensor], k: Sequence[Tensor]) -> Tensor:
        """Coordinates on each axis, broadcast against each other -> bool, True where k is seen from q."""
        raise NotImplementedError

    def tiling(self, grid: Grid) -> Tiling:
        """How the grid is cut, such that the keys of a tile are those that its queries may see, and not many more."""
        raise NotImplementedError

    def check(self, axes: int) -> None:
        """Raises DitkitError if the window is for another number of axes."""
        if self.axes not in (0, axes):
            raise DitkitError(f"{self} on positions of {axes} axes", allowed=f"{self.axes} axes")


@dataclass(frozen=True, kw_only=True)
class Ball(Window):
    """|dq - dk| < radius, in tokens; strict (CLEAR, 2412.16112)."""

    radius: float

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise DitkitError(f"radius is {self.radius}", allowed="above 0")

    def near(self, q: Sequence[Tensor], k: Sequence[Tensor]) -> Tensor:
        return sum((a - b) ** 2 for a, b in zip(q, k)) < self.radius**2  # type: ignore[return-value]

    def tiling(self, grid: Grid) -> Tiling:
        return _around((math.ceil(self.radius) - 1,) * len(grid), grid)


@dataclass(frozen=True, kw_only=True)
class Box(Window):
    """|dq - dk| <= reach on every axis; None: any. (None, 0, 0) is attention over time alone, (0, None, None) within a frame."""

    reach: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if any(r is not None and r < 0 for r in self.reach) or all(r is None for r in self.reach):
            raise DitkitError(f"reach is {self.reach}", allowed="0 or more on each axis, None for any, not None on all")

    @property
    def axes(self) -> int:
        return len(self.reach)

    def near(self, q: Sequence[Tensor], k: Sequence[Tensor]) -> Tensor:
        return reduce(torch.logical_and, [(a - b).abs() <= r for a, b, r in zip(q, k, self.reach) if r is not None])

    def tiling(self, grid: Grid) -> Tiling:
        return _around(tuple(n if r is None else r for n, r in zip(grid, self.reach)), grid)


@dataclass(frozen=True, kw_only=True)
class Cells(Window):
    """The grid cut into cells of these sides, moved by ``shift`` (< side): a query sees its cell. The first and last may be smaller.

    This is what shifted windows with their mask compute (Swin, 2103.14030): a cell that would wrap around is cut at the border.
    """

    sides: Grid
    shift: Grid = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", self.shift or (0,) * len(self.sides))
        if len(self.shift) != len(self.sides) or any(not 0 <= s < n for s, n in zip(self.shift, self.sides)):
            raise DitkitError(f"shift {self.shift} of cells {self.sides}", allowed="from 0, less than the cell's side on each axis")

    @property
    def axes(self) -> int:
        return len(self.sides)

    def near(self, q: Sequence[Tensor], k: Sequence[Tensor]) -> Tensor:
        same = [(a - s) // n == (b - s) // n for a, b, n, s in zip(q, k, self.sides, self.shift)]
        return reduce(torch.logical_and, same)

    def tiling(self, grid: Grid) -> Tiling:
        return Tiling(self.sides, (0,) * len(grid), tuple(s - n if s else 0 for s, n in zip(self.shift, self.sides)))


def _around(reach: Grid, grid: Grid) -> Tiling:
    """Tiles about as wide as the window reaches; an axis that tile and halo would cover is not cut."""
    cut = [(1 if r == 0 else max(4, 2 ** math.ceil(math.log2(r + 1))), r) for r in reach]
    cut = [(n, 0) if r and side + 2 * r >= n else (side, r) for (side, r), n in zip(cut, grid)]
    return Tiling(tuple(side for side, _ in cut), tuple(r for _, r in cut), (0,) * len(grid))
