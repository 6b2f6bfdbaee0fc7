"""A circular window: an image query sees the image keys within a radius. Ten lines, on any backbone, composed with any other mask."""

from pydantic import Field

from ditkit.core import registry
from ditkit.core.config import Config
from ditkit.core.method import Method
from ditkit.core.streams import Layout
from ditkit.core.windows import Ball, How


class WindowConfig(Config):
    """Its radius, and how it is computed."""

    radius: float = Field(2.0, gt=0, description="in tokens; strict")
    how: How = Field("auto", description="dense, gathered tiles, or FlexAttention's blocks; auto chooses by size and device")


@registry.register("methods", "window")
class Window(Method):
    """|dq - dk| < radius. It says what it is, so that over a full grid no N x N mask is made."""

    config_class, stage = WindowConfig, "attention"
    owns = frozenset({"window"})

    def mask(self, q: Layout, k: Layout, q_name: str, k_name: str) -> Ball | None:
        return Ball(radius=self.config.radius, how=self.config.how) if q_name == k_name == "img" else None

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(how="gathered"), cls()]
