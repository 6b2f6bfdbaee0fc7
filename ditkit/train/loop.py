"""Training: one loop for every objective, on one process or many, resumed bit for bit.

    result = train(load_recipe("digits"), "runs/digits")

A step is a function of the weights and of (seed, step); everything else that changes is in the checkpoint.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.bundle import Validity, write_bundle
from ditkit.core.backbone import Backbone, count_graphs
from ditkit.core.errors import ConfigError
from ditkit.core.files import atomic_file
from ditkit.core.view import allow_graphs, compile_view
from ditkit.pipeline import Pipeline

from .activations import checkpoint_activations
from .batches import Batch, Batches, Prefetch
from .build import Parts, build
from .checkpoint import RECIPE, Checkpoints, check_same_run
from .distributed import World, connect, whole
from .ema import EMA, second_model
from .guards import Guard, first_non_finite
from .logs import Log, Meter
from .optim import Optimizers, clip_gradients
from .previews import sample_grid, save_grid, validation_loss
from .recipe import Recipe, dump_recipe
from .session import CHECKPOINTS, SAMPLES, clear_half_bundle, set_aside, stop_signals
from .throughput import peak_flops, training_flops

log = logging.getLogger("ditkit")


@dataclass(frozen=True)
class TrainResult:
    """What a session of training did.

    Attributes:
        folder: of the run; a bundle once training is finished.
        step: updates done, over all sessions.
        finished: False if a signal ended it before the last step.
        resumed_from: the step this session began at, None at the very beginning.
        skipped: steps that were not taken, over all sessions.
        validation: last loss on held-out data at fixed times and noise, of the "raw" and the averaged ("ema") weights.
    """

    folder: Path
    step: int
    finished: bool
    resumed_from: int | None
    skipped: int
    validation: dict[str, float] = field(default_factory=dict)


def train(recipe: Recipe, out_folder: str | Path, resume: bool = True, progress: bool = True) -> TrainResult:
    """Train ``recipe`` in ``out_folder``, from its newest checkpoint if there is one; at the end it is a bundle.

    Args:
        resume: False starts anew; what an earlier run left is moved to ``earlier-N``.
        progress: a live line on stderr.

    Raises:
        DitkitError: the recipe does not fit its parts, or the checkpoint is of another recipe.
        TrainingStopped: loss or gradients were not finite three times in a row.
    """
    folder = Path(out_folder)
    world = connect(recipe.trainer.device, recipe.trainer.replicas)
    try:
        if not resume and world.first:
            set_aside(folder)
        world.wait()
        run = Training(recipe, folder, world, progress)
        resumed_from = run.restore()
        with Log(folder, run.step, recipe.trainer.steps, quiet=not progress, silent=not world.first) as run.log, stop_signals() as stop:
            run.begin(resumed_from)
            finished = run.go(stop)
        if finished:
            run.write_bundle()
        return TrainResult(folder, run.step, finished, resumed_from, run.guard.skipped, run.validation)
    finally:
        world.close()


class Training:
    """The state of a run, and what a step does to it."""

    log: Log

    def __init__(self, recipe: Recipe, folder: Path, world: World, progress: bool = False) -> None:
        self.recipe, self.folder, self.world, self.cfg = recipe, folder, world, recipe.trainer
        if world.size > 1 and self.cfg.compile != "off":
            raise ConfigError(f"trainer.compile is {self.cfg.compile!r} with {world.size} processes", allowed="off")
        self.parts = self._built(progress and world.first)
        self.objective, self.model = self.parts.objective, self._trained(self.parts.model).train()
        self.parts = replace(self.parts, model=self.model)  # nobody else may keep whole parameters alive
        self.dtype = torch.bfloat16 if _wants_bfloat16(self.cfg.dtype, world.device) else torch.float32
        self.flops, self.peak = self._measure_machine()
        twin = second_model(self.model)
        world.shard(self.model)
        world.shard(twin)
        self.ema = EMA(twin, self.model, self.cfg.ema_decay)
        self.optimizers = Optimizers(self.model, self.cfg)
        self.forward = self._compiled()
        self.preview = Pipeline(twin, self.parts.card, codec=self.parts.codec, encoder=self.parts.encoder)
        self.guard, self.meter = Guard(self.cfg.spike_sigma), Meter()
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, self.cfg.keep, world)
        self.step, self.validation = 0, {}  # type: int, dict[str, float]
        self._unread: list[tuple[int, Tensor, Tensor]] = []  # steps whose loss and norm are still on the device
        options: dict[str, Any] = {"seed": self.cfg.seed, "batch_size": self.cfg.batch_size, "rank": world.rank, "world": world.size}
        options["parts"] = self.cfg.accumulation
        self.batches = Batches(self.parts.train, self.objective.draws, **options)
        test = self.parts.test
        self._held_out = None if test is None else Batches(test, self.objective.draws, purpose="validation", **options)

    def _built(self, progress: bool) -> Parts:
        """What the recipe names. Where a codec is trained first, one process does that, and the others read it."""
        learns = self.recipe.data.codec is not None and self.recipe.data.codec.fit is not None
        if learns and not self.world.first:
            self.world.wait()
        parts = build(self.recipe, self.world.device, self.folder, progress)
        if learns and self.world.first:
            self.world.wait()
        return parts

    # ---- the main line ----

    def go(self, stop: threading.Event) -> bool:
        """Train to the last step; False if ``stop`` was set before."""
        batches = Prefetch(self.batches, self.cfg.steps)
        try:
            while self.step < self.cfg.steps:
                batch = batches(self.step).to(self.world.device)
                self.update(batch)
                self.step += 1
                stopping = self._asked_to_stop(stop)
                self.report(batches, ending=stopping)
                if stopping:
                    break
        finally:
            batches.close()
        return self.step >= self.cfg.steps

    def update(self, batch: Batch) -> None:
        """One step: forward and backward, then the optimiser and the average, unless loss or gradient is not finite."""
        self.optimizers.set_rate(self.step)
        self.objective.progress = self.step / max(1, self.cfg.steps - 1)
        loss = self.world.mean(self.backward(batch))
        norm = clip_gradients(self.model, self.cfg.grad_clip, self.world)
        self._unread.append((self.step, loss, norm))
        if self._judged_on_device:
            accepted = (loss.isfinite() & norm.isfinite()).float()
            self.optimizers.step(accepted)
            self.ema.update(accepted)
        elif self.read():
            self.optimizers.step()
            self.ema.update()
        self.optimizers.zero_grad()

    def backward(self, batch: Batch) -> Tensor:
        """Gradients of the mean loss over this process's rows, micro-batch by micro-batch; returns that loss."""
        total = torch.zeros((), device=self.world.device)
        for i, micro in enumerate(batch.split(self.cfg.accumulation)):
            self.world.exchange_gradients(self.model, now=i == self.cfg.accumulation - 1)
            loss = self.loss(self.forward, micro) / self.cfg.accumulation
            loss.backward()
            total += loss.detach()
        return total

    def loss(self, model: Backbone, batch: Batch) -> Tensor:
        """Mean loss of a micro-batch."""
        with self.autocast():
            return self.objective.loss(model, batch.tensors).loss.mean()

    def read(self) -> bool:
        """Fetch what is still on the device, judge it and note it; whether the last step is accepted."""
        if not self._unread:
            return True
        values = torch.stack([torch.stack([loss, norm]) for _, loss, norm in self._unread]).tolist()
        steps, self._unread = [step for step, _, _ in self._unread], []
        reason = ""
        for step, (loss, norm) in zip(steps, values):
            if reason := self.guard.judge(loss, norm):
                self.explain(step, reason, loss, norm)
            else:
                self.meter.add(loss, norm, self.cfg.batch_size)
        return not reason

    def explain(self, step: int, reason: str, loss: float, norm: float) -> None:
        """Log a skipped step: its samples and, if it was not finite, the first module that was not."""
        where, ids = "", self.batches.ids(step).tolist()
        if reason == "not finite":
            batch = self.batches(step).to(self.world.device)
            where = self.world.any_name(first_non_finite(self.model, lambda: self.loss(self.model, batch), self.world.agree))
        self.log.event("skipped", step + 1, reason=reason, loss=loss, grad_norm=norm, first=where, samples=ids)
        log.warning("step %d skipped: %s%s", step + 1, reason, f", first in {where}" if where else "")
        self.guard.stop_if_hopeless(step + 1, where)

    # ---- around a step ----

    def report(self, batches: Prefetch, ending: bool = False) -> None:
        """After a step: a line of the log, validation, samples, a checkpoint, each when it is due."""
        due = {name: self._due(name) for name in ("log", "validate", "sample", "save")}
        if any(due.values()) or ending:
            self.read()
        self.log.progress()
        if due["log"]:
            self._log_line(batches)
        if due["validate"]:
            self._validate()
        if due["sample"]:
            self._sample()
        if due["save"] or ending:
            self.save()
        if due["validate"] or due["sample"] or due["save"]:
            self.meter.restart()

    def _asked_to_stop(self, stop: threading.Event) -> bool:
        return stop.is_set() if self.world.size == 1 else self.world.agree(stop.is_set())

    def _due(self, what: str) -> bool:
        every: int = getattr(self.cfg, f"{what}_every")
        return every > 0 and (self.step % every == 0 or self.step == self.cfg.steps)

    def _log_line(self, batches: Prefetch) -> None:
        values, seconds = self.meter.line()
        rate = self.optimizers.rate
        mfu = values["images_per_second"] * self.flops / (self.peak * self.world.size)
        waited, batches.waited = batches.waited, 0.0
        self.log.event("train", self.step, **values, learning_rate=rate, mfu=mfu, data_wait=waited / seconds, skipped=self.guard.skipped)
        if "loss" in values:
            self.log.show(loss=f"{values['loss']:.4f}", images_per_second=f"{values['images_per_second']:.0f}")

    def _validate(self) -> None:
        if self._held_out is None:
            return
        fixed = self._held_out.fixed(min(self.cfg.validation_samples, len(self._held_out.data)))
        batches = [batch.to(self.world.device) for batch in fixed]
        size = max(1, self.cfg.batch_size // self.cfg.accumulation)
        with self.autocast():
            models = {"raw": self.model, "ema": self.ema.model}
            self.validation = {name: validation_loss(m, self.objective, batches, size) for name, m in models.items()}
        self.log.event("validation", self.step, **self.validation, ema_distance=self.ema.distance(self.world.total))

    def _sample(self) -> None:
        """A grid of samples of the averaged weights. Whatever goes wrong here is logged; training goes on."""
        name = f"{SAMPLES}/step-{self.step:07d}.png"
        try:
            with self.autocast():
                output = sample_grid(self.preview)
            if self.world.first:
                save_grid(output, self.folder / name)
        except Exception as error:
            self.log.event("samples failed", self.step, error=str(error))
            log.warning("no samples at step %d: %s", self.step, error)
        else:
            self.log.event("samples", self.step, file=name)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self.log.sync()
        state = {
            "updates": self.optimizers.counts(),
            "guard": self.guard.state(),
            "meter": self.meter.state(),
            "validation": self.validation,
            "base": self.parts.base_hash,
        }
        self.checkpoints.save(self.step, self.groups(), state, self.recipe)

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds: trained weights and buffers, their averages, the optimiser's state."""
        weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return {
            "model": {**weights, **dict(self.model.named_buffers())},
            "ema": {**self.ema.shadow, **dict(self.ema.model.named_buffers())},
            "optimizer": self.optimizers.tensors(),
        }

    def restore(self) -> int | None:
        """Continue from the newest checkpoint, if there is one; returns its step."""
        found = self.checkpoints.newest()
        if found is None:
            return None
        check_same_run(found.folder, self.recipe)
        if found.state["base"] != self.parts.base_hash:
            raise ConfigError(f"{self.recipe.base} is not the bundle that {found.folder} was trained from", hint="choose another --out")
        self.checkpoints.load(found, self.groups())
        self.optimizers.restore_counts(found.state["updates"])
        self.guard.restore(found.state["guard"])
        self.meter.restore(found.state["meter"])
        self.step, self.validation = found.step, found.state["validation"]
        return found.step

    def begin(self, resumed_from: int | None) -> None:
        """Note the start of a session."""
        if self.world.first:
            with atomic_file(self.folder / RECIPE) as file:
                file.write(dump_recipe(self.recipe).encode("utf-8"))
        self.log.event("start" if resumed_from is None else "resume", self.step, flops_per_sample=self.flops, peak_flops=self.peak)

    def write_bundle(self) -> None:
        """The averaged weights as a bundle in the run's folder."""
        tensors = whole(self.ema.model.state_dict().items())
        if self.world.first:
            clear_half_bundle(self.folder)
            learned = {m.label: Validity.of(self.parts.card, m) for m in self.parts.model.attached if m.state_dict()}
            write_bundle(self.folder, self.parts.card, tensors, learned, self.parts.codec)
        self.world.wait()

    # ---- how a step is computed ----

    @property
    def _judged_on_device(self) -> bool:
        """On a GPU nobody waits for a loss: a bad step is skipped by the optimiser itself, and read later."""
        return self.world.device.type == "cuda" and self.world.size == 1 and not self.cfg.spike_sigma and self.optimizers.skips_on_device

    def autocast(self) -> torch.autocast:
        """Arithmetic in bfloat16 where the recipe asks for it; weights stay as they are."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _trained(self, model: Backbone) -> Backbone:
        """The model, or the view of it that is trained and sharded."""
        how = self.cfg.activation_checkpointing
        return model if how == "off" or self.cfg.compile != "off" else checkpoint_activations(model, how)

    def _compiled(self) -> Backbone:
        """What a step calls. ``self.model`` itself is never compiled: a step can be replayed with hooks."""
        how, grain = self.cfg.activation_checkpointing, self.cfg.compile
        if grain == "off":
            return self.model
        if how != "off":
            return checkpoint_activations(self.model, how, compiled=True)
        view = compile_view(self.model, grain, num_steps=1)
        allow_graphs(2 * count_graphs(view, 1) * len(getattr(self.parts.train, "groups", None) or [()]))  # graphs of each size
        return view

    def _measure_machine(self) -> tuple[float, float]:
        """FLOPs of a sample, FLOP/s of the device; on the first process only."""
        if not self.world.first:
            return 0.0, 1.0
        rows = max(1, self.cfg.batch_size // self.cfg.accumulation // self.world.size)
        return training_flops(self.model), peak_flops(self.model, rows, self.world.device, self.dtype)


def _wants_bfloat16(dtype: str, device: torch.device) -> bool:
    return dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
