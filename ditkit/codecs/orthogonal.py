"""A codec without training: each cell of pixels becomes one latent pixel, its numbers rotated by a fixed orthogonal matrix.

It loses nothing, and what it does to a network is what a VAE does: sides shrink, channels grow, and another ``seed`` is another basis, as
another VAE is. So PixArt-Sigma's change of the VAE (2403.04692, section 3.3) can be learnt about, and recipes be tried, in minutes.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..core.config import Config
from ..diffusion.noise import normal
from .base import Codec


class OrthogonalConfig(Config):
    """Which cells, and which basis."""

    in_channels: int = Field(3, ge=1, le=64, description="channels of the data")
    factor: int = Field(2, ge=1, le=16, description="side of a cell in pixels")
    seed: int = Field(0, ge=0, lt=2**32, description="of the basis")


class Orthogonal(Codec):
    """z = Q u for the u of each cell, Q orthogonal of in_channels * factor^2; std 0."""

    name = "orthogonal"
    config_class = OrthogonalConfig
    basis: Tensor

    def __init__(self, config: OrthogonalConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or OrthogonalConfig()
        self.in_channels, self.factor = c.in_channels, c.factor
        self.channels = n = c.in_channels * c.factor**2
        q, r = torch.linalg.qr(normal([c.seed], 0, "codec basis", (n, n))[0].double())
        self.register_buffer("basis", (q * r.diagonal().sign()).float())  # one of all bases, each as likely

    def encode_raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cells, rotated; and zeros."""
        z = torch.einsum("oc,bchw->bohw", self.basis.to(x), pixel_unshuffle(x, self.factor))
        return z, z.new_zeros(()).expand_as(z)

    def decode_raw(self, z: Tensor) -> Tensor:
        """Rotated back."""
        return pixel_shuffle(torch.einsum("oc,bohw->bchw", self.basis.to(z), z), self.factor)
