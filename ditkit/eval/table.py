"""Benchmark results as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .bench import BenchResult, Row
from .quality import Quality, Score


def table(result: BenchResult) -> str:
    """One line a row, with a head that says where it was measured, and notes below."""
    columns = [(head, cell) for head, cell in COLUMNS.items() if any(cell(row) for row in result.rows)]
    cells = [[head for head, _ in columns], *([cell(row) for _, cell in columns] for row in result.rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(u.ljust(w) if i == 0 else u.rjust(w) for i, (u, w) in enumerate(zip(line, widths))).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([*_head(result), "", *lines, "", *_notes(result)]).rstrip() + "\n"


def quality_table(quality: Quality, record: Mapping[str, Any]) -> str:
    """One line a figure, beside that of held-out real data, with what it was measured on."""
    heads = ["", "value", "95 % interval", "real", "chance", "measured on"]
    lines = [heads, *(_quality_line(s) for s in quality.scores)]
    if not any(line[4] for line in lines[1:]):
        lines = [line[:4] + line[5:] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    last = len(widths) - 1
    text = ["  ".join(u.rjust(w) if 0 < i < last else u.ljust(w) for i, (u, w) in enumerate(zip(line, widths))).rstrip() for line in lines]
    g = record["guidance"]
    methods = "".join(f", {m['label']}" for m in record["methods"])
    how = f"{record['solver']}, {record['num_inference_steps']} steps, guidance {g['scale']:g} ({g['channels']}){methods}"
    return "\n".join([text[0], "  ".join("-" * w for w in widths), *text[1:], "", *_quality_notes(quality, how)]) + "\n"


def _quality_line(s: Score) -> list[str]:
    interval = "" if s.low is None or s.high is None else f"{s.low:.3f} - {s.high:.3f}"
    name = f"{s.metric} *" if s.settings.get("biased") else s.metric
    rest = ["" if u is None else f"{u:.4f}" for u in (s.real, s.chance)]
    return [name, f"{s.value:.4f}", interval, *rest, s.extractor]


def _quality_notes(quality: Quality, how: str) -> list[str]:
    """Sets and numbers, how pictures were taken, and what the columns are."""
    sets: dict[tuple[int, str], list[str]] = {}
    for s in quality.scores:
        sets.setdefault((s.num_samples, s.reference), []).append(s.metric)
    notes = []
    for (num, reference), metrics in sets.items():
        which = f"{', '.join(dict.fromkeys(metrics))}: " if len(sets) > 1 else ""
        notes.append(f"{which}{num} samples ({how}) against {reference}")
    notes.append("real: the same figures of held-out real data, as many where there are")
    if any(s.chance is not None for s in quality.scores):
        notes.append("chance: the same figures for other captions of those asked")
    inputs = {s.extractor: s.settings["input"] for s in quality.scores if "input" in s.settings}
    notes.append("pictures enter " + "; ".join(f"{name}: {rule}" for name, rule in inputs.items()))
    if biased := next((s for s in quality.scores if s.settings.get("biased")), None):
        notes.append(f"* biased upwards: fewer pictures than the {biased.settings['dim']} features; compare it with its real figure alone")
    return notes


def seconds(value: float) -> str:
    """With three digits: ``1.23 s``, ``45.6 ms``, ``789 us``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale or unit == "us":
            return f"{three(value / scale)} {unit}"
    return ""


def three(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    rounded = float(f"{value:.2e}")  # first, so that 9.999 has the digits of 10
    digits = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{digits}f}"


def giga(value: float) -> str:
    """In units of 10^9."""
    return three(value / 1e9)


def megabytes(value: float) -> str:
    """In MB (10^6)."""
    return f"{value / 1e6:.1f}" if value < 1e8 else f"{value / 1e6:.0f}"


def decibels(value: float) -> str:
    """A PSNR."""
    return "same" if math.isinf(value) else f"{value:.1f}"


