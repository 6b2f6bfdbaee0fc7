"""Pipelines side by side: cost, time and quality of each from the same seeds, with the honest baseline of every accelerator,
the base with so few steps that it takes the same time.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ditkit.conditioning.inputs import takes_text
from ditkit.core.errors import DitkitError
from ditkit.methods.specs import Spec, parse_spec
from ditkit.output import Output
from ditkit.pipeline import Pipeline

from .bench import BenchResult, Candidate, interleave, run_bench
from .captions import CaptionJudge
from .counters import count, parameters, weight_bytes
from .drift import drift
from .features import Extractor, in_chunks
from .metrics import Array
from .quality import Judge, Quality, feature_drift

EXACT = 1e-4  # a variant this close to the base is as good: fewer steps are no rival to it


@dataclass(frozen=True)
class Variant:
    """A pipeline under a name. ``eager`` is the same uncompiled, for counting."""

    name: str
    pipe: Pipeline
    eager: Pipeline
    compilation: str = ""  # as Spec.compilation
    num_inference_steps: int | None = None  # None: the bundle's
    equal_time_to: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """Labels of what is attached."""
        return tuple(m.label for m in self.eager.model.attached)


@dataclass(frozen=True)
class Setting:
    """What every variant is asked for.

    ``num_images`` are timed in one batch; quality is measured on ``num_samples``, made in batches of the same size.
    """

    num_images: int = 60
    num_samples: int = 360
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    seed: int = 0
    repeats: int = 25
    warmups: int = 3


@dataclass(frozen=True)
class Samples:
    """Samples of a variant, x (N, C, H, W), what its methods reported, and the seconds of the very first batch."""

    x: Tensor
    cold: float
    report: Mapping[str, Mapping[str, Any]]


def variants(pipes: Mapping[str, Pipeline], specs: Sequence[Spec] = ()) -> list[Variant]:
    """The pipelines, and the first of them with each spec; a compiled accelerator brings the compiled base with it."""
    found = [Variant(name, pipe, pipe) for name, pipe in pipes.items()]
    base = found[0]
    ways = dict.fromkeys(s.compilation for s in specs if s.compilation)
    plain = [parse_spec(way) for way in ways if not any(s.compilation == way and not s.methods for s in specs)]
    for spec in (*plain, *specs):
        eager = base.pipe.with_methods(*spec.build()) if spec.methods else base.pipe
        found.append(Variant(spec.text, spec.compiled(eager), eager, spec.compilation))
    if len({v.name for v in found}) < len(found):
        raise DitkitError(f"{[v.name for v in found]}", allowed="every bundle and every spec once")
    return found


def compare_pipelines(
    todo: Sequence[Variant],
    setting: Setting,
    judge: Judge | CaptionJudge | None = None,
    *,
    drift_on: Extractor | None = None,
    suite: str = "pipelines",
    command: str = "",
    progress: bool = True,
) -> tuple[BenchResult, dict[str, Samples]]:
    """Benchmark variants; the first is the base. Returns the result and the samples of each row, by name.

    Outputs are compared and judged first, then fewer-step rows are added, then everything is timed interleaved.

    Args:
        judge: of the samples; a ``CaptionJudge`` of as many captions as there are samples.
        drift_on: an extractor on whose features each variant's drift from the base is measured too.
    """
    work = _Work(setting, judge, drift_on, progress)
    for v in todo:
        work.add(v)
    work.add_fewer_steps(todo)
    device = todo[0].pipe.device
    result = run_bench(
        [work.candidates[v.name] for v in work.order],
        suite=suite,
        repeats=setting.repeats,
        warmups=setting.warmups,
        device=str(device),
        dtype=next(todo[0].eager.model.parameters()).dtype,
        command=command,
        progress=progress,
    )
    return result, work.samples


class _Work:
    """Builds the candidates, one variant after the other."""

    def __init__(self, setting: Setting, judge: Judge | CaptionJudge | None, drift_on: Extractor | None, progress: bool) -> None:
        self.setting, self.judge, self.drift_on, self.progress = setting, judge, drift_on, progress
        self._base: Array | None = None  # features of the base's samples
        if judge is not None:
            judge.check_number(setting.num_samples)
        self.order: list[Variant] = []
        self.candidates: dict[str, Candidate] = {}
        self.samples: dict[str, Samples] = {}

    def steps(self, v: Variant) -> int:
        return v.num_inference_steps or self.setting.num_inference_steps or v.pipe.config.sampling.num_inference_steps

    def sample(self, pipe: Pipeline, steps: int, told: Sequence[Any], first: int = 0, progress: bool = False) -> Output:
        """One call of a pipeline with the setting, for the pictures from number ``first`` on, of these labels or captions."""
        s = self.setting
        what: dict[str, Any] = {"prompt" if takes_text(pipe.model) else "class_labels": list(told)}
        options: dict[str, Any] = {"guidance_scale": s.guidance_scale, "solver": s.solver, "batch_size": s.num_images}
        return pipe(**what, num_inference_steps=steps, seed=s.seed + first, progress=progress, **options)

    def add(self, v: Variant, place: int | None = None) -> None:
        """Make its samples, judge them, count its cost."""
        steps = self.steps(v)
        self.samples[v.name] = made = self._samples(v, steps)
        timed = self._told(v.pipe, self.setting.num_images)
        reference = self.samples[(self.order or [v])[0].name].x
        self.order.insert(len(self.order) if place is None else place, v)
        self.candidates[v.name] = Candidate(
            name=v.name,
            call=lambda: self.sample(v.pipe, steps, timed).x,
            items=self.setting.num_images,
            cost=count(lambda: self.sample(v.eager, steps, timed), v.eager.model),
            parameters=parameters(v.eager.model),
            weight_bytes=weight_bytes(v.eager.model),
            num_inference_steps=steps,
            methods=v.methods,
            equal_time_to=v.equal_time_to,
            notes=notes_of(made.report),
            drift=drift(made.x, reference),
            cold=made.cold,
            quality=self._quality(made.x),
        )

    def add_fewer_steps(self, todo: Sequence[Variant]) -> None:
        """After each lossy accelerator: the base, compiled alike, with the steps that its time allows."""
        lossy = [v for v in todo if v.methods and self._is_lossy(v)]
        if not lossy:
            return
        calls = {v.name: self.candidates[v.name].call for v in self.order}
        times = interleave(calls, repeats=3, warmups=1, device=str(todo[0].pipe.device), progress=self.progress)
        for v in lossy:
            base = next((u for u in todo if not u.methods and u.compilation == v.compilation), todo[0])
            steps = max(1, round(self.steps(base) * times[v.name].median / times[base.name].median))
            if steps >= self.steps(base):
                self._note(v.name, "not faster than the base here, so no row with fewer steps")
                continue
            self._add_rival(base, v, steps)

    def _add_rival(self, base: Variant, v: Variant, steps: int) -> None:
        name = f"{base.name}, {steps} steps"
        if name in self.candidates:
            old = self.candidates[name]
            self.candidates[name] = replace(old, equal_time_to=(*old.equal_time_to, v.name))
        else:
            place = next(i for i, u in enumerate(self.order) if u.name == v.name) + 1
            self.add(replace(base, name=name, num_inference_steps=steps, equal_time_to=(v.name,)), place)

    def _is_lossy(self, v: Variant) -> bool:
        found = self.candidates[v.name].drift
        return found is None or found.relative_l2 > EXACT

    def _note(self, name: str, text: str) -> None:
        self.candidates[name] = replace(self.candidates[name], notes=(*self.candidates[name].notes, text))

    def _told(self, pipe: Pipeline, num: int) -> list[Any]:
        """What the pictures are asked to show: the judge's labels, some captions of the test data in turn, or all classes in turn."""
        if self.judge is not None:
            return self.judge.told(num)
        if takes_text(pipe.model):
            captions = pipe.config.data.captions
            if not captions:
                raise DitkitError("the bundle names no captions to sample", hint="config.json, data.captions")
            return [captions[k % len(captions)] for k in range(num)]
        return [k % pipe.model.config.num_classes for k in range(num)]

    def _samples(self, v: Variant, steps: int) -> Samples:
        """All in whole batches, so that a compiled network sees one shape; what is too many is dropped."""
        num, batch = self.setting.num_samples, self.setting.num_images
        told = self._told(v.pipe, math.ceil(num / batch) * batch)
        if self.progress:
            tqdm.write(f"samples of {v.name}: {num}, {steps} steps", file=sys.stderr)
        start = time.perf_counter()
        out = self.sample(v.pipe, steps, told[:batch])
        cold = time.perf_counter() - start
        rest = [self.sample(v.pipe, steps, told[batch:], batch, self.progress).x] if len(told) > batch else []
        return Samples(torch.cat([out.x, *rest])[:num], cold, out.report["methods"])

    def _quality(self, x: Tensor) -> Quality | None:
        """The judge's figures, and the drift of features from the first variant's."""
        judge, e = self.judge, self.drift_on
        known: dict[str, Array] = {} if judge is None else judge.distances.features(x)
        scores = () if judge is None else judge(x, judge.told(len(x)), full=False, features=known).scores  # type: ignore[arg-type]
        if e is None:
            return Quality(scores) if scores else None
        mine = known[e.name] if e.name in known else in_chunks(e, x)
        self._base = mine if self._base is None else self._base
        return Quality((*scores, feature_drift(e, mine, self._base)))


def notes_of(report: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """What methods say of a run, for the row: their ``note`` (such as "fake quantisation"), and a cache that never hit."""
    notes = []
    for label, figures in report.items():
        if note := figures.get("note"):
            notes.append(f"{label}: {note}")
        if figures.get("hits") == 0:
            notes.append(f"WARNING: {label} is on and had 0 hits: it did nothing")
        plain = [f"{k} {v}" for k, v in figures.items() if k != "note" and isinstance(v, int | float | str)]
        if plain:
            notes.append(f"{label}: {', '.join(plain)}")
    return tuple(notes)
