"""A protocol: everything that an experiment is, as strict plain data, written before the first run. No torch is loaded here.

A file has the default part, which ends within minutes, and under ``full`` what differs in the whole experiment.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ditkit.bundle import Part
from ditkit.core import registry
from ditkit.core.config import Config, read_data
from ditkit.core.errors import ConfigError, nearest
from ditkit.train.recipe import Recipe

from .starts import Start

HOME = Path(__file__).resolve().parents[1] / "recipes" / "reproduce"
READ = ("object", "color", "relation", "extra")  # by the reader of scenes: shares of what captions name, and things beyond
Metric = Literal["mse", "frechet", "accuracy", "drift", "object", "color", "relation", "extra"]
Name = Literal["default", "full"]
OF_SAMPLES = ("frechet", "accuracy", "drift", *READ)
HIGHER_IS_BETTER = ("accuracy", "object", "color", "relation")


class Arm(Config):
    """One thing that is measured, for each seed: a base's loss on held-out data, or its samples."""

    base: str = Field(description="name of a base")
    label: str = Field("", description="in tables and figures; by default the arm's name")
    start: str = Field("", description="what the base is turned into before, untrained: one of the protocol's starts")
    measure: Literal["loss", "samples"] = Field(description="loss: mse; samples: frechet, accuracy, and drift where there is a reference")
    methods: str = Field("", description="attached to the base, as ditkit bench writes them: fora:interval=2, compile:engine=openvino")
    solver: str = Field("", description="of samples")
    num_inference_steps: int = Field(0, ge=0, description="of samples; one network evaluation a step (two where guided)")
    equal_time_to: str = Field("", description="instead of num_inference_steps: as many as take the measured time of that arm")
    guidance_scale: float = Field(1.0, description="of samples; 1: conditional, not guided")
    size: int = Field(0, ge=0, description="side of samples; 0: as in training")
    reference: str = Field("", description="the arm from whose pictures, of the same noise, drift is measured")

    @model_validator(mode="after")
    def _whole(self) -> Arm:
        if self.measure == "samples" and not (self.solver and bool(self.num_inference_steps) != bool(self.equal_time_to)):
            raise ValueError("samples need a solver, and num_inference_steps or equal_time_to")
        if self.measure == "loss":
            if self.solver or self.num_inference_steps or self.equal_time_to or self.reference or self.size or self.guidance_scale != 1:
                raise ValueError("a loss takes no solver, num_inference_steps, equal_time_to, reference, size or guidance_scale")
        return self

    @property
    def stands_on(self) -> str:
        """The base, or ``BASE:START`` for what it is turned into."""
        return f"{self.base}:{self.start}" if self.start else self.base

    @field_validator("methods")
    @classmethod
    def _exist(cls, methods: str) -> str:
        known = [*registry.entries("methods"), "compile"]
        for name in (part.partition(":")[0].strip() for part in methods.split("+") if methods):
            if name not in known:
                raise ValueError(f"there is no method {name!r}; {nearest(name, known) or 'ditkit list methods'}")
        return methods


class Comparison(Config):
    """Two arms, over the same data, noise and seeds."""

    method: str = Field(description="the arm that should be better")
    baseline: str = Field(description="the arm that it is compared with")


class Expected(Config):
    """Spread expected before the first run, from which the smallest effect is computed."""

    between_seeds: float = Field(gt=0, description="standard deviation of the effect between training seeds")
    within_seed: float = Field(gt=0, description="standard deviation of one seed's effect from its finite number of samples")
    why: str = Field(min_length=1, description="where these two come from")


