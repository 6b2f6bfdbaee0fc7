"""What a model is told in words: text encoders, what of their answer a backbone takes, and a cache of answers.

    encoder = encoder_from("bytes", {"dim": 64})
    text = encoder.encode(["a red circle", ""])      # Text(states (B, L, D), mask (B, L), pooled (B, D))
    model.prepare(**network_inputs(model, text))

``bytes`` is learned with the network and is part of its bundle; ``transformers`` reads T5, CLIP, Gemma and BERT from a local folder.
"""

from __future__ import annotations

from typing import Any

from ditkit.core import registry

from .inputs import network_inputs, takes_text, wants
from .text import LongPrompts, Text, TextConfig, TextEncoder, Tokens

__all__ = ["LongPrompts", "Text", "TextConfig", "TextEncoder", "Tokens", "encoder_from", "network_inputs", "takes_text", "wants"]


def encoder_from(name: str, config: dict[str, Any] | None = None) -> TextEncoder:
    """The encoder registered under ``name``; ``config`` is checked strictly. Raises DitkitError naming what there is."""
    cls: Any = registry.get("encoders", name)
    encoder: TextEncoder = cls(cls.config_class.parse(config or {}, f"encoder {name}"))
    return encoder
