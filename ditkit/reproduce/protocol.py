"""A protocol: everything that an experiment is, as strict plain data, written before the first run. No torch is loaded here.

A file has the default part, which ends within minutes, and under ``full`` what differs in the whole experiment.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ditkit.core.config import Config, read_data
from ditkit.core.errors import ConfigError, nearest
from ditkit.train.recipe import Recipe

HOME = Path(__file__).resolve().parents[1] / "recipes" / "reproduce"
Metric = Literal["mse", "frechet", "accuracy"]
Name = Literal["default", "full"]
OF_SAMPLES = ("frechet", "accuracy")
HIGHER_IS_BETTER = ("accuracy",)


class Arm(Config):
    """One thing that is measured, for each seed: a base's loss on held-out data, or its samples."""

    base: str = Field(description="name of a base")
    label: str = Field("", description="in tables and figures; by default the arm's name")
    measure: Literal["loss", "samples"] = Field(description="loss: mse; samples: frechet and accuracy")
    solver: str = Field("", description="of samples")
    num_inference_steps: int = Field(0, ge=0, description="of samples; one network evaluation a step (two where guided)")
    guidance_scale: float = Field(1.0, description="of samples; 1: conditional, not guided")

    @model_validator(mode="after")
    def _whole(self) -> Arm:
        if self.measure == "samples" and not (self.solver and self.num_inference_steps):
            raise ValueError("samples need a solver and num_inference_steps")
        if self.measure == "loss" and (self.solver or self.num_inference_steps or self.guidance_scale != 1):
            raise ValueError("a loss takes no solver, num_inference_steps or guidance_scale")
        return self


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
    expected: Expected
    comparisons: tuple[Comparison, ...] = Field(min_length=1)
    context: tuple[Comparison, ...] = Field((), description="reported beside them, without a verdict")

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


class Protocol(Config):
    """What is trained, measured and claimed."""

    title: str
    paper: str
    written: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="date of the protocol, before the first run")
    data: str = Field("digits", description="data set with a test split")
    seeds: tuple[int, ...] = Field(min_length=3, description="of initialisation, data order, training noise and samples")
    num_samples: int = Field(360, ge=65, description="of each arm and seed; a Fréchet distance of 64 features needs more than 64")
    draws: int = Field(16, ge=1, description="times and noises for each held-out sample of a loss")
    resamples: int = Field(400, ge=100, description="of the bootstrap")
    recipe: dict[str, Any] = Field(description="what the recipes of all bases share")
    bases: dict[str, dict[str, Any]] = Field(min_length=1, description="what each base's recipe adds")
    arms: dict[str, Arm] = Field(min_length=2)
    claims: dict[str, Claim] = Field(min_length=1)
    curves: tuple[Curves, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Protocol:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} are not distinct")
        for fault in itertools.chain(self._unknown_bases(), self._unknown_arms(), self._unknown_origins()):
            raise ValueError(fault)
        return self

    def _unknown_bases(self) -> Iterator[str]:
        for name, arm in self.arms.items():
            if arm.base not in self.bases:
                yield f"arm {name!r} is of base {arm.base!r}; known: {', '.join(self.bases)}"

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
        for where, metric, arms in used:
            for name in arms:
                if name not in self.arms:
                    yield f"{where} names arm {name!r}; known: {', '.join(self.arms)}"
                elif (self.arms[name].measure == "samples") != (metric in OF_SAMPLES):
                    yield f"{where} needs {metric} of arm {name!r}, which measures its {self.arms[name].measure}"

    def recipe_of(self, base: str, seed: int, folders: Mapping[str, str] | None = None) -> Recipe:
        """The training recipe of one base. Raises ConfigError naming the base.

        Args:
            folders: where the bases are that this one builds on, by what the file says of them: ``@NAME`` or ``@NAME:CUT``.
        """
        values = merged(merged(self.recipe, self.bases[base]), {"trainer": {"seed": seed}, "data": {"name": self.data}})
        return Recipe.parse(replaced(values, folders or {}), f"base {base}")

    def builds_on(self, base: str) -> list[str]:
        """What a base's recipe names of other bases: ``@NAME``, or ``@NAME:CUT`` for one with fewer blocks (``reproduce/cuts.py``)."""
        return [text for text in strings(self.bases[base]) if text.startswith("@")]

    def needed(self) -> dict[str, list[str]]:
        """The arms that a claim or a curve uses, by base, in the order of the file; also bases that others of these build on."""
        used = {a for c in self.claims.values() for a in c.arms} | {a for c in self.curves for s in c.series for a in s.arms}
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
        protocol.recipe_of(base, protocol.seeds[0])
    return protocol


def protocols() -> dict[str, Path]:
    """The experiments of the package: name -> file."""
    return {path.stem: path for path in sorted(HOME.glob("*.yaml"))}


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