class Paired(Config):
    """The method's arms are better than their baselines: all of ``comparisons`` must be shown."""

    kind: Literal["paired"]
    hypothesis: str = Field(min_length=1)
    metric: Metric
    relative: bool = Field(False, description="the effect is a share of the baseline's value")
    smallest_effect: float = Field(gt=0, description="that is detected with 80 % power if the spread is as expected")
    margin: float = Field(
        0.0, ge=0, description="claim that the method is not worse by more than this (then the smallest effect too); 0: that it is better"
    )
    expected: Expected
    comparisons: tuple[Comparison, ...] = Field(min_length=1)
    context: tuple[Comparison, ...] = Field((), description="reported beside them, without a verdict")

    @model_validator(mode="after")
    def _margin_is_seen(self) -> Paired:
        if self.margin and self.margin != self.smallest_effect:
            raise ValueError(f"margin {self.margin:g} is not the smallest effect, {self.smallest_effect:g}: what is excluded must be seen")
        return self

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms that the claim needs."""
        return tuple(dict.fromkeys(a for c in self.comparisons + self.context for a in (c.method, c.baseline)))


class Trend(Config):
    """The metric gets better with the network's multiply-adds, over all ``arms``."""

    kind: Literal["trend"]
    hypothesis: str = Field(min_length=1)
    metric: Metric
    arms: tuple[str, ...] = Field(min_length=4, description="at least 4: of 3 even a perfect order has p = 1/6")
    smallest_effect: float = Field(gt=0, le=1, description="smallest |rho| whose exact one-sided p is at most 0.05")


Claim = Annotated[Paired | Trend, Field(discriminator="kind")]


class Series(Config):
    """A line of a figure, through arms that differ in their number of steps."""

    label: str
    arms: tuple[str, ...] = Field(min_length=2)


class Curves(Config):
    """A figure's panel: a metric over the number of network evaluations."""

    metric: Literal["frechet", "accuracy"]
    series: tuple[Series, ...] = Field(min_length=1)


class Pareto(Config):
    """A figure's panel: a metric over what a picture costs, one point an arm, and the front of those that none beats in both."""

    metric: Literal["frechet", "drift"]
    cost: Literal["seconds", "macs"] = "seconds"
    arms: tuple[str, ...] = Field(min_length=2)


class CostCheck(Config):
    """A saving that must hold whatever the verdicts: of a network with random weights, one trajectory of evaluations."""

    backbone: str = Field("dit", description="which network")
    size: str = Field("DiT-S/2", description="in its paper's table")
    config: dict[str, Any] = Field({}, description="settings that differ from that size, of both networks")
    changes: dict[str, Any] = Field({}, description="settings that make it cheaper")
    methods: str = Field("", description="or methods that do")
    against: Part | None = Field(None, description="or another network instead")
    batch: int = Field(2, ge=1)
    num_steps: int = Field(1, ge=1, description="evaluations, a run of a solver's steps")
    compile: Literal["", "block", "step"] = Field("step", description="both are timed compiled by this grain")
    least_macs_saved: float = Field(0.0, ge=0, lt=1, description="share of the multiply-adds that must be saved")
    least_speedup: float = Field(1.0, ge=0, description="of the median time")


