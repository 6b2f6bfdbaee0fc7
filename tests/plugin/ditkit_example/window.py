"""A circular window: an image query sees the image keys within a radius. Twenty lines, on any backbone, composed with any other mask."""

from pydantic import Field
from torch import Tensor

from ditkit.core import registry
from ditkit.core.config import Config
from ditkit.core.method import Method
from ditkit.core.streams import Layout


class WindowConfig(Config):
    """Its radius."""

    radius: float = Field(2.0, gt=0, description="in tokens; strict")


@registry.register("methods", "window")
class Window(Method):
    """|dq - dk| < radius."""

    config_class, stage, exact = WindowConfig, "attention", True
    owns = frozenset({"window"})

    def mask(self, q: Layout, k: Layout, q_name: str, k_name: str) -> Tensor | None:
        if (q_name, k_name) != ("img", "img"):
            return None
        distance = (q.coords[:, :, None] - k.coords[:, None]).square().sum(-1)
        return distance < self.config.radius**2

    @classmethod
    def off(cls) -> list[Method]:
        return []
