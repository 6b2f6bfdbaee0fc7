"""Learning of TinyFusion (arXiv 2412.01199): the search for blocks to keep, and the recovery of the shallower network from its teacher.

    search     L = the process's loss, patterns drawn at tau from 4 down to 0.1 (section 3.2)
    recovery   L = alpha L_KD + (1 - alpha) L_GT + beta L_feat,  beta from 0.01 down to 0 (section 3.4)

L_GT is the process's loss, L_KD the same against the teacher's output, L_feat compares the outputs of blocks without their outliers.
Differs from the released code: tau and beta are functions of the step, so that one epoch is possible and the batch size does not matter;
student and teacher always see the same dropped labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ditkit.bundle import find_bundle, open_bundle
from ditkit.core.backbone import Backbone
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.diffusion.gaussian import Gaussian, discrete_log_likelihood, normal_kl
from ditkit.diffusion.process import Losses, Process, Time, flat_mean
from ditkit.methods.efficiency.tinyfusion import find, gumbel_noise
from ditkit.methods.pruning import BlockOutputs

from .batches import Draw
from .objectives import Diffusion, DiffusionConfig, objective

Mask = Literal["separate", "intersection"]


def line(ends: tuple[float, float], progress: float) -> float:
    """From the first value at progress 0 to the second at 1."""
    return ends[0] + (ends[1] - ends[0]) * progress


# ---- the search ----


class SearchConfig(DiffusionConfig):
    """Settings of the search."""

    tau: tuple[float, float] = Field((4.0, 0.1), description="temperature of the soft choice at the first and the last step")

    @field_validator("tau")
    @classmethod
    def _above_zero(cls, tau: tuple[float, float]) -> tuple[float, float]:
        if min(tau) <= 0:
            raise ValueError("temperatures are above 0")
        return tau


@objective("tinyfusion")
class Search(Diffusion):
    """The diffusion loss of a model with TinyFusion attached; each sample draws patterns of its own, as a function of (seed, step, row)."""

    config_class: ClassVar[type[Config]] = SearchConfig
    options = 1

    def begin(self, model: Any) -> None:
        self.options = find(model).num_options

    def draws(self, shape: tuple[int, ...]) -> dict[str, Draw]:
        return {**super().draws(shape), "pattern": Draw("uniform", (self.options,))}

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Losses:
        run = Run(model)
        find(model).sample(run, gumbel_noise(batch["pattern"]), line(self.config.tau, self.progress))
        x0, noise = batch["x"], batch["noise"]
        t = self.process.at(x0.shape[1:]).sample_time(batch["time"])
        x_t = self.process.network_input(self.process.add_noise(x0, noise, t), t)
        output = model(x_t, self.process.network_time(t), run=run, **self.conditioning(model, batch))
        return self.process.loss(output.float(), x0, noise, t)


# ---- losses of the recovery ----


def within(h: Tensor, sigmas: float) -> Tensor:
    """(B, N, D) -> where it is less than ``sigmas`` standard deviations from its mean, both over the tokens and channels of a sample."""
    flat = h.flatten(1)
    apart = (flat - flat.mean(1, keepdim=True)).abs()
    return (apart < sigmas * flat.std(1, keepdim=True)).view_as(h)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], sigmas: float | None = 2.0, mask: Mask = "separate") -> Tensor:
    """(B,) mean squared difference of block outputs (B, N, D), pair by pair, without outliers ("massive activations").

    Args:
        sigmas: what is further from the mean is an outlier; None: nothing is.
        mask: "separate", as released: an outlier of one is 0 there, so the other is drawn to 0 where it has none; the mean is over
            all elements. "intersection", as the paper reads: what either has as an outlier is left out, from the count too.
    """
    if len(student) != len(teacher) or not student:
        raise DitkitError(f"outputs of {len(student)} and {len(teacher)} blocks", allowed="pairs, at least one")
    return torch.stack([_pair_loss(s.float(), t.float(), sigmas, mask) for s, t in zip(student, teacher)]).mean(0)


def _pair_loss(s: Tensor, t: Tensor, sigmas: float | None, mask: Mask) -> Tensor:
    if sigmas is None:
        return flat_mean((s - t) ** 2)
    keep_s, keep_t = within(s.detach(), sigmas), within(t, sigmas)
    if mask == "separate":
        return flat_mean((s * keep_s - t * keep_t) ** 2)
    both = (keep_s & keep_t).float()
    return ((s - t) ** 2 * both).flatten(1).sum(1) / both.flatten(1).sum(1).clamp(min=1)


def output_loss(process: Process, student: Tensor, teacher: Tensor, x0: Tensor, x_t: Tensor, t: Time) -> Losses:
    """L_KD (B,): the squared difference of the outputs; where a Gaussian process learns its variance, of their first half, plus the
    teacher's bound on the student, from which only the variance learns."""
    if not (isinstance(process, Gaussian) and process.config.variance == "learned"):
        mse = flat_mean((student - teacher) ** 2)
        return Losses(mse, {"kd_mse": mse})
    raw, rest = process.split(student, x_t)
    mse = flat_mean((raw - process.split(teacher, x_t)[0]) ** 2)
    vb = teacher_bound(process, torch.cat([raw.detach(), rest], 1), teacher, x0, x_t, t)
    return Losses(mse + vb, {"kd_mse": mse, "kd_vb": vb})


