"""What a foreign weight file does not say about itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ditkit.core.config import Config

System = Literal[
    "dit",
    "sit",
    "pixart-alpha",
    "pixart-sigma",
    "sd3",
    "flux",
    "flag-dit",
    "lumina-t2i",
    "next-dit",
    "lumina-next",
    "qihoo-t2x",
    "hunyuan-dit",
]


class Hints(Config):
    """Told by the user where the file alone leaves a choice."""

    system: System | None = Field(None, description="released DiT and SiT files look alike, so do those of both PixArts: which it is")
    weights: Literal["ema", "model"] = Field("ema", description="which weights of a training checkpoint that holds both")
    num_heads: int | None = Field(None, ge=1, description="attention heads; known for the published sizes")
    null_label: bool = Field(True, description="the last row of the label table stands for no label")
    as_released: bool = Field(
        False,
        description="a diffusers DiT: compute the time code and norms as the released code does, not as diffusers does, because its "
        "weights were converted from released ones",
    )
    input_size: tuple[int, int] | None = Field(None, description="height and width in latent pixels; square where not given")
    position_scale: float | None = Field(None, gt=0, description="of a released PixArt that is not one of the published checkpoints")


NOTES = ("_class_name", "_diffusers_version", "_name_or_path")  # what diffusers writes about a file, not about the model


def without_notes(values: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """A diffusers configuration without diffusers' own notes, nor ``more``; any other key stays, and is refused where it is unknown."""
    return {k: v for k, v in values.items() if k not in NOTES and k not in more}
