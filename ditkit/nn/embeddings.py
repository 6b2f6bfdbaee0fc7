"""Time and labels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.errors import DitkitError


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
        code = timestep_code(t, self.width, freq_shift=self.freq_shift).to(self.fc1.bias.dtype)  # its weight may be int8
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
