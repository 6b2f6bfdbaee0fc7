"""One vector from a sequence of tokens, by attention; and the two-layer network with SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adaln_single import heads, merge


class AttentionPool(nn.Module):
    """Tokens (B, L, D) -> (B, D_out): their mean, as a token before them, asks all of them (CLIP, 2103.00020, section 2.4).

    Args:
        length: L, which is fixed by the learned positions of the L + 1 tokens.
    """

    def __init__(self, length: int, dim: int, num_heads: int, out: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positions = nn.Parameter(torch.randn(length + 1, dim) / dim**0.5)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, out)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positions
        k, v = (heads(u, self.num_heads) for u in self.kv(x).chunk(2, -1))
        return self.proj(merge(F.scaled_dot_product_attention(heads(self.q(x[:, :1]), self.num_heads), k, v))[:, 0])


class SiluMlp(nn.Module):
    """D -> hidden -> out with SiLU."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x.to(self.fc1.bias.dtype))))  # its weight may be int8
