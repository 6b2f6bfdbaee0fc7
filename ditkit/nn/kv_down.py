"""Fewer keys and values than tokens: one for each R x R cell of the grid (PVTv2, 2106.13797; PixArt-Sigma, 2403.04692, section 3.3)."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from torch import Tensor, nn

from ditkit.core.errors import DitkitError
from ditkit.core.streams import Layout

How = Literal["conv", "first", "every"]


class KVDown(nn.Module):
    """Keys or values (B, N, D) of a grid -> (B, N', D); both go through the same weights.

    Args:
        how: "conv": a depth-wise convolution of stride R that starts as the mean, then LayerNorm over D, which is no identity at the
            start; rows and columns that fill no cell are dropped. "first": the first token of each cell. "every": every R-th token.
    """

    def __init__(self, dim: int, ratio: int, how: How = "conv") -> None:
        super().__init__()
        self.ratio, self.how = ratio, how
        self.kind = (how, ratio)
        if how == "conv":
            self.conv = nn.Conv2d(dim, dim, ratio, stride=ratio, groups=dim)
            self.norm = nn.LayerNorm(dim)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The mean of each cell (section 3.3)."""
        if self.how == "conv":
            nn.init.constant_(self.conv.weight, 1 / self.ratio**2)
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, u: Tensor, grid: tuple[int, ...]) -> Tensor:
        if self.how == "every":
            return u[:, :: self.ratio]
        maps = u.transpose(1, 2).unflatten(2, grid)
        if self.how == "conv":
            return self.norm(self.conv(maps).flatten(2).transpose(1, 2))
        h, w = (n // self.ratio * self.ratio for n in grid)
        return maps[:, :, : h : self.ratio, : w : self.ratio].flatten(2).transpose(1, 2)

    def layout(self, whole: Layout) -> Layout:
        """Where the keys stand: each at its cell's centre ("conv") or at the token that it was. Raises DitkitError where none is left."""
        return _fewer(self.how, self.ratio, whole.grid, whole.coords)

    def cached_layout(self, whole: Layout) -> Layout:
        """The same, one object for one layout, so that masks rendered for it are kept. Not inside a graph."""
        return _cached(self.how, self.ratio, whole.grid, whole.coords)


def _fewer(how: How, ratio: int, grid: tuple[int, ...] | None, coords: Tensor) -> Layout:
    if grid is None or len(grid) != 2:
        raise DitkitError("keys and values are compressed over cells of the grid", allowed="all tokens of a picture, in order")
    if min(grid) < ratio:
        raise DitkitError(f"a grid of {grid} tokens holds no cell of {ratio} x {ratio}", hint="a larger picture, or less compression")
    if how == "every":
        coords = coords[:, ::ratio]
        return Layout(coords, coords.shape[1])
    h, w = (n // ratio * ratio for n in grid)
    first = coords.unflatten(1, grid)[:, :h:ratio, :w:ratio].flatten(1, 2)
    return Layout(first + (ratio - 1) / 2 if how == "conv" else first, first.shape[1])


_cached = lru_cache(maxsize=32)(_fewer)  # tensors are equal to themselves alone, as keys