class Protocol(Config):
    """What is trained, measured and claimed."""

    title: str
    paper: str
    written: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="date of the protocol, before the first run")
    data: str = Field("digits", description="data set with a test split")
    data_config: dict[str, Any] = Field({}, description="options of that data set")
    seeds: tuple[int, ...] = Field(min_length=3, description="of initialisation, data order, training noise and samples")
    num_samples: int = Field(360, ge=65, description="of each arm and seed; a Fréchet distance of 64 features needs more than 64")
    draws: int = Field(16, ge=1, description="times and noises for each held-out sample of a loss")
    held_out: int = Field(10_000, ge=2, description="held-out samples of a loss, at most")
    read_labels: bool = Field(True, description="measure accuracy of samples: only where pixels in place tell the class")
    reader: dict[str, Any] | None = Field(
        None, description="samples are told captions of scenes, and read by a reader of the data's world but for these of its options"
    )
    timed: int = Field(16, ge=1, description="pictures in one batch when arms are timed")
    resamples: int = Field(400, ge=100, description="of the bootstrap")
    recipe: dict[str, Any] = Field(description="what the recipes of all bases share")
    bases: dict[str, dict[str, Any]] = Field(
        min_length=1, description="what each base's recipe adds; {bundle: NAME} is one that is trained already"
    )
    starts: dict[str, Start] = Field({}, description="what '@NAME:START' turns a base into before it is trained on")
    shared: tuple[str, ...] = Field((), description="bases that are trained once, with the first seed, for all seeds")
    every_sample: dict[str, Any] = Field({}, description="what all arms of samples share, unless they say otherwise")
    arms: dict[str, Arm] = Field(min_length=2)
    claims: dict[str, Claim] = Field(min_length=1)
    curves: tuple[Curves, ...] = ()
    pareto: tuple[Pareto, ...] = ()
    baseline: str = Field("", description="the arm over which others save multiply-adds and time")
    maps: tuple[str, ...] = Field((), description="arms whose learned tables of reuse are drawn")
    costs: dict[str, CostCheck] = Field({}, description="savings that must hold, of networks with random weights")

    @model_validator(mode="before")
    @classmethod
    def _share(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("arms"), Mapping):
            return values
        return {**values, "arms": {name: _arm(values.get("every_sample") or {}, arm) for name, arm in values["arms"].items()}}

    @model_validator(mode="after")
    def _consistent(self) -> Protocol:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} are not distinct")
        faults = (self._unknown_bases(), self._unknown_arms(), self._unknown_origins(), self._unknown_references(), self._whole_bundles())
        for fault in itertools.chain(*faults):
            raise ValueError(fault)
        return self

    def _unknown_bases(self) -> Iterator[str]:
        for name, arm in self.arms.items():
            if arm.base not in self.bases:
                yield f"arm {name!r} is of base {arm.base!r}; known: {', '.join(self.bases)}"
            if arm.start and arm.start not in self.starts:
                yield f"arm {name!r} has start {arm.start!r}; known: {', '.join(self.starts) or 'none'}"
        for base in set(self.shared) - set(self.bases):
            yield f"shared names base {base!r}; known: {', '.join(self.bases)}"

    def _whole_bundles(self) -> Iterator[str]:
        for base, values in self.bases.items():
            if "bundle" in values and len(values) > 1:
                yield f"base {base!r} is a bundle, trained already: it takes no {', '.join(k for k in values if k != 'bundle')}"

    def _unknown_references(self) -> Iterator[str]:
        """What arms say of each other: a reference and an arm of equal time are samples with steps of their own."""
        named = [(f"{key} of arm {name!r}", getattr(arm, key)) for name, arm in self.arms.items() for key in ("reference", "equal_time_to")]
        named += [("baseline", self.baseline), *(("maps", name) for name in self.maps)]
        for where, name in named:
            if name and (name not in self.arms or not self.arms[name].num_inference_steps):
                yield f"{where} is {name!r}; it wants an arm of samples with num_inference_steps"

    def _unknown_origins(self) -> Iterator[str]:
        earlier: list[str] = []
        for base in self.bases:
            for text in self.builds_on(base):
                if name_of(text) not in earlier:
                    yield f"base {base!r} builds on {text!r}; before it stand: {', '.join(earlier) or 'none'}"
            earlier.append(base)

    def _unknown_arms(self) -> Iterator[str]:
        used = [(f"claim {name!r}", c.metric, c.arms) for name, c in self.claims.items()]
        used += [("a curve", c.metric, s.arms) for c in self.curves for s in c.series]
        used += [("pareto", p.metric, p.arms) for p in self.pareto]
        for where, metric, arms in used:
            for name in arms:
                if name not in self.arms:
                    yield f"{where} names arm {name!r}; known: {', '.join(self.arms)}"
                elif (self.arms[name].measure == "samples") != (metric in OF_SAMPLES):
                    yield f"{where} needs {metric} of arm {name!r}, which measures its {self.arms[name].measure}"
                elif metric == "drift" and not self.arms[name].reference:
                    yield f"{where} needs drift of arm {name!r}, which has no reference"
                elif metric in OF_SAMPLES and (metric in READ) != (self.reader is not None):
                    yield f"{where} needs {metric} of arm {name!r}; {', '.join(READ)} are of experiments with a reader, no others are"
                elif metric == "accuracy" and not self.read_labels:
                    yield f"{where} needs accuracy of arm {name!r}, and read_labels is false"

    def recipe_of(self, base: str, seed: int, folders: Mapping[str, str] | None = None) -> Recipe:
        """The training recipe of one base. Raises ConfigError naming the base.

        Args:
            folders: where the bases are that this one builds on, by what the file says of them: ``@NAME`` or ``@NAME:CUT``.
        """
        world = {"data": {"name": self.data, "config": self.data_config}}
        values = merged(merged(world, merged(self.recipe, self.bases[base])), {"trainer": {"seed": self.seed_of(base, seed)}})
        return Recipe.parse(replaced(values, folders or {}), f"base {base}")

    def seed_of(self, base: str, seed: int) -> int:
        """With which seed a base is trained for the arms of ``seed``."""
        return self.seeds[0] if base in self.shared else seed

    def bundle_of(self, base: str) -> str | None:
        """The bundle that a base is, if it is trained already."""
        return self.bases[base].get("bundle")

    def builds_on(self, base: str) -> list[str]:
        """What a base's recipe names of other bases: ``@NAME``, ``@NAME:START`` for what it is turned into, ``@NAME:CUT`` for one with
        fewer blocks (``reproduce/cuts.py``)."""
        return [text for text in strings(self.bases[base]) if text.startswith("@")]

    def needed(self) -> dict[str, list[str]]:
        """The arms that a claim or a panel uses, by base, in the order of the file; also bases that others of these build on."""
        used = {a for c in self.claims.values() for a in c.arms} | {a for c in self.curves for s in c.series for a in s.arms}
        used |= {a for p in self.pareto for a in p.arms} | {*self.maps, self.baseline}
        used |= {name for a in used & set(self.arms) for name in (self.arms[a].reference, self.arms[a].equal_time_to)}
        arms = {b: [n for n, a in self.arms.items() if a.base == b and n in used] for b in self.bases}
        wanted = {b for b in self.bases if arms[b]}
        for base in reversed(self.bases):  # what a base builds on stands before it
            wanted |= {name_of(text) for text in self.builds_on(base)} if base in wanted else set()
        return {b: arms[b] for b in self.bases if b in wanted}


