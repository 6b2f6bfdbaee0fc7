"""A ditkit network, methods and all, in the place of a diffusers pipeline's transformer.

    pipe = diffusers.PixArtSigmaPipeline.from_pretrained(FOLDER, transformer=None)
    fast = ditkit.from_pretrained(FOLDER).with_methods(ditkit.methods.FORA(interval=3))
    pipe.transformer = as_diffusers(fast, pipe)

A pipeline says neither that a call of it begins, nor how many steps it has, nor which step this is. Its scheduler knows: at the start of
every call it makes a new table of times, whose length is the number of steps, and it counts them (or the time tells which one it is). So
each call is a ``Run`` of its own. What is asked at a time that is not the scheduler's next is refused: it comes from elsewhere.

Guidance passes: the name that the pipeline announces (``cache_context``: FLUX's "cond" and "uncond"); a batch of equal halves is both
passes at once, as in ``Guidance(batched=True)``; a further call within a step is a further evaluation. Each has slots of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.core.backbone import Backbone, Prepared, count_graphs, run_blocks
from ditkit.core.errors import DitkitError
from ditkit.core.lazy import require
from ditkit.core.run import Run
from ditkit.core.view import allow_graphs
from ditkit.pipeline import Pipeline

from .calls import READERS, Call
from .families import family
from .schedulers import SCHEDULERS

PASSES = {"uncond": "null"}  # a pipeline's names of its passes, where ours differ
NEAR = 4e-3  # how far off a time may be that was rounded to bf16, of the range of all times
INTERFACE = (  # fields in which a pipeline's transformer and a stand-in must agree, where a network has them
    *("in_channels", "out_channels", "patch_size", "text_dim", "pooled_dim", "t5_dim", "num_classes", "micro_conditions", "size_and_style"),
)


def as_diffusers(model: Backbone | Pipeline, pipe: Any) -> StandIn:
    """What to set ``pipe.transformer`` to, so that a diffusers pipeline samples with ``model``.

    Each pipeline needs one of its own; over the same model they cost nothing. A pipeline made from ``pipe``'s parts (``from_pipe``) has
    its scheduler, and can share it.

    Args:
        model: a backbone or a view of one, also compiled; or our pipeline around it, whose methods' states are then checked for solver too.
        pipe: a pipeline of the same family. Its transformer is not needed: it can be loaded with ``transformer=None``.

    Raises:
        DitkitError: another family, or a network with other inputs or outputs than the pipeline's.
    """
    valid_for = model.valid_for if isinstance(model, Pipeline) else {}
    model = model.model if isinstance(model, Pipeline) else model
    tables: Any = family(model.name)
    if not tables.CLASS:
        raise DitkitError(f"diffusers has no pipeline for {model.name}", allowed=", ".join(READERS))
    theirs = getattr(pipe, "transformer", None)
    theirs = getattr(theirs, "_orig_mod", theirs)  # torch.compile's
    if theirs is None:
        if type(pipe).__name__ not in tables.PIPELINES:
            raise DitkitError(f"{model.name} in a {type(pipe).__name__}", allowed=", ".join(tables.PIPELINES))
        return StandIn(model, pipe, tables.config_to_diffusers(model.config), valid_for)
    described = {**{k: v for k, v in theirs.config.items() if not k.startswith("_")}, "_class_name": _class_name(theirs)}
    if not tables.is_diffusers(described):
        raise DitkitError(f"{model.name} in the place of {described['_class_name']}", allowed=f"in a pipeline around {tables.CLASS}")
    _check_interface(model, tables.config_from_diffusers(described, f"{type(pipe).__name__}.transformer"))
    return StandIn(model, pipe, described, valid_for)


def _class_name(theirs: Any) -> str:
    return theirs.config["_class_name"] if isinstance(theirs, StandIn) else type(theirs).__name__


def _check_interface(model: Backbone, wanted: Any) -> None:
    for name in INTERFACE:
        mine, theirs = getattr(model.config, name, None), getattr(wanted, name, None)
        if mine != theirs:
            raise DitkitError(f"{name} is {mine}", allowed=f"{theirs}, as of the pipeline's transformer", hint="give a network of its kind")


@dataclass
class _Called:
    """One call of the pipeline."""

    run: Run
    table: Tensor  # the scheduler's times; a new call has a new one
    order: int  # entries of the table for each step
    told: Tensor  # (entries,) what the network is told at each, float64 on the CPU
    passes: dict[int, str] = field(default_factory=dict)  # batch size -> name of the pass
    prepared: dict[Hashable, tuple[list[Any], Prepared]] = field(default_factory=dict)  # pass -> what it was made from, and it


class StandIn(nn.Module):
    """Called as the transformer of diffusers that it stands in for; made by ``as_diffusers``.

    Attributes:
        model: the network.
        config: that of diffusers' transformer.
    """

    def __init__(self, model: Backbone, pipe: Any, config: dict[str, Any], valid_for: Any) -> None:
        super().__init__()
        self.model = model
        self.config = require("diffusers.configuration_utils", "vae").FrozenDict(config)
        self._pipe, self._valid_for, self._reader = pipe, valid_for, READERS[model.name]
        self._views: dict[Hashable, Backbone] = {None: model}
        self._announced: str | None = None
        self._called: _Called | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the network's numbers."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    # what single pipelines read

    @property
    def inner_dim(self) -> int:
        """Width."""
        return int(self.model.config.dim)

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        return int(self.model.config.num_heads)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.inner_dim // self.num_heads

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """The pipeline announces a pass."""
        before, self._announced = self._announced, PASSES.get(name, name)
        try:
            yield
        finally:
            self._announced = before

    def report(self) -> dict[str, dict[str, Any]]:
        """What the methods did in the last call of the pipeline, by label."""
        return {} if self._called is None else self._called.run.finish()

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """The arguments of diffusers' transformer -> its output."""
        call: Call = self._reader.read(self.model, *args, **kwargs)
        try:
            output = self._evaluate(call._replace(x=call.x.to(self.dtype)))
        except BaseException:
            self._called = None  # what comes next is another call
            raise
        sample = call.restore(output).to(call.x.dtype)
        return require("diffusers.models.modeling_outputs", "vae").Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _evaluate(self, call: Call) -> Tensor:
        model = self._view(call.setting)
        cond = {name: value for name, value in call.cond.items() if value is not None}
        if not model.methods:  # nothing is kept: no schedule is needed
            return model(call.x, call.t, **cond)
        called, entry = self._enter(model, call)
        name = self._pass(called, call.x)
        output = model(call.x, call.t, _prepare(called, model, name, cond), run=called.run, guidance_pass=name)
        if entry == len(called.table) - 1:
            called.run.leave()
            called.prepared.pop(name)
        return output

    def _view(self, setting: Hashable) -> Backbone:
        if setting not in self._views:
            self._views[setting] = self._reader.view(self.model, setting)
        return self._views[setting]

    def _enter(self, model: Backbone, call: Call) -> tuple[_Called, int]:
        """The call of the pipeline that this evaluation belongs to, its run at the right step; and the entry of the scheduler's table."""
        scheduler = self._pipe.scheduler
        called = self._called
        if called is None or called.table is not scheduler.timesteps or called.run.model is not model:
            called = self._begin(model, call, scheduler)
        entry = _entry(called, scheduler, call.t)
        step = entry // called.order
        if step < called.run.step:  # a loop of its own went back to the start of the same table
            called = self._begin(model, call, scheduler)
        if self._called is not called or step != called.run.step:
            called.run.enter(step)
        self._called = called
        return called, entry

    def _begin(self, model: Backbone, call: Call, scheduler: Any) -> _Called:
        if getattr(scheduler, "num_inference_steps", None) is None:
            raise DitkitError(
                f"the {type(scheduler).__name__} of the pipeline was not told how many steps there are",
                hint="each pipeline needs a stand-in of its own: pipe.transformer = as_diffusers(model, pipe)",
            )
        order = int(getattr(scheduler, "order", 1))
        table = scheduler.timesteps
        num_steps = -(-len(table) // order)
        for label, valid in self._valid_for.items():
            valid.check_run(label, _solver(scheduler), num_steps)
        run = Run(model, num_steps)
        told = self._reader.times(table, scheduler, call.x.dtype)
        run.times = told[::order].to(call.t.device, call.t.dtype)
        run.public_times = self._reader.public(table, scheduler)[::order]
        if model._call is not run_blocks:  # compiled
            allow_graphs(2 * count_graphs(model, num_steps))
        return _Called(run, table, order, told.to("cpu", torch.float64))

    def _pass(self, called: _Called, x: Tensor) -> str:
        if self._announced is not None:
            return self._announced
        if len(x) not in called.passes:
            first, second = x.chunk(2) if len(x) % 2 == 0 else (x, None)
            called.passes[len(x)] = "cond" if second is None or not torch.equal(first, second) else "cond+null"
        return called.passes[len(x)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """A pipeline moves all its parts: where the network is already, nothing is done, as views refuse to be moved."""
        some = [(u, fn(u.new_empty(0))) for u in itertools.chain(self.parameters(), self.buffers())]
        if all(u.dtype == moved.dtype and u.device == moved.device for u, moved in some):
            return self
        return super()._apply(fn, recurse)


def _entry(called: _Called, scheduler: Any, t: Tensor) -> int:
    """Which entry of the scheduler's table the network is asked for: as the scheduler counts, or else by the time."""
    told, now = called.told, float(t.flatten()[0])
    off = (told - now).abs()
    count = getattr(scheduler, "step_index", None)
    entry = int(off.argmin()) if count is None else int(count)
    span = float(told.max() - told.min()) or 1.0
    if entry >= len(told) or off[entry] > NEAR * span:
        where = "its steps are over" if entry >= len(told) else f"its scheduler is at {float(told[entry]):.6g}"
        raise DitkitError(
            f"the network is asked at time {now:.6g} by another than its pipeline: {where}",
            hint="each pipeline needs a stand-in of its own: pipe.transformer = as_diffusers(model, pipe)",
        )
    return entry


def _prepare(called: _Called, model: Backbone, name: str, cond: dict[str, Any]) -> Prepared:
    """Made once a call for each pass, as long as the pipeline gives the same tensors."""
    key = [part for item in sorted(cond.items()) for part in (item[0], item[1], _version(item[1]))]
    old = called.prepared.get(name)
    if old is None or len(old[0]) != len(key) or any(a is not b and not (isinstance(a, int) and a == b) for a, b in zip(old[0], key)):
        called.prepared[name] = old = (key, model.prepare(**cond))
    return old[1]


def _version(value: Any) -> int:
    """Counts how often a tensor was written to, where torch does."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _solver(scheduler: Any) -> str:
    """Our name of what the scheduler computes."""
    name = type(scheduler).__name__
    return "euler" if name == "FlowMatchEulerDiscreteScheduler" else SCHEDULERS[name][0] if name in SCHEDULERS else name
