"""LoRA (arXiv 2106.09685): adapt a frozen model by a low-rank addition to its projections, h = W x + (alpha / r) B A x.

A (r, in) starts Kaiming-uniform and B (out, r) at zero, so that a fresh LoRA is the base bit for bit. r is far below in and out.

Differs from PEFT's layers: nothing is injected. The addition is a layer at the seam ``linear`` that is given its block's A and B,
so all blocks share one graph, weights keep their names, several LoRAs stand side by side, and off is not being called. Strength
may vary over the steps of a run without a new graph (section 4.1 has one constant alpha / r).
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.config import Config
from ditkit.core.errors import Conflict, DitkitError, nearest
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.seams import Site
from ditkit.core.view import shallow

T = TypeVar("T")


class LoRAConfig(Config):
    """Which projections are adapted, at which ranks, how strongly and when.

    A projection is named ``blocks.3.img.qkv``: block, stream, layer. A shorter name means all that end in it: ``img.qkv``, ``qkv``.
    """

    rank: int = Field(8, ge=1, le=4096, description="r, the rank of the addition")
    alpha: float | None = Field(
        None, gt=0, description="the addition is scaled by alpha / rank; None: alpha is each target's rank, scale 1"
    )
    include: str | tuple[str, ...] = Field("", description="a regular expression searched for in projection names, or a list of names")
    ranks: dict[str, Annotated[int, Field(ge=1, le=4096)]] = Field(
        {}, description="name -> rank, where it differs from rank; the longest name that fits counts"
    )
    alphas: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="name -> alpha, where it differs from alpha")
    strength: float = Field(1.0, description="multiplies the addition; 0 is the base")
    schedule: tuple[float, ...] = Field((), description="further factors from the first step of a run to its last, interpolated linearly")
    window: tuple[float, float] = Field(
        (0.0, 1.0), description="acts at steps i of n with start <= i / n < end; 0 is noise. Not in training, nor is schedule"
    )
    label: str = Field("", pattern=r"^[A-Za-z0-9_-]*$", description="name under which it is attached; several LoRAs need different ones")

    @field_validator("include")
    @classmethod
    def _compiles(cls, include: str | tuple[str, ...]) -> str | tuple[str, ...]:
        try:
            re.compile(include if isinstance(include, str) else "")
        except re.error as error:
            raise ValueError(f"no regular expression ({error})") from None
        if include == ():
            raise ValueError("an empty list adapts nothing")
        return include

    @field_validator("window")
    @classmethod
    def _is_a_range(cls, window: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= window[0] < window[1] <= 1:
            raise ValueError("a range within 0 to 1 is needed, start before end")
        return window


class Target(NamedTuple):
    """One adapted projection."""

    rank: int
    alpha: float
    fan_in: int
    fan_out: int

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapted:
    """What is told of one adapted projection. ``max_delta`` is the largest |scale B A|, before strength."""

    name: str
    rank: int
    alpha: float
    scale: float
    max_delta: float

    def __str__(self) -> str:
        return f"{self.name}: rank {self.rank}, alpha {self.alpha:g}, scale {self.scale:g}, max |dW| {self.max_delta:.3g}"


class Pair(nn.Module):
    """The factors of one projection: A (r, in), B (out, r)."""

    def __init__(self, target: Target, like: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(like.new_empty(target.rank, target.fan_in))
        self.B = nn.Parameter(like.new_zeros(target.fan_out, target.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))


@registry.register("methods", "lora")
class LoRA(Method):
    """Mode: the projections that are adapted, each with its rank. Its parameters are the factors, named ``blocks.3.img.qkv.A``."""

    config_class = LoRAConfig
    stage = "adaptation"

    def __init__(self, config: LoRAConfig | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        self.targets: dict[str, Target] = {}
        self._modes: list[tuple[tuple[str, int], ...]] = []  # by block
        self.scheduled = not self.constant

    @property
    def constant(self) -> bool:
        """The strength is the same at every step."""
        return self.config.window == (0.0, 1.0) and len(set(self.config.schedule)) <= 1

    def install(self, view: Backbone) -> None:
        self.build(view)
        self.train(view.training)

    def build(self, model: Backbone) -> None:
        """Make the factors for ``model``; does nothing but check where they are made already.

        Raises:
            Conflict: the configuration names projections that the model has not, or the factors were made for other sizes.
        """
        targets = resolve(self.config, seam_projections(model))
        if self.targets:
            if self.targets != targets:
                raise Conflict(f"{self.label} was made for a model of other sizes", hint="make another LoRA for this one")
            return
        found = seam_projections(model)
        for name, target in targets.items():
            _plant(self, name, Pair(target, _like(found[name], model)))
        self.targets = targets
        blocks = [f"blocks.{i}." for i in range(len(model.blocks))]
        self._modes = [tuple((n.removeprefix(b), t.rank) for n, t in targets.items() if n.startswith(b)) for b in blocks]

    def pair(self, name: str) -> Pair:
        """The factors of one target. Looked up by name: a view that is compiled or sharded has modules of its own."""
        module: Any = self
        for part in name.split("."):
            module = module._modules[part]
        return module

    def strength(self, step: int, num_steps: int) -> float:
        """What multiplies the addition at a step of a run; in training always the configured strength."""
        cfg = self.config
        if self.training:
            return cfg.strength
        if not cfg.window[0] <= step / num_steps < cfg.window[1]:
            return 0.0
        return cfg.strength * (interpolate(cfg.schedule, step / max(1, num_steps - 1)) if cfg.schedule else 1.0)

    def plan(self, at: At) -> Hashable:
        return (self._modes[at.block] or None) if self.strength(at.step, at.num_steps) else None

    def feed(self, at: At) -> dict[str, Tensor]:
        strength = self.strength(at.step, at.num_steps)
        if at.block not in at.memory:  # the modules may be kept for the run; their parameters come and go under sharding
            at.memory[at.block] = [(n, self.pair(f"blocks.{at.block}.{n}")) for n, _ in self._modes[at.block]]
        if (at.block, strength) not in at.memory:
            at.memory[at.block, strength] = self._scales(at.block, strength)
        given = dict(at.memory[at.block, strength])
        for name, pair in at.memory[at.block]:
            given[f"{name}.A"], given[f"{name}.B"] = pair.A, pair.B
        return given

    def _scales(self, block: int, strength: float) -> dict[str, Tensor]:
        """alpha / r times strength for each target of a block, as tensors: a number would be a constant of the graph."""
        values = {n: strength * self.targets[f"blocks.{block}.{n}"].scale for n, _ in self._modes[block]}
        return {f"{n}.scale": self.pair(f"blocks.{block}.{n}").A.new_tensor(v) for n, v in values.items()}

    def linear(self, nxt: Any, x: Tensor, site: Site) -> Tensor:
        name, given = site.branch, site.given
        if name not in dict(site.mode):  # type: ignore[call-overload]
            return nxt(x)
        return nxt(x) + F.linear(F.linear(x, given[f"{name}.A"]) * given[f"{name}.scale"], given[f"{name}.B"])

    def finish(self, run: Run) -> dict[str, Any]:
        acting = [s for s in range(run.num_steps) if self.strength(s, run.num_steps)]
        return {"active_steps": len(acting), "steps": run.num_steps}

    def delta(self, name: str) -> Tensor:
        """(alpha / r) B A of one target: (out, in) in at least fp32, what is added to its weight at strength 1."""
        pair = self.pair(name)
        dtype = torch.promote_types(pair.A.dtype, torch.float32)
        return self.targets[name].scale * (pair.B.to(dtype) @ pair.A.to(dtype))

    @torch.no_grad()
    def describe(self) -> list[Adapted]:
        """Rank, alpha, scale and largest change of each target."""
        return [Adapted(n, t.rank, t.alpha, t.scale, float(self.delta(n).abs().max())) for n, t in self.targets.items()]

    @torch.no_grad()
    def merge(self, view: Backbone) -> Backbone:
        """``view`` without this LoRA, and with W + strength (alpha / r) B A for its weights; equal up to rounding.

        The result is a view with new tensors for the adapted weights and the rest shared; other methods stay attached.

        Raises:
            Conflict: the strength varies by step, or a weight is quantised, replaced or shared by two projections.
        """
        if self.label not in view.methods:
            raise DitkitError(f"{self.label} is not attached", allowed=f"{sorted(view.methods)}", hint="with_methods(model, lora) first")
        if not self.constant:
            raise Conflict(f"{self.label} varies by step (window, schedule), merged weights cannot", hint="keep it attached")
        merged = shallow(view)
        merged.methods = nn.ModuleDict({k: m for k, m in view.methods.items() if k != self.label})
        found, seen = seam_projections(merged), set()
        strength = self.config.strength * (self.config.schedule or (1.0,))[0]
        for name in self.targets:
            module = found[name]
            if type(module) is not nn.Linear or id(module) in seen:
                reason = "shares its weight with another target" if id(module) in seen else f"is a {type(module).__name__}, no plain weight"
                raise Conflict(f"{name} {reason}", hint="merge before quantising; shared weights cannot be merged")
            seen.add(id(module))
            weight = module.weight
            total = weight + strength * self.delta(name)
            module.weight = nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)
        return merged

    @torch.no_grad()
    def swap(self, other: LoRA) -> None:
        """Take over the changes of ``other`` in place, so that compiled views of this LoRA need no new graph.

        Ranks are filled up with zeros, what ``other`` does not adapt becomes zero, and B takes in the difference of the scales;
        configuration, strength and schedule stay. Between runs, not within one.

        Raises:
            Conflict: ``other`` adapts more than this one, at a higher rank, or a model of other sizes.
        """
        for name, new in other.targets.items():
            old = self.targets.get(name)
            if old is None or new.rank > old.rank or new[2:] != old[2:]:
                has = "not at all" if old is None else f"at rank {old.rank}, {old.fan_in} -> {old.fan_out}"
                raise Conflict(
                    f"{other.label} adapts {name} at rank {new.rank}, {new.fan_in} -> {new.fan_out}; {self.label} {has}",
                    hint="attach it with with_methods",
                )
        for name, old in self.targets.items():
            pair = self.pair(name)
            pair.A.zero_()
            pair.B.zero_()
            if name in other.targets:
                source, rank = other.pair(name), other.targets[name].rank
                pair.A[:rank] = source.A
                pair.B[:, :rank] = source.B * (other.targets[name].scale / old.scale)

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(rank=3, alpha=6.0), cls(rank=2, window=(0.3, 1.0), schedule=(0.5, 1.0))]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls(rank=2), cls(strength=0.0)]


def seam_projections(model: Backbone) -> dict[str, nn.Module]:
    """What can be adapted: every projection of every block, as ``blocks.3.img.qkv``."""
    return {f"blocks.{i}.{n}": m for i, b in enumerate(model.blocks) for n, m in b.projections().items()}  # type: ignore[operator]


def resolve(config: LoRAConfig, found: Mapping[str, Any]) -> dict[str, Target]:
    """The targets that a configuration means among the projections ``found``. Raises Conflict naming what there is."""
    chosen = select(config.include, found)
    for key in {**config.ranks, **config.alphas}:
        select((key,), chosen)
    targets = {}
    for name in chosen:
        rank = lookup(config.ranks, name, config.rank)
        alpha = lookup(config.alphas, name, config.alpha)
        module = found[name]
        targets[name] = Target(rank, float(rank) if alpha is None else alpha, module.in_features, module.out_features)
    return targets


def select(include: str | Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that ``include`` means, in order; a regular expression, or a list each of which must mean some."""
    names = list(names)
    short = {n: n.split(".", 2)[2] for n in names}
    if isinstance(include, str):
        chosen = {n for n in names if re.search(include, short[n]) or re.search(include, n)}
        lost = [] if chosen else [include]
    else:
        include = list(include)
        chosen = {n for n in names if any(means(key, n) for key in include)}
        lost = [key for key in include if not any(means(key, n) for n in names)]
    if lost:
        known = sorted(set(short.values()))
        raise Conflict(f"no projection matches {lost[0]!r}", allowed=", ".join(known), hint=nearest(lost[0], known) or "name some of these")
    return [n for n in names if n in chosen]


def means(key: str, name: str) -> bool:
    """Whether the name ``key`` means the projection ``name``: it is it, or the end of it."""
    return name == key or name.endswith(f".{key}")


def lookup(values: Mapping[str, T], name: str, default: T) -> T:
    """The value under the longest key that means ``name``."""
    return max(((len(k), v) for k, v in values.items() if means(k, name)), key=lambda item: item[0], default=(0, default))[1]


def interpolate(values: tuple[float, ...], where: float) -> float:
    """Piecewise linear through ``values``, spread evenly over 0 to 1."""
    position = where * (len(values) - 1)
    i = min(int(position), len(values) - 2)
    return values[0] if len(values) == 1 else values[i] + (position - i) * (values[i + 1] - values[i])


def _like(module: nn.Module, model: Backbone) -> Tensor:
    """A tensor of the dtype and device that the factors get: the weight's, or the model's where the weight is quantised."""
    weight = getattr(module, "weight", None)
    candidates = [weight] if isinstance(weight, Tensor) else []
    return next(p for p in (*candidates, *model.parameters()) if p.is_floating_point() and p.element_size() > 1)


def _plant(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    root.add_module(last, module)
