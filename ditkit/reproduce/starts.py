"""What a trained base is turned into before it is trained on, or measured: ``@NAME:START``, START one of a protocol's ``starts``.

Plain data, without torch; ``started.py`` does it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ditkit.bundle import Part
from ditkit.core.config import Config


class FromDiT(Config):
    """A PixArt that is told captions, from a DiT that was told classes (PixArt-alpha, section 2.3, "re-parameterization")."""

    kind: Literal["from_dit"]
    encoder: Part = Field(description="of captions; a new one")
    config: dict[str, Any] = Field({}, description="of the PixArt, beside what the DiT has and what the encoder gives")
    t: float = Field(500.0, description="network time at which the tables modulate as the DiT does")
    tables: Literal["given", "random"] = Field("given", description="random: as in a new PixArt, for comparison")


class Reconfigured(Config):
    """The same network with other settings: weights of equal name stay, those that are new start as the network starts them."""

    kind: Literal["config"]
    config: dict[str, Any] = Field(min_length=1, description="settings that differ")
    redraw: tuple[str, ...] = Field((), description="patterns of modules that start at random as torch has them, for comparison")


Start = Annotated[FromDiT | Reconfigured, Field(discriminator="kind")]
