"""What arms cost: multiply-adds counted and time measured, in turn with each other; and savings that must hold whatever the verdicts.

Costs are those of the first seed's base. An arm of equal time gets its number of steps here, before anything of it is measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.config import read_data
from ditkit.core.files import write_json
from ditkit.core.run import Run
from ditkit.core.view import compile_view, with_methods
from ditkit.eval.bench import interleave
from ditkit.eval.counters import count, count_run
from ditkit.methods.efficiency._router import Router
from ditkit.methods.specs import parse_spec
from ditkit.pipeline import Pipeline

from .bases import Base
from .measures import PICTURES_A_SEED, Real, pipeline_of, sample
from .protocol import Arm, CostCheck, Protocol
from .readings import Captions

Bases = Mapping[tuple[str, int], Base]
REPEATS, WARMUPS = 3, 1
CHECK_REPEATS, CHECK_WARMUPS = 7, 2


@dataclass(frozen=True)
class ArmCost:
    """Of one picture: multiply-adds of the whole sampling and the median seconds, in one batch; and what the methods reported."""

    macs: float
    seconds: float
    report: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class CheckResult:
    """A saving: figures are of the whole run, of ``batch`` pictures. ``holds``: both least savings are met."""

    name: str
    check: dict[str, Any]
    base_macs: int
    macs: int
    macs_saved: float
    base_seconds: float
    seconds: float
    speedup: float
    holds: bool


# ---- arms -------------------------------------------------------------------------------------------------------------------


def with_steps(protocol: Protocol, bases: Bases, real: Real | Captions, store: Path, progress: bool = True) -> dict[str, Arm]:
    """The protocol's arms, those of equal time with their number of steps: n t' / t, n and t' the steps and the time of the arm that they
    are equal to, t their own time with n steps. What was once chosen for these bases stands."""
    arms = dict(protocol.arms)
    used = [name for names in protocol.needed().values() for name in names]
    equal = {name: arms[name].equal_time_to for name in used if arms[name].equal_time_to}
    if not equal:
        return arms
    path = store / f"steps-{_key(protocol, bases, equal)}.json"
    chosen = read_data(path) if path.is_file() else _choose(protocol, bases, real, equal, progress)
    store.mkdir(parents=True, exist_ok=True)
    write_json(path, chosen)
    for name, steps in chosen.items():
        label = f"{arms[name].label or name} ({steps})"
        arms[name] = arms[name].model_copy(update={"num_inference_steps": steps, "equal_time_to": "", "label": label})
    return arms


def _key(protocol: Protocol, bases: Bases, equal: Mapping[str, str]) -> str:
    arms = sorted({*equal, *equal.values()})
    content = [(name, protocol.arms[name].to_dict(), bases[protocol.arms[name].stands_on, protocol.seeds[0]].hash) for name in arms]
    return hashlib.sha256(json.dumps([content, protocol.timed], sort_keys=True).encode()).hexdigest()[:16]


def _choose(protocol: Protocol, bases: Bases, real: Real | Captions, equal: Mapping[str, str], progress: bool) -> dict[str, int]:
    steps = {name: protocol.arms[target].num_inference_steps for name, target in equal.items()}
    todo = {target: protocol.arms[target] for target in equal.values()}
    todo |= {name: protocol.arms[name].model_copy(update={"num_inference_steps": n}) for name, n in steps.items()}
    calls = {name: _call(protocol, bases, arm, real)[0] for name, arm in todo.items()}
    times = {name: t.median for name, t in interleave(calls, repeats=REPEATS, warmups=WARMUPS, progress=progress).items()}
    return {name: max(1, round(steps[name] * times[target] / times[name])) for name, target in equal.items()}


def arm_costs(
    protocol: Protocol, bases: Bases, arms: Mapping[str, Arm], real: Real | Captions, progress: bool = True
) -> dict[str, ArmCost]:
    """Of all arms of samples that are needed."""
    used = [name for names in protocol.needed().values() for name in names if arms[name].measure == "samples"]
    calls, macs, reports = {}, {}, {}
    for name in used:
        calls[name], eager = _call(protocol, bases, arms[name], real)
        cost, reports[name] = _counted(protocol, eager, arms[name], real)
        macs[name] = cost / protocol.timed
    if not calls:
        return {}
    times = interleave(calls, repeats=REPEATS, warmups=WARMUPS, progress=progress)
    return {n: ArmCost(macs[n], times[n].median / protocol.timed, reports[n]) for n in used}


def _call(protocol: Protocol, bases: Bases, arm: Arm, real: Real | Captions) -> tuple[Callable[[], Tensor], Pipeline]:
    pipe, eager = pipeline_of(bases[arm.stands_on, protocol.seeds[0]], arm)
    asked, first = real.asks(protocol.timed), protocol.seeds[0] * PICTURES_A_SEED
    return lambda: sample(pipe, arm, asked, first, protocol.timed), eager


def _counted(protocol: Protocol, eager: Pipeline, arm: Arm, real: Real | Captions) -> tuple[int, Mapping[str, Mapping[str, Any]]]:
    reports: list[Any] = []
    asked, size = real.asks(protocol.timed), arm.size or None
    options: dict[str, Any] = {"num_inference_steps": arm.num_inference_steps, "guidance_scale": arm.guidance_scale, "solver": arm.solver}

    def call() -> None:
        first = protocol.seeds[0] * PICTURES_A_SEED
        out = eager(**asked, **options, height=size, width=size, seed=first, batch_size=protocol.timed, progress=False)
        reports.append(out.report)

    cost = count(call, eager.model)
    return cost.macs, reports[0]["methods"]


def tables(protocol: Protocol, bases: Bases, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The learned tables of arms, by seed: which branches are reused, steps x branches, 1 or 0."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        arm = protocol.arms[name]
        for seed in protocol.seeds:
            _, eager = pipeline_of(bases[arm.stands_on, seed], arm)
            router = next(m for m in eager.eager.attached if isinstance(m, Router))
            branches = [f"{block}.{branch}" for block, branch in router.columns]
            found.setdefault(name, {"branches": branches})[str(seed)] = (~router.computed()).int().tolist()
    return found


# ---- checks -----------------------------------------------------------------------------------------------------------------


def run_checks(protocol: Protocol, progress: bool = True) -> tuple[CheckResult, ...]:
    """All of the protocol's, one after the other; of each, both networks in turn."""
    return tuple(_check(name, check, progress) for name, check in protocol.costs.items())