def score(row: Row, metric: str, digits: int = 2, scale: float = 1.0) -> str:
    """A figure of quality with its 95 % interval, or nothing."""
    if row.quality is None or metric not in row.quality:
        return ""
    s = row.quality[metric]
    text = f"{s.value * scale:.{digits}f}"
    return text if s.low is None or s.high is None else f"{text} +-{(s.high - s.low) / 2 * scale:.{digits}f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda r: r.name,
    "steps": lambda r: str(r.num_inference_steps or ""),
    "median": lambda r: seconds(r.seconds.median),
    "quartiles": lambda r: f"{seconds(r.seconds.q1)} - {seconds(r.seconds.q3)}",
    "best": lambda r: seconds(r.seconds.best),
    "first call": lambda r: seconds(r.seconds.cold),
    "speed-up": lambda r: f"{r.speedup:.2f}x",
    "GMACs": lambda r: giga(r.macs) if r.macs else "",
    "GFLOPs": lambda r: giga(r.flops) if r.flops else "",
    "/floor": lambda r: f"{r.ratio_to_floor:.2f}" if r.ratio_to_floor else "",
    "weights MB": lambda r: megabytes(r.weight_bytes) if r.weight_bytes else "",
    "activ. MB": lambda r: megabytes(r.activation_bytes) if r.activation_bytes else "",
    "peak MB": lambda r: megabytes(r.peak_memory_bytes) if r.peak_memory_bytes else "",
    "PSNR dB": lambda r: decibels(r.drift.psnr) if r.drift else "",
    "rel. error": lambda r: f"{r.drift.relative_l2:.1e}" if r.drift and r.drift.relative_l2 else "",
    "feat. drift": lambda r: score(r, "feature drift", 3),
    "Frechet": lambda r: score(r, "frechet"),
    "KID x 1000": lambda r: score(r, "kid", 2, 1000),
    "labels %": lambda r: score(r, "label agreement", 1, 100),
    "object %": lambda r: score(r, "object", 1, 100),
    "color %": lambda r: score(r, "color", 1, 100),
    "relation %": lambda r: score(r, "relation", 1, 100),
    "top-1 %": lambda r: score(r, "caption top-1", 1, 100),
    "top-5 %": lambda r: score(r, "caption top-5", 1, 100),
}


def _head(result: BenchResult) -> list[str]:
    m, items = result.machine, result.rows[0].items
    where = f"{m.gpu or m.cpu}, {m.capability}, {m.cores} cores, {m.threads} threads; torch {m.torch}; ditkit {m.ditkit} {result.commit}"
    p = result.protocol
    how = f"{p['repeats']} interleaved repeats after {p['warmups']} warm-ups; times, MACs and FLOPs per item, {items} a call; {p['dtype']}"
    lines = [f"{result.suite}, {result.date}", where.strip(), how]
    if result.others_before is not None and result.others_after is not None:
        warning = ": OTHER JOBS WERE RUNNING, do not trust these times" if result.busy else ""
        lines.append(f"cores busy with other work: {result.others_before:.1f} before, {result.others_after:.1f} after{warning}")
    if result.roof:
        rates = ", ".join(f"{k} {giga(v)} G/s ({result.roof.kernels[k]})" for k, v in result.roof.gemm.items())
        lines.append(f"roof in this run: {rates}; attention {giga(result.roof.attention)} GFLOP/s; copy {giga(result.roof.copy)} GB/s")
    return lines


def _notes(result: BenchResult) -> list[str]:
    notes = [f"{row.name}: {note}" for row in result.rows for note in row.notes]
    scored = next((row.quality for row in result.rows if row.quality is not None), None)
    for s in scored.scores if scored else ():
        real = "" if s.real is None else f"; held-out real data: {s.real:.3f}"
        chance = "" if s.chance is None else f"; by chance: {s.chance:.3f}"
        between = f"; between different pictures: {s.settings['between_pictures']:.3f}" if "between_pictures" in s.settings else ""
        few = "; biased upwards, fewer pictures than features" if s.settings.get("biased") else ""
        where = f"{s.extractor} ({s.settings['input']})" if "input" in s.settings else s.extractor
        notes.append(f"{s.metric}: {where}, {s.num_samples} samples against {s.reference}{real}{chance}{between}{few}")
    return notes
