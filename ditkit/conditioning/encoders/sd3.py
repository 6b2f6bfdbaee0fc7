"""CLIP-L, CLIP-G and T5, as Stable Diffusion 3 is told captions (2403.03206, section 5.2 and appendix B.3). Frozen, from a local folder.

    states = [CLIP-L | CLIP-G | zeros] of 77 tokens, then T5's;   pooled = [CLIP-L | CLIP-G]

CLIP's states are those before the last layer, side by side, padded with zeros to T5's width; pooled vectors are projected. T5, the largest
by far, may be left out: its tokens are zeros then.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ditkit.core import registry
from ditkit.core.errors import ConfigError

from ..text import Text
from ._several import CLIP, T5, Place, Several, SeveralConfig
from .transformers import Use

log = logging.getLogger("ditkit")


class SD3Config(SeveralConfig):
    """Which encoders, and their lengths."""

    masked: bool = Field(False, description="padding is hidden from the network. False: it is seen, as SD3 was trained")
    clip: str = Field("text_encoder", description="folder of CLIP-L")
    clip_2: str = Field("text_encoder_2", description="folder of CLIP-G")
    t5: str | None = Field("text_encoder_3", description="folder of T5; None: zeros in its place")
    dim: int = Field(4096, ge=1, description="width of the states where there is no T5")


@registry.register("encoders", "sd3")
class SD3Encoder(Several):
    """Token numbers of CLIP-L, CLIP-G and T5 in a row (B, 77 + 77 + L) -> states (B, 77 + L, D), pooled (B, both projections)."""

    config_class = SD3Config
    config: SD3Config
    places: ClassVar[dict[str, Place]] = {
        "clip": Place(Use("CLIP-L", CLIP, projected=True), "clip_length", layer=-2),
        "clip_2": Place(Use("CLIP-G", CLIP, projected=True), "clip_length", layer=-2),
        "t5": Place(Use("T5", T5), "max_length"),
    }

    def __init__(self, config: SD3Config | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        self._said = self.config.t5 is not None

    @property
    def dim(self) -> int:
        width, clip = self.config.dim if self.config.t5 is None else self["t5"].dim, self["clip"].dim + self["clip_2"].dim
        if clip > width:
            raise ConfigError(f"the states of both CLIPs are {clip} wide, side by side", allowed=f"at most {width}, T5's width")
        return width

    @property
    def pooled_dim(self) -> int:
        return sum(self[name].pooled_dim or 0 for name in ("clip", "clip_2"))

    @property
    def length(self) -> int:
        return self.config.clip_length + self.config.max_length

    def forward(self, tokens: Tensor, mask: Tensor) -> Text:
        texts = self.texts(tokens, mask)
        first, second = texts["clip"], texts["clip_2"]
        assert first.pooled is not None
        assert second.pooled is not None
        both = torch.cat([first.states, second.states], -1)
        t5 = texts.get("t5") or self._no_t5(both)
        states = torch.cat([F.pad(both, (0, self.dim - both.shape[-1])), t5.states], 1)
        return Text(states, torch.cat([first.mask | second.mask, t5.mask], 1), torch.cat([first.pooled, second.pooled], -1))

    def _no_t5(self, clip: Tensor) -> Text:
        if not self._said:
            log.warning("there is no T5 in %s: its part of the text is zeros, and what is written in pictures suffers", self.config.path)
            self._said = True
        states = clip.new_zeros(len(clip), self.config.max_length, self.config.dim)
        return Text(states, torch.zeros(states.shape[:2], dtype=torch.bool, device=clip.device))
