"""What text-to-image networks are told besides time: the caption, and the size and aspect of the picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditkit.core.errors import DitkitError
from ditkit.core.streams import Layout

from .embeddings import TimeEmbed
from .layers import Mlp
from .text import text_layout


class CaptionProjection(Mlp):
    """A text encoder's states -> the network's width: text (B, L, D_text) -> (B, L, D). Linear, tanh-approximate GELU, Linear."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__(text_dim, dim, dim)

    def layout(self, text: Tensor, mask: Tensor | None = None) -> Layout:
        """See ``text_layout``."""
        return text_layout(text, mask, self.fc1.in_features)

    def forward(self, text: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(text.to(self.fc1.bias.dtype))  # its weight may be int8


class MicroConditions(nn.Module):
    """Size and aspect of a picture, a code that is added to that of the time (PixArt, 2310.00426; SDXL, 2307.01952, section 2.2).

    [e(height) | e(width) | e'(aspect)], each a third of ``dim``, from the same sinusoid as the time.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.size, self.aspect = TimeEmbed(dim // 3), TimeEmbed(dim // 3)

    def forward(self, size: Tensor, aspect: Tensor | None = None) -> Tensor:
        """-> (B, 1, D).

        Args:
            size: (B, 2) height and width in pixels; in training of the original picture.
            aspect: (B, 1) or (B,) height / width; by default that of ``size``.
        """
        if size.dim() != 2 or size.shape[1] != 2:
            raise DitkitError(f"size is {tuple(size.shape)}", allowed="(B, 2): height and width in pixels")
        aspect = size[:, 0] / size[:, 1] if aspect is None else aspect
        if aspect.numel() != len(size):
            raise DitkitError(f"aspect is {tuple(aspect.shape)}", allowed=f"({len(size)}, 1): height / width")
        codes = self.size(size), self.aspect(aspect.reshape(-1, 1))
        return torch.cat([c.flatten(1) for c in codes], -1)[:, None]
