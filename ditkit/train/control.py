"""Training a method that sees a control picture: the process's own loss, with the control of each sample beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.diffusion.process import Losses

from .objectives import Diffusion, DiffusionConfig, objective


class ControlConfig(DiffusionConfig):
    """Settings of the loss. Labels and captions are dropped as always, controls never."""

    condition: Literal["edges", "data"] = Field(
        "edges",
        description="edges: made of the samples themselves, in the space that they are trained in; data: the data set's own ``control``",
    )


@objective("control")
class Control(Diffusion):
    """The diffusion loss of a model with a method whose input is ``control`` (ControlNet)."""

    config_class: ClassVar[type[Config]] = ControlConfig

    def begin(self, model: Any) -> None:
        if "control" not in getattr(model, "inputs", ()):
            raise DitkitError("objective control, and no method takes a control", hint="methods: [{name: controlnet}]")

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Losses:
        if self.config.condition == "edges":
            batch = {**batch, "control": edges(batch["x"])}
        elif "control" not in batch:
            raise DitkitError("the data have no 'control'", allowed="batches that hold it, like x", hint="condition: edges makes it of x")
        return super().loss(model, batch)


def edges(x: Tensor) -> Tensor:
    """x (B, C, H, W) in [-1, 1] -> the size of its gradient by Sobel's filter, in [-1, 1], the same in every channel."""
    column = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device, dtype=x.dtype) / 8
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    both = F.conv2d(grey, torch.stack([column, column.T])[:, None])
    return (2 * both.norm(dim=1, keepdim=True) - 1).clamp(-1, 1).expand_as(x)
