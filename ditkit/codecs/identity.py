"""The codec of pixel models: latents are the data."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ..core.config import Config
from .base import Codec


class IdentityConfig(Config):
    """Nothing to set but the number of channels."""

    channels: int = Field(3, ge=1, le=4096, description="channels of the data")


class Identity(Codec):
    """z = x, with std 0."""

    name = "identity"
    config_class = IdentityConfig

    def __init__(self, config: IdentityConfig | None = None) -> None:
        super().__init__()
        self.config = config or IdentityConfig()
        self.in_channels = self.channels = self.config.channels

    def encode_raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself, and zeros."""
        return x, x.new_zeros(()).expand_as(x)

    def decode_raw(self, z: Tensor) -> Tensor:
        """z itself."""
        return z