def teacher_bound(process: Gaussian, student: Tensor, teacher: Tensor, x0: Tensor, x_t: Tensor, t: Time) -> Tensor:
    """(B,) bits per dimension: KL(p_T(x_{t-1} | x_t) || p_S), and at index 0 the student's -log p(x0)."""
    i = process.index(t).expand(len(x0))

    def step(output: Tensor) -> tuple[Tensor, Tensor]:
        p = process.predict(output, x_t, t)
        fraction = 0.0 if p.fraction is None else p.fraction
        return process.tables.posterior_mean(p.x0, x_t, i), process.tables.log_variance(fraction, i, x0)

    mean, log_var = step(student)
    kl = flat_mean(normal_kl(*step(teacher), mean, log_var))
    nll = -flat_mean(discrete_log_likelihood(x0, mean, 0.5 * log_var))
    return torch.where(i.to(x0.device) == 0, nll, kl) / math.log(2)


# ---- the recovery ----


class MaskedKDConfig(DiffusionConfig):
    """Settings of the recovery. Defaults: those with which TinyDiT was trained."""

    teacher: str = Field(description="bundle of the network before pruning: its name or folder")
    alpha: float = Field(0.9, ge=0, le=1, description="weight of the teacher's output against the data")
    beta: tuple[float, float] = Field((1e-2, 0.0), description="weight of the block outputs at the first and the last step; SiT's: 2e-4, 0")
    sigmas: float | None = Field(2.0, gt=0, description="block outputs further than this from their mean are masked; none: no mask")
    mask: Mask = Field("separate", description="separate masks as released, or what both keep (intersection), as the paper reads")
    layers: tuple[tuple[int, int], ...] = Field(
        (), description="[student, teacher] blocks that are compared; absent: all of the student's, spread evenly over the teacher's"
    )
    share_drop: bool = Field(True, description="the teacher's labels are dropped where the student's are")

    @field_validator("beta")
    @classmethod
    def _not_negative(cls, beta: tuple[float, float]) -> tuple[float, float]:
        if min(beta) < 0:
            raise ValueError("weights are 0 or more")
        return beta


#: Settings under which the released code and the paper differ from the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "released-output-kd": {"beta": (0.0, 0.0), "share_drop": False},  # the teacher keeps the labels that the student lost
    "paper-masks": {"mask": "intersection"},
    "sit": {"beta": (2e-4, 0.0)},
    "TinyDiT-D19": {"layers": tuple((s, 4 * g + 3) for g, s in enumerate((2, 5, 7, 10, 12, 15, 18)))},
}


