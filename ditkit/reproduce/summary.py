"""An experiment's result as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .protocol import READ
from .result import Reproduction
from .verdicts import ClaimResult, Effect, PairedResult, TrendResult

SHARES = ("accuracy", "object", "color", "relation")
UNITS = {
    "mse": "held-out mean squared error",
    "frechet": "Fréchet distance (pca64)",
    "accuracy": "class accuracy",
    "drift": "mean squared difference from the reference's pictures",
    "object": "share of the captions' things that are there",
    "color": "share of the captions' things that are there in their colour",
    "relation": "share of the captions' relations that hold",
    "extra": "things beyond those of the caption, a picture",
}


def summary(found: Reproduction) -> str:
    """What was asked, what was found, and on what."""
    p, m = found.protocol, found.machine
    labels = {name: arm.label or name for name, arm in p.arms.items()}
    head = [
        f"{found.name}: {p.title}",
        f"{p.paper}; protocol of {p.written}; {found.part} part; seeds {', '.join(map(str, p.seeds))}",
        f"{m.gpu or m.cpu}, {m.cores} cores, {m.threads} threads; torch {m.torch}; ditkit {m.ditkit} {found.commit}".rstrip(),
        f"{found.seconds['all']:.0f} s: {found.bases['trained']} bases trained in {found.seconds['training']:.0f} s, "
        f"{found.bases['reused']} reused; measured in {found.seconds['measuring']:.0f} s",
    ]
    claims = [u for c in found.claims for u in ("", *_claim(c, labels))]
    return "\n".join([*head, "", *_rows(found), *_floor(found.real), *claims, *_checks(found)]) + "\n"


def _floor(real: dict[str, Any]) -> Iterator[str]:
    names = {"frechet": "Fréchet distance", "accuracy": "class accuracy", **{name: name for name in READ}}
    scores = [f"{label} {real[name]:.3f}" for name, label in names.items() if name in real]
    if scores:
        yield f"real test pictures ({real['num_samples']}): {', '.join(scores)}"
    if "chance" in real:
        yield f"the same against their neighbours' captions: {', '.join(f'{name} {value:.3f}' for name, value in real['chance'].items())}"


def _rows(found: Reproduction) -> list[str]:
    """Means over seeds, one line an arm."""
    metrics = {"mse": ".4f", "frechet": ".3f", "accuracy": ".3f", "drift": ".4g", **dict.fromkeys(READ, ".3f")}
    names = ["Fréchet" if name == "frechet" else name for name in metrics]
    lines = [["arm", "evaluations", "MMACs each", *names, "ms a picture", "time saved", "MACs saved"]]
    for name in dict.fromkeys(r.arm for r in found.rows):
        rows = [r for r in found.rows if r.arm == name]
        cells = [rows[0].label, str(rows[0].evaluations) if rows[0].measure == "samples" else "", f"{rows[0].macs / 1e6:.2f}"]
        for metric, digits in metrics.items():
            values = [r.metrics[metric] for r in rows if metric in r.metrics]
            cells.append(f"{sum(values) / len(values):{digits}}" if values else "")
        cells.append("" if rows[0].sample_seconds is None else f"{rows[0].sample_seconds * 1e3:.1f}")
        cells += ["" if saved is None else f"{saved:.0%}" for saved in (rows[0].time_saved, rows[0].macs_saved)]
        lines.append(cells)
    shown = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    lines = [[line[i] for i in shown] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(u.rjust(w) if i else u.ljust(w) for i, (u, w) in enumerate(zip(line, widths))).rstrip() for line in lines]


def _claim(c: ClaimResult, labels: dict[str, str]) -> Iterator[str]:
    yield f"{c.verdict.upper()}: {c.name}"
    yield f"  {c.hypothesis}"
    if isinstance(c, TrendResult):
        seeds = ", ".join(f"{r:+.2f}" for r in c.per_seed)
        strict = "strictly monotone" if c.monotone else "not monotone"
        yield f"  rho {c.rho:+.2f} over {len(c.arms)} points ({strict}), exact one-sided p {c.p:.4f}; by seed {seeds}"
        yield f"  |rho| in the claimed direction, bootstrap: {c.low:.2f} to {c.high:.2f}; detectable: {c.smallest_effect:g}"
    else:
        if c.margin:
            yield f"  not worse by more than {c.margin * (100 if c.relative else 1):g}{' %' if c.relative else ''}"
        for effect in (*c.effects, *c.context):
            yield from _effect(effect, c, labels)


def _effect(e: Effect, c: PairedResult, labels: dict[str, str]) -> Iterator[str]:
    shown = e.verdict or "for context"
    yield f"  {labels[e.method]} {e.method_value:.4g} against {labels[e.baseline]} {e.baseline_value:.4g} ({UNITS[c.metric]}): {shown}"
    scale, unit = (100.0, " %") if c.relative else (100.0, " points") if c.metric in SHARES else (1.0, "")
    values = [f"{v * scale:+.3g}" for v in (e.effect, e.low, e.high, *e.per_seed)]
    yield f"    better by {values[0]}{unit} [{values[1]}, {values[2]}]; by seed {', '.join(values[3:])}"
    planned, found = c.smallest_effect * scale, e.detectable * scale
    yield f"    detectable with 80 % power: planned {planned:.3g}{unit}, at the spread found {found:.3g}{unit}"


def _checks(found: Reproduction) -> Iterator[str]:
    """Savings that must hold, on networks with random weights."""
    if found.checks:
        yield ""
    for c in found.checks:
        wanted = f"wanted: {c.check['least_macs_saved']:.0%} of MACs, {c.check['least_speedup']:g}x"
        yield f"{'HOLDS' if c.holds else 'DOES NOT HOLD'}: {c.name}: {c.macs_saved:.1%} fewer MACs, {c.speedup:.2f}x faster ({wanted})"
