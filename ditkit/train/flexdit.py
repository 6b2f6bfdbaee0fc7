"""Fine-tuning of FlexDiT (arXiv 2412.06028): all weights learn the loss that the network was trained with, at sparse grids that follow t.

One forward has one sparse grid. So the rows of a micro-batch whose times ask for the same one go through the network together (``rows:
each``): t stays as it was, nothing depends on how a batch is split. Or the times of a micro-batch are all drawn where they ask for the
grid of its first row (``rows: together``, as the paper has it for each GPU): over many micro-batches t is as it was too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.run import Run
from ditkit.diffusion.process import Losses
from ditkit.methods.efficiency.flexdit import FlexDiTConfig, find

from .objectives import Diffusion, DiffusionConfig, objective

CELLS = 4096  # into which [0, 1) is cut to find out which numbers ask for which grid


class FlexDiTObjectiveConfig(DiffusionConfig):
    """Settings of the fine-tuning."""

    rows: Literal["each", "together"] = Field(
        "each", description="each row at the grid of its own time, or a micro-batch at one grid: for compiled and for sharded models"
    )


@objective("flexdit")
class FlexDiTObjective(Diffusion):
    """The diffusion loss of a model with FlexDiT attached."""

    config_class: ClassVar[type[Config]] = FlexDiTObjectiveConfig
    schedule: FlexDiTConfig
    asked: Tensor  # (CELLS,) the side that a number in each cell asks for
    shape: torch.Size | None = None  # of the data for which that is so

    def begin(self, model: Any) -> None:
        self.schedule = find(model).config

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Losses:
        x0, noise = batch["x"], batch["noise"]
        process = self.process.at(x0.shape[1:])
        u = batch["time"] if self.config.rows == "each" else self.within_one_grid(batch["time"], x0)
        t = process.sample_time(u)
        x_t = self.process.network_input(self.process.add_noise(x0, noise, t), t)
        output = self.forwards(model, x_t, t, self.process.network_time(t), self.conditioning(model, batch))
        return self.process.loss(output.float(), x0, noise, t)

    def forwards(self, model: Any, x: Tensor, t: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The network's output (B, C, ...): one forward for each sparse grid that the public times t (B,) ask for."""
        sides = self.sides(t) if self.config.rows == "each" else self.sides(t[:1]).expand(len(t))
        groups = [(int(side), (sides == side).nonzero()[:, 0].to(x.device)) for side in sides.unique()]
        if len(groups) > 1 and fixed(model):
            raise DitkitError("rows is 'each' with a model that is compiled or sharded", hint="objective.config.rows: together")
        parts = []
        for side, rows in groups:
            run = Run(model)
            run.public_times = t[sides == side][:1]
            parts.append(model(x[rows], time[rows], run=run, **{k: v[rows] for k, v in cond.items()}))
        order = torch.cat([rows for _, rows in groups]).argsort()
        return torch.cat(parts)[order]

    def sides(self, t: Tensor) -> Tensor:
        """(B,) on the CPU: the side of the sparse grid at each time."""
        return torch.tensor([self.schedule.side(float(v)) for v in t])

    def within_one_grid(self, u: Tensor, x0: Tensor) -> Tensor:
        """Uniform numbers u (B,) -> numbers whose times all ask for the grid of the first: uniform over the cells that do."""
        process = self.process.at(x0.shape[1:])
        if self.shape != x0.shape[1:]:
            middles = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
            self.asked, self.shape = self.sides(process.sample_time(middles)), x0.shape[1:]
        cells = (self.asked == self.sides(process.sample_time(u[:1]))).nonzero()[:, 0].to(u.device)
        if not len(cells):  # a grid of less than a cell
            return u[:1].expand(len(u))
        place = u.double() * len(cells)
        cell = place.floor().long().clamp(max=len(cells) - 1)
        return torch.cat([u[:1], ((cells[cell] + place - cell) / CELLS).to(u.dtype)[1:]])


def fixed(model: Any) -> bool:
    """Whether all forwards must be of one shape (compiled) or equally many in all processes (sharded)."""
    compiled = hasattr(getattr(model, "_call", None), "_torchdynamo_orig_callable")
    return compiled or any(type(p).__name__ == "DTensor" for p in model.parameters())


__all__ = ["FlexDiTObjective", "FlexDiTObjectiveConfig"]
