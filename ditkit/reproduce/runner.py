"""``reproduce(name, out)``: train what is missing, measure every arm for every seed, judge the claims, write JSON and figure."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.files import write_json
from ditkit.eval.bench import commit
from ditkit.eval.counters import count_forward, parameters
from ditkit.eval.roof import machine, other_work
from ditkit.methods.specs import parse_spec
from ditkit.pipeline import Pipeline

from .bases import Base, BaseStore
from .costs import ArmCost, arm_costs, run_checks, tables, with_steps
from .figure import draw
from .measures import Measured, Real, measure
from .protocol import OF_SAMPLES, Arm, Name, Paired, Protocol, load_protocol
from .readings import Captions
from .result import Reproduction, Row
from .statistics import detectable
from .training import train_bases
from .verdicts import ClaimResult, Values, judge_paired, judge_trend

log = logging.getLogger("ditkit")
TRAINED = {"trained": False, "reused": True}


def reproduce(
    name: str | Path,
    out: str | Path,
    *,
    part: Name = "default",
    store: str | Path | None = None,
    command: str = "",
    progress: bool = True,
) -> tuple[Reproduction, Path, Path]:
    """Run an experiment; returns what was found, the JSON and the figure.

    Args:
        name: of a protocol of the package, or the path of one.
        out: folder for ``NAME.json`` and ``NAME.png`` (``NAME-full`` for the full part), and for what an interrupted run measured.
        part: "default", within minutes, or "full".
        store: folder of trained bases; by default the user's cache.

    Raises:
        DitkitError: the protocol does not fit. Stopped: a signal ended a training; the same command goes on.
    """
    protocol, out = load_protocol(name, part), Path(out)
    check_power(protocol)
    check_methods(protocol)
    if out.exists() and not out.is_dir():
        raise DitkitError(f"{out} is a file", hint="choose a folder for the results")
    stem = Path(name).stem + ("-full" if part == "full" else "")
    out.mkdir(parents=True, exist_ok=True)
    before, start = other_work(), time.perf_counter()
    real = Real(protocol.data, protocol.data_config) if protocol.reader is None else Captions(protocol, progress)
    kept = out / f"{stem}-measured"
    bases, training = train_bases(protocol, BaseStore(store), progress)
    arms = with_steps(protocol, bases, real, kept, progress)
    measured, measuring = measure_arms(protocol, arms, bases, real, kept, progress)
    costs, costing = arm_costs(protocol, bases, arms, real, progress), time.perf_counter()
    checks = run_checks(protocol, progress)
    rows, judging = rows_of(protocol, arms, bases, measured, costs), time.perf_counter()
    claims = judge(protocol, measured, {r.arm: r.macs for r in rows})
    end = time.perf_counter()
    found = Reproduction(
        name=Path(name).stem,
        part=part,
        protocol=protocol,
        protocol_sha256=hashlib.sha256(json.dumps(protocol.to_dict(), sort_keys=True).encode()).hexdigest(),
        date=datetime.date.today().isoformat(),
        machine=machine(),
        commit=commit(),
        command=command,
        others_before=before,
        others_after=other_work(),
        seconds={"training": training, "measuring": measuring, "checks": judging - costing, "judging": end - judging, "all": end - start},
        bases={what: sum(b.reused == reused for (n, _), b in bases.items() if n in protocol.bases) for what, reused in TRAINED.items()},
        real=_floor(real, protocol),
        rows=rows,
        claims=claims,
        checks=checks,
        maps=tables(protocol, bases, protocol.maps),
    )
    write_json(out / f"{stem}.json", found.to_dict())
    return found, out / f"{stem}.json", draw(found, out / f"{stem}.png")


def _floor(real: Real | Captions, protocol: Protocol) -> dict[str, Any]:
    """What real test pictures score; nothing where no claim is of samples, and nobody needs the reader."""
    if isinstance(real, Real):
        return real.floor(protocol.num_samples, protocol.read_labels)
    return real.floor(protocol.num_samples) if any(c.metric in OF_SAMPLES for c in protocol.claims.values()) else {}


def check_power(protocol: Protocol) -> None:
    """A claim may not promise to see a smaller effect than its own expected spread allows. Raises ConfigError with the number."""
    for name, claim in protocol.claims.items():
        if isinstance(claim, Paired):
            least = detectable(claim.expected.between_seeds, claim.expected.within_seed, len(protocol.seeds))
            if claim.smallest_effect < least * 0.995:
                raise ConfigError(
                    f"claim {name!r} promises to see an effect of {claim.smallest_effect:g}",
                    allowed=f"{least:.3g} or more, at the expected spread and {len(protocol.seeds)} seeds",
                    hint="more seeds or samples, or a larger smallest_effect",
                )


def check_methods(protocol: Protocol) -> None:
    """Raise DitkitError or ConfigError for methods whose settings do not exist, before anything is trained."""
    for text in [a.methods for a in protocol.arms.values()] + [c.methods for c in protocol.costs.values()]:
        if text:
            parse_spec(text).build()


def measure_arms(
    protocol: Protocol, arms: Mapping[str, Arm], bases: Mapping[tuple[str, int], Base], real: Real | Captions, store: Path, progress: bool
) -> tuple[dict[str, list[Measured]], float]:
    """Arm -> what was measured for each seed, and the seconds it took."""
    start = time.perf_counter()
    todo = [a for names in protocol.needed().values() for a in names]
    found: dict[str, list[Measured]] = {}
    for i, name in enumerate(todo):
        log.info("arm %d of %d: %s", i + 1, len(todo), name)
        arm = arms[name]
        found[name] = [measure(bases[arm.stands_on, seed], arm, seed, protocol, real, store, progress) for seed in protocol.seeds]
    compared = {name: arms[name].reference for name in todo if arms[name].reference}
    found |= {name: [m.against(r) for m, r in zip(found[name], found[reference])] for name, reference in compared.items()}
    return found, time.perf_counter() - start


def rows_of(
    protocol: Protocol,
    arms: Mapping[str, Arm],
    bases: Mapping[tuple[str, int], Base],
    measured: Mapping[str, list[Measured]],
    spent: Mapping[str, ArmCost],
) -> tuple[Row, ...]:
    """One row an arm and seed."""
    costs = {}
    for name, size in dict.fromkeys((arms[a].stands_on, arms[a].size) for a in measured):
        pipe = Pipeline.from_pretrained(bases[name, protocol.seeds[0]].folder, dtype="float32", device="cpu")
        x, t, cond = pipe.model.example(1)
        if size:
            x = x.new_zeros(1, x.shape[1], *pipe.codec.latent_shape((pipe.codec.in_channels, size, size))[1:])
        costs[name, size] = count_forward(pipe.model, inputs=(x, t, cond)).macs, parameters(pipe.model)
    rows = []
    for name, values in measured.items():
        arm = arms[name]
        passes = 1 if arm.guidance_scale == 1 else 2
        for seed, one in zip(protocol.seeds, values):
            base = bases[arm.stands_on, seed]
            rows.append(
                Row(
                    arm=name,
                    label=arm.label or name,
                    base=arm.base,
                    base_hash=base.hash,
                    seed=seed,
                    measure=arm.measure,
                    num_inference_steps=arm.num_inference_steps,
                    evaluations=arm.num_inference_steps * passes or 1,
                    macs=costs[arm.stands_on, arm.size][0],
                    parameters=costs[arm.stands_on, arm.size][1],
                    trained_seconds=base.seconds,
                    trained_threads=base.threads,
                    metrics=one.metrics(),
                    methods=arm.methods,
                    **_spent(name, protocol.baseline, spent),
                )
            )
    return tuple(rows)


def _spent(name: str, baseline: str, spent: Mapping[str, ArmCost]) -> dict[str, Any]:
    """What the pictures of an arm cost, and what is saved over the baseline."""
    if name not in spent:
        return {}
    own, base = spent[name], spent.get(baseline)
    saved = {} if base is None else {"macs_saved": 1 - own.macs / base.macs, "time_saved": 1 - own.seconds / base.seconds}
    return {"sample_macs": own.macs, "sample_seconds": own.seconds, "report": dict(own.report), **saved}


def judge(protocol: Protocol, measured: Mapping[str, list[Measured]], macs: Mapping[str, int]) -> tuple[ClaimResult, ...]:
    """A verdict for each claim."""
    results: list[ClaimResult] = []
    for name, claim in protocol.claims.items():
        values: Values = {a: [partial(m.value, claim.metric) for m in measured[a]] for a in claim.arms}
        size = measured[claim.arms[0]][0].size
        if isinstance(claim, Paired):
            results.append(judge_paired(name, claim, protocol, values, size))
        else:
            results.append(judge_trend(name, claim, protocol, values, macs, size))
    return tuple(results)
