"""Several encoders of transformers for one network: what the encoders ``sd3``, ``flux`` and ``hunyuan`` share.

The tokens of a prompt are those of all encoders in a row; each has its own limit, and a prompt is too long where it is for one of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from ..text import LongPrompts, Text, TextConfig, TextEncoder, Tokens
from .transformers import TransformersEncoder, Use

CLIP, T5 = ("clip_text_model",), ("t5", "mt5", "umt5")  # model types of transformers


@dataclass(frozen=True)
class Place:
    """One of the encoders. Its folder is the setting of its own name; ``length`` names the setting of its tokens."""

    use: Use
    length: str
    layer: int = -1


class SeveralConfig(TextConfig):
    """Where the encoders are, and their lengths. A setting that names a folder may also hold a path of its own."""

    path: str = Field(description="local folder of a diffusers pipeline")
    clip_length: int = Field(77, ge=2, le=1 << 16, description="tokens of a prompt for CLIP, those that mark its ends among them")
    max_length: int = Field(256, ge=2, le=1 << 16, description="tokens of a prompt for T5, its end mark among them")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the encoders' weights and arithmetic")


class Several(TextEncoder):
    """A subclass gives ``places``, one for each of its settings that name a folder, and combines ``texts`` in ``forward``.

    The models are read when they are first asked. Raises DitkitError for a folder that is missing or holds another kind of model.
    """

    places: ClassVar[dict[str, Place]]

    def __init__(self, config: SeveralConfig | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        self.parts = nn.ModuleDict({name: self._part(name) for name in self.places if getattr(self.config, name) is not None})
        self._known = False  # whether the hash was compared

    def _part(self, name: str) -> TransformersEncoder:
        cfg, place = self.config, self.places[name]
        same = {"path": cfg.path, "masked": cfg.masked, "dtype": cfg.dtype}
        own = {"subfolder": getattr(cfg, name), "max_length": getattr(cfg, place.length), "layer": place.layer}
        return TransformersEncoder(use=place.use, **same, **own)

    def __getitem__(self, name: str) -> TransformersEncoder:
        """One of the encoders."""
        return cast(TransformersEncoder, self.parts[name])

    @property
    def device(self) -> torch.device:
        return self[next(iter(self.parts))].device

    def tokenize(self, prompts: Sequence[str], long_prompts: LongPrompts | None = None) -> Tokens:
        how, parts = self.checked(prompts, long_prompts), [self[name] for name in self.parts]
        for part in parts:
            _ = part.described  # folders that are missing or mixed up are named before any tokenizer
        found = [part.cut(prompts, how) for part in parts]
        long = {k for part, (_, lengths) in zip(parts, found) for k in part.too_long(prompts, lengths, how)}
        return Tokens(torch.cat([t.tokens for t, _ in found], 1), torch.cat([t.mask for t, _ in found], 1), len(long))

    def texts(self, tokens: Tensor, mask: Tensor) -> dict[str, Text]:
        """What each encoder says of its part of the tokens."""
        if not self._known:
            self.check_hash(self.config.path)
            self._known = True
        lengths = [self[name].length for name in self.parts]
        return {name: self[name](t, m) for name, t, m in zip(self.parts, tokens.split(lengths, 1), mask.split(lengths, 1))}

    def identity(self) -> dict[str, Any]:
        """The settings; not where the files lie, but which encoders there are."""
        found = super().identity()
        config = {k: v for k, v in found["config"].items() if k not in ("path", *self.places)}
        return {**found, "config": config, "encoders": list(self.parts)}

    def content_hash(self) -> str:
        """SHA-256 of ``identity`` and of the encoders' own hashes."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode())
        for name in self.parts:
            digest.update(f"{name} {self[name].content_hash()}".encode())
        return digest.hexdigest()
