"""Codecs between data and latents: ``identity``, ``vae`` (a diffusers AutoencoderKL folder), ``kl`` (small and trainable), and
``orthogonal`` (a rotation of pixels, without training).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.config import Config, read_data
from ..core.errors import DitkitError, nearest

if TYPE_CHECKING:
    from .base import Codec

CODECS = {"identity": "Identity", "kl": "KL", "orthogonal": "Orthogonal", "vae": "VAE"}  # file -> class


def codec_from(name: str, config: dict[str, Any] | None = None) -> Codec:
    """Build the codec that a configuration names; ``config`` is checked strictly."""
    if name not in CODECS:
        raise DitkitError(f"there is no codec {name!r}", allowed=", ".join(CODECS), hint=nearest(name, CODECS))
    cls = getattr(importlib.import_module(f"{__name__}.{name}"), CODECS[name])
    codec: Codec = cls(cls.config_class.parse(config or {}, f"codec {name}"))
    return codec


class _Spec(Config):
    format: int
    name: str
    config: dict[str, Any]


def load_codec(folder: str | Path) -> Codec:
    """Read the codec that ``save_codec`` wrote to ``folder``; sizes and SHA-256 of its files are checked."""
    from ..core.files import verify_manifest

    folder = Path(folder)
    verify_manifest(folder)
    spec = _Spec.parse(read_data(folder / "codec.json"), str(folder / "codec.json"))
    if spec.format != 1:
        raise DitkitError(f"{folder}: codec format {spec.format}", allowed="1", hint="update ditkit")
    codec = codec_from(spec.name, {**spec.config, "path": str(folder)} if spec.name == "vae" else spec.config)
    codec.read(folder)
    return codec
