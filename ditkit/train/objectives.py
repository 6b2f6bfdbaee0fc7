"""Objectives: what is learned. One is a small class with the random numbers it needs and ``loss(model, batch) -> Losses``."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ditkit.core.config import Config
from ditkit.core.errors import DitkitError, nearest
from ditkit.diffusion.process import Losses, Process

from .batches import Draw

None_ = Callable[[Any, dict[str, Tensor]], Mapping[str, Tensor]]
OBJECTIVES: dict[str, type[Objective]] = {}
_ELSEWHERE = {  # name -> the module of this package that registers it
    "tinyfusion": "tinyfusion",
    "masked_kd": "tinyfusion",
    "clear": "clear",
    "control": "control",
    "flexdit": "flexdit",
    "harmonica": "routers",
    "l2c": "routers",
}


class Objective(ABC):
    """A loss over batches of data with their random numbers.

    Args:
        process: how data become noise.
        config: settings of the objective.
    """

    name: ClassVar[str] = ""
    config_class: ClassVar[type[Config]] = Config
    config: Any

    def __init__(self, process: Process, config: Config | None = None) -> None:
        self.process, self.config = process, config or self.config_class()
        self.none: None_ = lambda model, cond: model.null(**cond)  # conditioning -> what stands for none of it
        self.progress = 0.0  # share of the training that is done, set by the loop before each step: 0 at the first, 1 at the last

    def begin(self, model: Any) -> None:  # noqa: B027  # most objectives have nothing to prepare
        """Once, before training: check that ``model`` fits, load what the loss compares it with. Raises DitkitError."""

    @abstractmethod
    def draws(self, shape: tuple[int, ...]) -> dict[str, Draw]:
        """The random numbers of one sample of ``shape``, by the name under which the batch holds them."""

    @abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Losses:
        """The loss (B,) of ``model`` on ``batch``: data, conditioning and the drawn numbers."""


def objective(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Class decorator: register under ``name``."""

    def add(cls: type[Objective]) -> type[Objective]:
        if OBJECTIVES.setdefault(name, cls).__qualname__ != cls.__qualname__:
            raise DitkitError(f"objective {name!r} is registered twice", hint="rename one")
        cls.name = name
        return cls

    return add


def objective_from(name: str, config: Mapping[str, Any], process: Process) -> Objective:
    """The objective registered under ``name``. Raises DitkitError naming what there is."""
    if name in _ELSEWHERE:
        importlib.import_module(f".{_ELSEWHERE[name]}", __package__)
    if name not in OBJECTIVES:
        known = sorted({*OBJECTIVES, *_ELSEWHERE})
        raise DitkitError(f"there is no objective {name!r}", allowed=", ".join(known), hint=nearest(name, known))
    cls = OBJECTIVES[name]
    return cls(process, cls.config_class.parse(dict(config), f"objective {name}"))


class DiffusionConfig(Config):
    """Settings of the diffusion loss."""

    label_dropout: float = Field(0.1, ge=0, le=1, description="share of samples trained without their label or caption, for guidance")


@objective("diffusion")
class Diffusion(Objective):
    """The process's own loss at random times, with conditioning dropped at random (2207.12598, algorithm 1)."""

    config_class: ClassVar[type[Config]] = DiffusionConfig

    def draws(self, shape: tuple[int, ...]) -> dict[str, Draw]:
        return {"noise": Draw("normal", shape), "time": Draw("uniform"), "drop": Draw("uniform")}

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Losses:
        x0, noise = batch["x"], batch["noise"]
        t = self.process.at(x0.shape[1:]).sample_time(batch["time"])
        x_t = self.process.add_noise(x0, noise, t)
        cond = self.conditioning(model, batch)
        output = model(self.process.network_input(x_t, t), self.process.network_time(t), **cond)
        return self.process.loss(output.float(), x0, noise, t)

    def told(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the batch holds besides data and random numbers: labels, or a caption's states."""
        return {k: v for k, v in batch.items() if k not in ("x", *self.draws(()))}

    def conditioning(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the batch holds besides data and numbers, replaced by "none" where the sample's number says so; not inputs of methods."""
        told = self.told(batch)
        own: frozenset[str] = getattr(model, "inputs", frozenset())
        cond, inputs = {k: v for k, v in told.items() if k not in own}, {k: v for k, v in told.items() if k in own}
        if not self.config.label_dropout or not cond:
            return told
        drop, null = batch["drop"] < self.config.label_dropout, self.none(model, cond)
        return {**{k: torch.where(drop.reshape(-1, *[1] * (v.dim() - 1)), null[k], v) for k, v in cond.items()}, **inputs}
