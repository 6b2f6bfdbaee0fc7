"""Norms, modulation and the MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = Callable[..., Tensor]  # (name, module, x, part=None): the seam ``linear`` of one stream


def plain(name: str, module: nn.Module, x: Tensor, part: slice | None = None) -> Tensor:
    """The seam ``linear`` where there is none."""
    y: Tensor = module(x)
    return y if part is None else y[..., part]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) (1 + scale) + shift, LN without affine parameters. x (B, N, D), shift and scale (B, 1 | N, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class Mlp(nn.Module):
    """D -> hidden -> D (or ``out``) with tanh-approximate GELU."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor, linear: Linear = plain) -> Tensor:
        return linear("fc2", self.fc2, F.gelu(linear("fc1", self.fc1, x), approximate="tanh"))


def swiglu_width(dim: int, multiple: int = 256, factor: float = 1.0) -> int:
    """LLaMA's hidden width: 2/3 of 4 ``dim``, times ``factor``, rounded up to a multiple (its code rounds down twice on the way)."""
    return multiple * -(-int(factor * int(8 * dim / 3)) // multiple)


class SwiGLU(nn.Module):
    """W2 (SiLU(W1 x) * W3 x) without biases (2002.05202); ``fc1`` is [W1; W3]. D -> hidden -> D."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, linear: Linear = plain) -> Tensor:
        gate, value = linear("fc1", self.fc1, x).chunk(2, -1)
        return linear("fc2", self.fc2, F.silu(gate) * value)
