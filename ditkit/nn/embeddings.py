"""Patches, time, labels and positions."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.errors import DitkitError


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, h w, C p p), row-major, the layout of a convolution's weight."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, h w, p p C) -> (B, C, h p, w p); the channel is the fastest axis of a token, unlike in ``patchify``."""
    h, w = grid
    x = tokens.view(len(tokens), h, w, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(tokens), -1, h * patch, w * patch)


class PatchEmbed(nn.Linear):
    """A strided convolution written as a linear layer over patches: (B, C, H, W) -> (B, N, D), contiguous."""

    def __init__(self, in_channels: int, patch: int, dim: int) -> None:
        super().__init__(in_channels * patch * patch, dim)
        self.patch = patch

    def grid(self, x: Tensor) -> tuple[int, int]:
        """The token grid of x; raises DitkitError if it is no multiple of the patch."""
        h, w = x.shape[2:]
        for side, name in ((h, "height"), (w, "width")):
            if side % self.patch or side == 0:
                low = side // self.patch * self.patch
                raise DitkitError(
                    f"{name} is {side}", allowed=f"multiples of {self.patch}", hint=f"use {low or self.patch} or {low + self.patch}"
                )
        return h // self.patch, w // self.patch

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(patchify(x, self.patch))


def timestep_code(t: Tensor, width: int = 256, max_period: float = 10_000.0, freq_shift: int = 0) -> Tensor:
    """(...,) -> (..., width): [cos(t f), sin(t f)], f_i = max_period^(-i / (half - freq_shift)). In fp32 whatever the model's dtype.

    DiT, models.py: shift 0. diffusers' DiT: shift 1.
    """
    half = width // 2
    f = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift))
    angle = t[..., None].float() * f
    return torch.cat([angle.cos(), angle.sin()], -1)


class TimeEmbed(nn.Module):
    """t (B,) or (B, N) -> (B, 1 | N, D): sinusoid of ``width``, Linear, SiLU, Linear."""

    def __init__(self, dim: int, width: int = 256, freq_shift: int = 0) -> None:
        super().__init__()
        self.width, self.freq_shift = width, freq_shift
        self.fc1, self.fc2 = nn.Linear(width, dim), nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        code = timestep_code(t, self.width, freq_shift=self.freq_shift).to(self.fc1.weight.dtype)
        c = self.fc2(F.silu(self.fc1(code)))
        return c[:, None] if t.dim() == 1 else c


class LabelEmbed(nn.Embedding):
    """Class labels 0..K-1 and, if ``null``, the row K that stands for "no label"."""

    def __init__(self, num_classes: int, dim: int, null: bool = True) -> None:
        super().__init__(num_classes + null, dim)
        self.num_classes, self.null = num_classes, null

    def check(self, y: Tensor) -> Tensor:
        """y (B,) integers; raises DitkitError naming the first out of range."""
        if y.dtype not in (torch.int64, torch.int32):
            raise DitkitError(f"class labels are {y.dtype}", allowed="integers")
        if y.is_meta:  # counting costs: there are no values
            return y
        bad = y[(y < 0) | (y >= self.num_embeddings)]
        if len(bad):
            null = f", or {self.num_classes} for none" if self.null else ""
            raise DitkitError(f"class label {int(bad[0])}", allowed=f"0 to {self.num_classes - 1}{null}")
        return y


@lru_cache(maxsize=64)
def sincos_table(dim: int, grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """(1, N, dim) fixed position code, float64 cast to fp32 (DiT, models.py).

    Each axis has dim / A numbers, [sin, cos] of position times 10000^(-k / (dim / 2A)); the *last* axis (the column) comes
    first. Positions are integers from 0.
    """
    axes = len(grid)
    if dim % (2 * axes):
        raise DitkitError(f"dim is {dim}", allowed=f"multiples of {2 * axes} for {axes} position axes")
    width = dim // axes
    with torch.inference_mode(False):
        omega = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
        places = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in grid], indexing="ij")
        codes = []
        for place in reversed(places):
            angle = place.reshape(-1, 1) * omega
            codes.append(torch.cat([angle.sin(), angle.cos()], 1))
        return torch.cat(codes, 1)[None].float().to(device)