def _check(name: str, check: CostCheck, progress: bool) -> CheckResult:
    whole, small = networks(check)
    base_macs, macs = (count_run(u, check.num_steps, check.batch).macs for u in networks(check, "meta"))
    calls = {"base": _evaluations(whole, check), "method": _evaluations(small, check)}
    times = interleave(calls, repeats=CHECK_REPEATS, warmups=CHECK_WARMUPS, progress=progress)
    before, after = times["base"].median, times["method"].median
    saved, speedup = 1 - macs / base_macs, before / after
    holds = saved >= check.least_macs_saved and speedup >= check.least_speedup
    return CheckResult(name, check.to_dict(), base_macs, macs, saved, before, after, speedup, holds)


def networks(check: CostCheck, device: str = "cpu") -> tuple[Backbone, Backbone]:
    """The network with random weights, and the cheaper one."""
    cls: Any = registry.get("backbones", check.backbone)
    config = {**cls.sizes[check.size], **check.config}
    with torch.device(device):
        whole = cls(**config).eval()
        small = cls(**{**config, **check.changes}).eval() if check.changes else whole
        if check.against is not None:
            small = registry.get("backbones", check.against.name)(**check.against.config).eval()
        return whole, with_methods(small, *parse_spec(check.methods).build()) if check.methods else small


def _evaluations(model: Backbone, check: CostCheck) -> Callable[[], Tensor]:
    """A run of ``num_steps`` evaluations, as a solver makes them."""
    view = compile_view(model, check.compile, num_steps=check.num_steps) if check.compile else model
    x, t, cond = model.example(check.batch)

    @torch.no_grad()
    def call() -> Tensor:
        prepared, run, out = view.prepare(**cond), Run(view, check.num_steps), x
        for _ in run.steps():
            out = run.close(view(x, t, prepared, run=run))
        return out

    return call
