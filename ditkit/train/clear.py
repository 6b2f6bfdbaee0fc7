"""Fine-tuning of windows (CLEAR, arXiv 2412.16112, section 3.3): the projections of the attention learn from the network as it was.

    L = mean |v_S - v*|^2 + 1/2 mean |v_S - v_T|^2 + 1/2 (1/n) sum_l mean |a_S^l - a_T^l|^2

v are predictions of student and teacher, v* the process's target (its own loss is the first term), a^l the attention outputs of every
fourth block, before the output projection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ditkit.bundle import find_bundle, open_bundle
from ditkit.core.backbone import Backbone
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.seams import Attn, Site
from ditkit.core.sparse import joined
from ditkit.core.view import with_methods
from ditkit.diffusion.process import Losses, Process

from .objectives import Diffusion, DiffusionConfig, objective

# ---- what is compared -------------------------------------------------------------------------------------------------------


class AttentionOutputs(Method):
    """Lets the attention outputs of some blocks leave, with their gradients; changes nothing.

    Args:
        blocks: their numbers; default: ``distilled_blocks`` of the model.
    """

    name, exact = "attention_outputs", True

    def __init__(self, blocks: Sequence[int] | None = None) -> None:
        super().__init__()
        self.blocks = None if blocks is None else tuple(blocks)

    def install(self, view: Backbone) -> None:
        self.blocks = distilled_blocks(view) if self.blocks is None else self.blocks
        if unknown := [i for i in self.blocks if not 0 <= i < len(view.blocks)]:
            raise DitkitError(f"blocks {unknown}", allowed=f"0 to {len(view.blocks) - 1}")

    def plan(self, at: At) -> Any:
        return () if at.block in (self.blocks or ()) else None

    def attend(self, nxt: Any, a: Attn, site: Site) -> dict[str, Tensor]:
        out = nxt(a)
        if a.name == "attn":
            site.tap("attention", joined(out).transpose(1, 2).flatten(2))
        return out


def distilled_blocks(model: Backbone, every: int = 4) -> tuple[int, ...]:
    """Every fourth block, of those that have one set of weights for text and image where there are such (FLUX's single blocks)."""
    shared = [i for i, block in enumerate(model.blocks) if "both.fc1" in block.projections()]  # type: ignore[operator]
    return tuple(i for i in shared or range(len(model.blocks)) if i % every == 0)


def evaluate(view: Backbone, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, list[Tensor]]:
    """The output of a view with ``AttentionOutputs``, and those: (B, N of all streams, D), the streams in the block's order."""
    run = Run(view)
    output = view(x, t, run=run, **cond)
    return output, [value for _, name, value in run.taps if name == "attention"]


# ---- losses -----------------------------------------------------------------------------------------------------------------


def prediction_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(B, ...) twice -> (B,) mean squared difference."""
    return (student.float() - teacher.float()).square().flatten(1).mean(1)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Attention outputs of n blocks, each (B, N, D) -> (B,): the mean over blocks of the mean squared difference, text included."""
    if len(student) != len(teacher) or not student:
        raise DitkitError(f"attention outputs of {len(student)} and {len(teacher)} blocks", allowed="of the same blocks, at least one")
    return torch.stack([prediction_loss(s, t) for s, t in zip(student, teacher)]).mean(0)


# ---- the objective ----------------------------------------------------------------------------------------------------------


class ClearObjectiveConfig(DiffusionConfig):
    """What is learned from, and how much each term counts."""

    teacher: str = Field(description="bundle of the network as it was: its name or folder")
    prediction: float = Field(0.5, ge=0, description="weight of the difference between predictions")
    attention: float = Field(0.5, ge=0, description="weight of the difference between attention outputs")


@objective("clear")
class Clear(Diffusion):
    """The diffusion loss with the two distillation losses; the teacher is loaded when first needed."""

    config_class: ClassVar[type[Config]] = ClearObjectiveConfig

    def __init__(self, process: Process, config: Config | None = None) -> None:
        super().__init__(process, config)
        self.teacher: Backbone | None = None  # a view with ``AttentionOutputs``
        self._student: tuple[Any, Backbone] | None = None

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Losses:
        x0, noise = batch["x"], batch["noise"]
        t = self.process.at(x0.shape[1:]).sample_time(batch["time"])
        x_t = self.process.add_noise(x0, noise, t)
        cond = self.conditioning(model, batch)
        inputs = self.process.network_input(x_t, t), self.process.network_time(t)
        with torch.no_grad():
            wanted, attended = evaluate(self._teacher_for(x0.device), *inputs, **cond)
        output, attention = evaluate(self._watched(model), *inputs, **cond)
        return self.combined(self.process.loss(output.float(), x0, noise, t), (output, wanted), (attention, attended))

    def combined(self, own: Losses, outputs: tuple[Tensor, Tensor], attentions: tuple[Sequence[Tensor], Sequence[Tensor]]) -> Losses:
        """The process's own loss and the two others, of (student, teacher)."""
        parts = {"prediction": prediction_loss(*outputs), "attention": attention_loss(*attentions)}
        total = own.loss + self.config.prediction * parts["prediction"] + self.config.attention * parts["attention"]
        return Losses(total, {**own.parts, "diffusion": own.loss, **parts})

    def _teacher_for(self, device: torch.device) -> Backbone:
        if self.teacher is None:
            from ditkit.loading import load_model

            model, _ = load_model(open_bundle(find_bundle(self.config.teacher)), torch.float32, device)
            self.teacher = with_methods(model.eval().requires_grad_(False), AttentionOutputs())
        return self.teacher

    def _watched(self, model: Backbone) -> Backbone:
        """The student with its attention outputs; a view over the same parameters, made once."""
        if self._student is None or self._student[0] is not model:
            self._student = model, with_methods(model, AttentionOutputs())
        return self._student[1]


# ---- what is trained --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A parameter that is trained, or its first ``rows`` alone (FLUX's single blocks have q, k, v and MLP in one matrix)."""

    parameter: nn.Parameter
    rows: int | None = None

    @property
    def numbers(self) -> int:
        return self.parameter[: self.rows].numel()


def attention_parameters(view: Backbone) -> dict[str, Trained]:
    """The image's queries, keys, values and attention output in every block, and the weights of its second resolution, by their names.

    Left out, as in the paper: the text's projections, norms, MLPs, cross-attention, and an output projection that is also the MLP's.
    """
    found: dict[str, Trained] = {}
    names = {id(p): name for name, p in view.named_parameters()}
    mine = re.compile(rf"{view.main}\.(qkv|q|kv|proj)2?")
    for block in view.blocks:
        for name, module in block.projections().items():  # type: ignore[operator]
            rows: Any = block.widths[0] if name == "both.fc1" else None  # type: ignore[index]
            if rows or mine.fullmatch(name):
                found.update({names[id(p)]: Trained(p, rows) for p in module.parameters()})
    for label, method in view.methods.items():
        if method.name == "clear":
            found.update({f"methods.{label}.{n}": Trained(p) for n, p in method.named_parameters()})
    return found


def train_attention_only(view: Backbone) -> int:
    """Freeze everything but ``attention_parameters``; returns how many numbers are trained.

    Of a matrix that is trained in part the other rows get a gradient of zero: use an optimiser without weight decay. The parameters are
    those of the base too: a teacher needs a copy of its own.
    """
    chosen = attention_parameters(view)
    view.requires_grad_(False)
    for trained in chosen.values():
        trained.parameter.requires_grad_(True)
        if trained.rows is not None:
            trained.parameter.register_hook(lambda g, rows=trained.rows: torch.cat([g[:rows], torch.zeros_like(g[rows:])]))
    return sum(trained.numbers for trained in chosen.values())


__all__ = [
    "AttentionOutputs",
    "Clear",
    "ClearObjectiveConfig",
    "Trained",
    "attention_loss",
    "attention_parameters",
    "distilled_blocks",
    "evaluate",
    "prediction_loss",
    "train_attention_only",
]
