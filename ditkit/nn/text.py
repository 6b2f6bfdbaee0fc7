"""Text as a stream of tokens beside the picture, and vectors (a pooled text, a guidance scale) that are added to the time code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.errors import DitkitError
from ditkit.core.streams import Layout


def text_layout(text: Tensor, mask: Tensor | None, width: int) -> Layout:
    """Tokens without places, of which ``mask`` (B, L) says which are there; None: all are.

    Raises:
        DitkitError: the text is not (B, L, width), or the mask not (B, L) of booleans or integers.
    """
    if text.dim() != 3 or text.shape[-1] != width or not text.shape[1]:
        raise DitkitError(f"text is {tuple(text.shape)}", allowed=f"(B, L, {width}), the text encoder's last states")
    if mask is not None and (mask.shape != text.shape[:2] or mask.is_floating_point()):
        raise DitkitError(f"mask is {tuple(mask.shape)} of {mask.dtype}", allowed=f"{tuple(text.shape[:2])}, true where a token is")
    places = torch.zeros(1, text.shape[1], 2, device=text.device)
    return Layout(places, text.shape[1], valid=None if mask is None else mask.bool())


class TextTokens(nn.Linear):
    """The states of text encoders -> tokens of the network's width: (B, L, D_text) -> (B, L, D)."""

    def layout(self, text: Tensor, mask: Tensor | None = None) -> Layout:
        """See ``text_layout``."""
        return text_layout(text, mask, self.in_features)

    def forward(self, text: Tensor) -> Tensor:
        return super().forward(text.to(self.bias.dtype))


class VectorEmbed(nn.Module):
    """v (B, D_in) -> (B, 1, D): Linear, SiLU, Linear.

    Args:
        what: named in errors.
    """

    def __init__(self, in_dim: int, dim: int, what: str = "pooled") -> None:
        super().__init__()
        self.what = what
        self.fc1, self.fc2 = nn.Linear(in_dim, dim), nn.Linear(dim, dim)

    def check(self, v: Tensor, batch: int) -> Tensor:
        """v, if it is (batch, D_in); raises DitkitError otherwise."""
        if v.shape != (batch, self.fc1.in_features):
            raise DitkitError(f"{self.what} is {tuple(v.shape)}", allowed=f"({batch}, {self.fc1.in_features})")
        return v

    def forward(self, v: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(v.to(self.fc1.bias.dtype))))[:, None]  # its weight may be int8


def check_batch(x: Tensor, text: Tensor) -> None:
    """Raises DitkitError where the pictures and the texts are not as many."""
    if len(x) != len(text):
        raise DitkitError(f"{len(x)} pictures and {len(text)} texts", allowed="as many of both")
