"""Learned tokens that say in a sequence of patches where rows and frames end: [nextline] and [nextframe] (Lumina-T2X, 2405.05945)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .patches import Grid
from .positions import coordinates

LINE, FRAME = 1, 2  # their roles; patches have 0


class Separators(nn.Module):
    """[nextline] after each row of patches and, on grids of frames, [nextframe] after each frame."""

    def __init__(self, dim: int, axes: int = 2) -> None:
        super().__init__()
        self.line = nn.Parameter(torch.empty(dim))
        self.frame = nn.Parameter(torch.empty(dim)) if axes == 3 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02)."""
        for p in self.parameters():
            nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, h w, D) -> (B, h (w + 1), D), or (B, f h w, D) -> (B, f (h (w + 1) + 1), D)."""
        return insert(tokens, grid, self.line, self.frame)


def insert(tokens: Tensor, grid: Grid, line: Tensor, frame: Tensor | None = None) -> Tensor:
    """(B, N, D) with ``line`` after each row of the grid and ``frame`` after each frame; both can be broadcast to (B, D)."""
    rows = _after_each(tokens.unflatten(1, grid), line).flatten(-3, -2)
    return rows if len(grid) == 2 else _after_each(rows, line if frame is None else frame).flatten(-3, -2)


def _after_each(u: Tensor, token: Tensor) -> Tensor:
    """(B, ..., n, D) -> (B, ..., n + 1, D)."""
    token = token.view(-1, *[1] * (u.dim() - 2), u.shape[-1]).expand(*u.shape[:-2], 1, u.shape[-1])
    return torch.cat([u, token.to(u.dtype)], -2)


def remove(tokens: Tensor, grid: Grid) -> Tensor:
    """The inverse of ``insert``: (B, N', D) -> (B, N, D)."""
    *frames, h, w = grid
    if frames:
        tokens = tokens.unflatten(1, (*frames, -1))[:, :, :-1]
    return tokens.unflatten(-2, (h, w + 1))[..., :w, :].flatten(1, -2)


def places(grid: Grid) -> tuple[Tensor, Tensor]:
    """(1, N', A) coordinates and (1, N') roles. A separator stands behind the last patch of its row, or below the last row."""
    *frames, h, w = grid
    coords = coordinates((*frames, h, w + 1)).float()
    role = torch.where(coords[..., -1] == w, LINE, 0)
    if not frames:
        return coords, role
    ends = coordinates((*frames, 1, 1)).float()[0, :, None] + coords.new_tensor([0, h, 0])
    whole = torch.cat([coords.unflatten(1, (*frames, -1))[0], ends], 1)
    roles = torch.cat([role.unflatten(1, (*frames, -1))[0], torch.full((*frames, 1), FRAME)], 1)
    return whole.flatten(0, 1)[None], roles.flatten()[None]
