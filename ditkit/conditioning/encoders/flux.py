"""CLIP and T5, as FLUX.1 is told captions: T5's states, CLIP's pooled vector. Frozen, from a local folder."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ditkit.core import registry

from ..text import Text
from ._several import CLIP, T5, Place, Several, SeveralConfig
from .transformers import Use


class FluxTextConfig(SeveralConfig):
    """Which encoders, and their lengths."""

    masked: bool = Field(False, description="padding is hidden from the network. False: it is seen, as FLUX was trained")
    max_length: int = Field(512, ge=2, le=1 << 16, description="tokens of a prompt for T5: 512 for FLUX.1-dev, 256 for schnell")
    clip: str = Field("text_encoder", description="folder of CLIP-L")
    t5: str = Field("text_encoder_2", description="folder of T5")


@registry.register("encoders", "flux")
class FluxEncoder(Several):
    """Token numbers of CLIP and T5 in a row (B, 77 + L) -> T5's states (B, L, D), pooled (B, CLIP's width), not projected."""

    config_class = FluxTextConfig
    config: FluxTextConfig
    places: ClassVar[dict[str, Place]] = {
        "clip": Place(Use("CLIP", CLIP, projected=False), "clip_length"),
        "t5": Place(Use("T5", T5), "max_length"),
    }

    @property
    def dim(self) -> int:
        return self["t5"].dim

    @property
    def pooled_dim(self) -> int | None:
        return self["clip"].pooled_dim

    def forward(self, tokens: Tensor, mask: Tensor) -> Text:
        texts = self.texts(tokens, mask)
        return texts["t5"]._replace(pooled=texts["clip"].pooled)
