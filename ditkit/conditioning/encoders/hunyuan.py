"""A bilingual CLIP (of BERT's architecture) and a multilingual T5, as Hunyuan-DiT is told captions (2405.08748): two texts, with two masks.

Frozen, from a local folder. Both encoders see no padding. What T5 says at padding is kept, because the network pools over all places.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ditkit.core import registry

from ..text import Text
from ._several import T5, Place, Several, SeveralConfig
from .transformers import Use


class HunyuanTextConfig(SeveralConfig):
    """Which encoders, and their lengths; the network was built for these."""

    clip: str = Field("text_encoder", description="folder of CLIP, a BERT")
    t5: str = Field("text_encoder_2", description="folder of T5")


@registry.register("encoders", "hunyuan")
class HunyuanEncoder(Several):
    """Token numbers of CLIP and T5 in a row (B, 77 + 256) -> states (B, 77, D), t5 (B, 256, D_t5), a mask for each."""

    config_class = HunyuanTextConfig
    config: HunyuanTextConfig
    places: ClassVar[dict[str, Place]] = {
        "clip": Place(Use("CLIP", ("bert",), pooled=False), "clip_length"),
        "t5": Place(Use("T5", T5, padding=True), "max_length"),
    }

    @property
    def dim(self) -> int:
        return self["clip"].dim

    @property
    def t5_shape(self) -> tuple[int, int]:
        return self.config.max_length, self["t5"].dim

    @property
    def length(self) -> int:
        return self.config.clip_length

    def forward(self, tokens: Tensor, mask: Tensor) -> Text:
        texts = self.texts(tokens, mask)
        return texts["clip"]._replace(t5=texts["t5"].states, t5_mask=texts["t5"].mask)
