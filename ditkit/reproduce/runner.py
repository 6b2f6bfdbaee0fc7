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

from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.files import write_json
from ditkit.eval.bench import commit
from ditkit.eval.counters import count_forward, parameters
from ditkit.eval.roof import machine, other_work
from ditkit.pipeline import Pipeline

from .bases import Base, BaseStore
from .cuts import origin
from .figure import draw
from .measures import Measured, Real, measure
from .protocol import Name, Paired, Protocol, load_protocol, name_of
from .result import Reproduction, Row
from .statistics import detectable
from .verdicts import ClaimResult, Values, judge_paired, judge_trend

log = logging.getLogger("ditkit")


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
    if out.exists() and not out.is_dir():
        raise DitkitError(f"{out} is a file", hint="choose a folder for the results")
    stem = Path(name).stem + ("-full" if part == "full" else "")
    out.mkdir(parents=True, exist_ok=True)
    before, start = other_work(), time.perf_counter()
    real = Real(protocol.data)
    bases, training = train_bases(protocol, BaseStore(store), progress)
    measured, measuring = measure_arms(protocol, bases, real, out / f"{stem}-measured", progress)
    rows, judging = rows_of(protocol, bases, measured), time.perf_counter()
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
        seconds={"training": training, "measuring": measuring, "judging": end - judging, "all": end - start},
        bases={"trained": sum(not b.reused for b in bases.values()), "reused": sum(b.reused for b in bases.values())},
        real=real.floor(protocol.num_samples),
        rows=rows,
        claims=claims,
    )
    write_json(out / f"{stem}.json", found.to_dict())
    return found, out / f"{stem}.json", draw(found, out / f"{stem}.png")


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


def train_bases(protocol: Protocol, store: BaseStore, progress: bool) -> tuple[dict[tuple[str, int], Base], float]:
    """All bases that are needed, for every seed, and the seconds it took."""
    start = time.perf_counter()
    todo = [(name, seed) for seed in protocol.seeds for name in protocol.needed()]
    found: dict[tuple[str, int], Base] = {}
    for i, (name, seed) in enumerate(todo):
        log.info("base %d of %d: %s, seed %d", i + 1, len(todo), name, seed)
        folders = {text: origin(text, found[name_of(text), seed].folder, protocol.data, seed) for text in protocol.builds_on(name)}
        found[name, seed] = store.get(protocol.recipe_of(name, seed, folders), progress)
    return found, time.perf_counter() - start


def measure_arms(
    protocol: Protocol, bases: Mapping[tuple[str, int], Base], real: Real, store: Path, progress: bool
) -> tuple[dict[str, list[Measured]], float]:
    """Arm -> what was measured for each seed, and the seconds it took."""
    start = time.perf_counter()
    arms = [a for names in protocol.needed().values() for a in names]
    found: dict[str, list[Measured]] = {}
    for i, name in enumerate(arms):
        log.info("arm %d of %d: %s", i + 1, len(arms), name)
        arm = protocol.arms[name]
        found[name] = [measure(bases[arm.base, seed], arm, seed, protocol, real, store, progress) for seed in protocol.seeds]
    return found, time.perf_counter() - start


def rows_of(protocol: Protocol, bases: Mapping[tuple[str, int], Base], measured: Mapping[str, list[Measured]]) -> tuple[Row, ...]:
    """One row an arm and seed."""
    costs = {}
    for name in protocol.needed():
        model = Pipeline.from_pretrained(bases[name, protocol.seeds[0]].folder, dtype="float32", device="cpu").model
        costs[name] = count_forward(model, 1).macs, parameters(model)
    rows = []
    for name, values in measured.items():
        arm = protocol.arms[name]
        passes = 1 if arm.guidance_scale == 1 else 2
        for seed, one in zip(protocol.seeds, values):
            base = bases[arm.base, seed]
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
                    macs=costs[arm.base][0],
                    parameters=costs[arm.base][1],
                    trained_seconds=base.seconds,
                    metrics=one.metrics(),
                )
            )
    return tuple(rows)


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