def load_protocol(name: str | Path, part: Name = "default") -> Protocol:
    """The protocol of that name, or in that file. Raises ConfigError naming what there is."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = protocols()
        if str(name) not in known:
            raise ConfigError(f"there is no experiment {str(name)!r}", allowed=", ".join(known), hint=nearest(str(name), known))
        path = known[str(name)]
    values = read_data(path)
    if not isinstance(values, dict) or not isinstance(values.get("full", {}), dict):
        raise ConfigError(f"{path} is no protocol", allowed="a mapping; 'full' is one too")
    full = values.pop("full", {})
    protocol = Protocol.parse(values if part == "default" else merged(values, full), str(path))
    for base in protocol.bases:
        if protocol.bundle_of(base) is None:
            protocol.recipe_of(base, protocol.seeds[0])
    return protocol


def protocols() -> dict[str, Path]:
    """The experiments of the package: name -> file."""
    return {path.stem: path for path in sorted(HOME.glob("*.yaml"))}


def _arm(shared: Mapping[str, Any], own: Any) -> Any:
    """What an arm says, with what all samples share; steps of its own or equal time exclude each other."""
    if not isinstance(own, Mapping) or own.get("measure", "samples") != "samples":
        return own
    return {**{k: v for k, v in shared.items() if not (k == "num_inference_steps" and own.get("equal_time_to"))}, **own}


def name_of(text: str) -> str:
    """``@NAME:CUT`` -> ``NAME``."""
    return text.removeprefix("@").partition(":")[0]


def strings(values: Any) -> Iterator[str]:
    """All texts in plain data."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from strings(value)


def replaced(values: Any, texts: Mapping[str, str]) -> Any:
    """Plain data with other texts for some."""
    if isinstance(values, Mapping):
        return {key: replaced(value, texts) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(replaced(value, texts) for value in values)
    return texts.get(values, values) if isinstance(values, str) else values


def merged(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """``a`` with what ``b`` says instead; sections are merged, everything else (lists too) is replaced."""
    out = dict(a)
    for key, value in b.items():
        out[key] = merged(out[key], value) if isinstance(out.get(key), Mapping) and isinstance(value, Mapping) else value
    return out