def even_layers(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Block i of ``student`` blocks and the last of the teacher's that it stands for: i and 2 i + 1 at half the depth."""
    return tuple((i, (i + 1) * teacher // student - 1) for i in range(student))


@objective("masked_kd")
class MaskedKD(Diffusion):
    """Masked representation distillation; the teacher is loaded once, and is no part of what is saved."""

    config_class: ClassVar[type[Config]] = MaskedKDConfig
    teacher: Backbone  # a view that shows the outputs of its blocks
    layers: tuple[tuple[int, int], ...]

    def begin(self, model: Any) -> None:
        from ditkit.loading import load_model

        device = next(model.parameters()).device
        teacher, _ = load_model(open_bundle(find_bundle(self.config.teacher)), torch.float32, device)
        self.learn_from(teacher, len(model.blocks))

    def learn_from(self, teacher: Backbone, depth: int) -> None:
        """Take ``teacher``, for a student of ``depth`` blocks."""
        self.layers = self.config.layers or even_layers(depth, len(teacher.blocks))
        if wrong := [p for p in self.layers if not (0 <= p[0] < depth and 0 <= p[1] < len(teacher.blocks))]:
            raise DitkitError(f"layers {wrong}", allowed=f"[student below {depth}, teacher below {len(teacher.blocks)}]")
        self.teacher = with_methods(teacher.requires_grad_(False), BlockOutputs([t for _, t in self.layers])).eval()
        self._student: tuple[Any, Backbone] | None = None

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Losses:
        x0, noise = batch["x"], batch["noise"]
        t = self.process.at(x0.shape[1:]).sample_time(batch["time"])
        return self.at_time(model, x0, noise, t, self.conditioning(model, batch), self.told(batch))

    def at_time(self, model: Any, x0: Tensor, noise: Tensor, t: Tensor, dropped: dict[str, Tensor], whole: dict[str, Tensor]) -> Losses:
        """The loss at times t (B,) with conditioning ``dropped`` where labels are dropped; ``whole``: none of it is."""
        cfg, process = self.config, self.process
        x_t = process.add_noise(x0, noise, t)
        inputs = process.network_input(x_t, t), process.network_time(t)
        with torch.no_grad():
            wanted, shown = self._evaluate(self.teacher, 1, *inputs, **(dropped if cfg.share_drop else whole))
        output, seen = self._evaluate(self._watched(model), 0, *inputs, **dropped)
        own = process.loss(output, x0, noise, t)
        kd = output_loss(process, output, wanted, x0, x_t, t)
        features = feature_loss(seen, shown, cfg.sigmas, cfg.mask)
        beta = line(cfg.beta, self.progress)
        total = cfg.alpha * kd.loss + (1 - cfg.alpha) * own.loss
        if beta:  # at 0 a term that is not finite must not count either
            total = total + beta * features
        return Losses(total, {**own.parts, **kd.parts, "data": own.loss, "teacher": kd.loss, "features": features})

    def _evaluate(self, view: Backbone, side: int, x: Tensor, t: Tensor, **cond: Tensor) -> tuple[Tensor, list[Tensor]]:
        run = Run(view)
        output = view(x, t, run=run, **cond)
        return output.float(), [run.memory["block_outputs"][pair[side]][1] for pair in self.layers]

    def _watched(self, model: Backbone) -> Backbone:
        """The student with its block outputs shown: a view over the same parameters, in the student's mode."""
        if self._student is None or self._student[0] is not model:
            self._student = model, with_methods(model, BlockOutputs([s for s, _ in self.layers]))
        view = self._student[1]
        return view if view.training == model.training else view.train(model.training)


__all__ = ["MaskedKD", "MaskedKDConfig", "PRESETS", "Search", "SearchConfig", "even_layers", "feature_loss", "output_loss", "within"]
