"""One self-contained HTML file: how a model learned, what it makes, and what each acceleration gains and costs. No network, no scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ditkit.core.files import atomic_file

from .bench import BenchResult, Row
from .charts import Axis, Series, chart, legend
from .quality import Score
from .table import decibels, giga, megabytes, seconds, three

STYLE = Path(__file__).with_name("report.css")
SHOWN = 10  # classes side by side


@dataclass(frozen=True)
class History:
    """How training went: (step, loss), (step, raw, averaged weights), (step, PNG of a sample grid)."""

    losses: Sequence[tuple[int, float]]
    validation: Sequence[tuple[int, float, float]]
    grids: Sequence[tuple[int, bytes]]
    seconds: float
    steps: int


@dataclass(frozen=True)
class Story:
    """All that the report shows.

    ``samples`` holds x (N, C, H, W) in [-1, 1] for each row of the result, from the same seeds and ``labels`` (N,); ``real`` and
    ``real_labels`` are held-out data.
    """

    title: str
    data: str
    classes: Sequence[str]
    history: History | None
    result: BenchResult
    samples: Mapping[str, Tensor]
    labels: Tensor
    real: Tensor
    real_labels: Tensor
    settings: Mapping[str, str]  # shown with the machine: recipe, sampler, ...
    next_steps: Sequence[str] = ()  # commands


def write_report(path: str | Path, story: Story) -> Path:
    """Write the page."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(page(story).encode("utf-8"))
    return path


def page(story: Story) -> str:
    """The whole document."""
    sections = [_head(story), _made(story), _learning(story), _faster(story), _verdicts(story), _costs(story), _about(story)]
    css = STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(story.title)}</title><style>{css}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


# ---- pictures ---------------------------------------------------------------------------------------------------------------


def picture_uri(x: Tensor, columns: int, zoom: int = 6, gap: int = 1) -> str:
    """x (B, C, H, W) in [-1, 1] as one PNG, ``columns`` a row, with transparent gaps; a data URI."""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    count, channels, height, width = pixels.shape
    pixels = np.repeat(pixels[:, :1], 3, 1) if channels != 3 else pixels
    rows = -(-count // columns)
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width, :3] = picture.transpose(1, 2, 0)
        canvas[top : top + height, left : left + width, 3] = 255
    image = Image.fromarray(canvas)
    return png_uri(_bytes(image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)))


def _bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def png_uri(data: bytes) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _zoom(x: Tensor) -> int:
    return max(1, 48 // x.shape[-1])


def _one_of_each(labels: Tensor, classes: int) -> list[int]:
    """The first sample of each class, at most ``SHOWN``."""
    places = [(labels == c).nonzero() for c in range(classes)]
    return [int(p[0]) for p in places if len(p)][:SHOWN]


def _by_class(x: Tensor, labels: Tensor, classes: int, most: int = 10) -> tuple[Tensor, int]:
    """Samples of the first classes, class after class, equally many of each: (them, how many of each)."""
    places = [p for c in range(min(classes, SHOWN)) if len(p := (labels == c).nonzero().flatten())]
    each = min([most, *(len(p) for p in places)])
    return x[torch.cat([p[:each] for p in places])], each


# ---- sections ---------------------------------------------------------------------------------------------------------------


def _head(story: Story) -> str:
    base = story.result.rows[0]
    tiles = []
    if base.quality and "label agreement" in base.quality:
        s = base.quality["label agreement"]
        real = f" (real ones: {100 * s.real:.1f} %)" if s.real is not None else ""
        tiles.append(
            (f"{100 * s.value:.1f} %", f"of {s.num_samples} samples are read as what was asked by an independent classifier{real}")
        )
    if base.quality and "frechet" in base.quality:
        s = base.quality["frechet"]
        real = f"; held-out real data score {s.real:.2f}" if s.real is not None else ""
        tiles.append((f"{s.value:.2f}", f"Fréchet distance to real data, {s.extractor}{real}"))
    if story.history:
        minutes, rest = divmod(round(story.history.seconds), 60)
        size = f"{three(base.parameters / 1e6)} M parameters, " if base.parameters else ""
        tiles.append((f"{minutes} min {rest} s" if minutes else f"{rest} s", f"of training, {size}{story.history.steps} steps"))
    if fast := fastest(story.result.rows):
        tiles.append((f"{fast.speedup:.2f}x", f"the fastest variant, {fast.name}; its cost is below"))
    boxes = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    m = story.result.machine
    where = f"{story.result.date} on {m.gpu or m.cpu}, {m.cores} cores, torch {m.torch}, ditkit {m.ditkit}"
    return f'<header><h1>{escape(story.title)}</h1><p>{escape(where)}</p></header><div class="tiles">{boxes}</div>'


def fastest(rows: Sequence[Row]) -> Row | None:
    """The row with methods or compilation that gains most, if any gains."""
    better = [r for r in rows[1:] if not r.equal_time_to and r.speedup > 1]
    return max(better, key=lambda r: r.speedup, default=None)


def _made(story: Story) -> str:
    made, wide = _by_class(story.samples[story.result.rows[0].name], story.labels, len(story.classes))
    real, real_wide = _by_class(story.real, story.real_labels, len(story.classes))
    pair = _card(picture_uri(made, wide, _zoom(made)), "generated samples", "Made by the model, one class a row, not selected.")
    pair += _card(picture_uri(real, real_wide, _zoom(real)), "real samples", f"Real {story.data} that it never saw.")
    return f'<h2>What it makes</h2><div class="pair">{pair}</div>'


def _card(uri: str, alt: str, caption: str) -> str:
    picture = f'<img class="wide" alt="{escape(alt)}" src="{uri}">'
    return f'<figure class="card">{picture}<figcaption>{escape(caption)}</figcaption></figure>'


def _learning(story: Story) -> str:
    h = story.history
    if h is None or not h.losses:
        return ""
    series = [Series("training", thin(h.losses), "faint")]
    if h.validation:
        series.append(Series("validation", [(s, raw) for s, raw, _ in h.validation], "s2", marks=True))
        series.append(Series("validation, averaged weights (EMA)", [(s, ema) for s, _, ema in h.validation], "s1", marks=True))
    picture = chart(series, Axis("training step"), Axis("loss", log=True), "loss over training steps")
    grids = "".join(
        f'<figure><img alt="samples after {step} steps" src="{png_uri(data)}"><figcaption>{step} steps</figcaption></figure>'
        for step, data in h.grids
    )
    caption = "Validation is the loss on held-out data at fixed times and noise, so that its points are comparable."
    return f'<h2>How it learned</h2><figure class="card">{legend(series)}{picture}<figcaption>{caption}</figcaption></figure>' + (
        f'<p class="note">Samples of the averaged weights while training, always from the same noise.</p><div class="steps">{grids}</div>'
        if grids
        else ""
    )


def thin(points: Sequence[tuple[int, float]], most: int = 300) -> list[tuple[int, float]]:
    """At most ``most`` points, each the mean of those it stands for."""
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(v for _, v in g) / len(g)) for g in groups]


def _faster(story: Story) -> str:
    places = _one_of_each(story.labels, len(story.classes))
    rows = []
    for row in story.result.rows:
        x = story.samples[row.name][places]
        drift = (
            "the base"
            if row is story.result.rows[0]
            else f"PSNR {decibels(row.drift.psnr)}{'' if row.drift.psnr == float('inf') else ' dB'}"
            if row.drift
            else ""
        )
        text = f"<div>{escape(row.name)}<small>{row.speedup:.2f}x, {drift}</small></div>"
        rows.append(f'{text}<img alt="samples of {escape(row.name)}" src="{picture_uri(x, len(places), _zoom(x))}">')
    return (
        "<h2>The same seeds, made faster</h2><p>Each column starts from the same noise and label. Below an accelerated variant stands, "
        "where it is not exact, the base with as few steps as take the same time.</p>"
        f'<figure class="card rows">{"".join(rows)}</figure>'
    )


def _verdicts(story: Story) -> str:
    rows = story.result.rows
    picture = _time_against_distance(rows)
    lines = [text for row in rows if (text := verdict(row, rows))]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>Quality against time</h2>{picture}<ul>{items}</ul>" if picture or items else ""


def verdict(row: Row, rows: Sequence[Row]) -> str:
    """An accelerator against fewer steps of the base at equal time, in a sentence; "" where there is nothing to compare."""
    rival = next((r for r in rows if row.name in r.equal_time_to), None)
    if rival is None or row.quality is None or rival.quality is None or "frechet" not in row.quality:
        return ""
    a, b = row.quality["frechet"], rival.quality["frechet"]
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return ""
    if a.low <= b.high and b.low <= a.high:
        outcome = f"no difference that {a.num_samples} samples can show"
    else:
        outcome = "better than fewer steps" if a.value < b.value else "worse than fewer steps"
    closeness = ""
    if row.drift and rival.drift:
        closeness = f"; PSNR to the base {decibels(row.drift.psnr)} against {decibels(rival.drift.psnr)} dB"
    return (
        f"{row.name} ({seconds(row.seconds.median)}) against {rival.name} ({seconds(rival.seconds.median)}): "
        f"Fréchet {a.value:.2f} against {b.value:.2f}, {outcome}{closeness}."
    )


def _time_against_distance(rows: Sequence[Row]) -> str:
    scored = [r for r in rows if r.quality is not None and "frechet" in r.quality]
    if len(scored) < 2:
        return ""
    groups: dict[str, list[Row]] = {}
    for r in scored:
        groups.setdefault("accelerated" if r.methods else r.name.split(",")[0], []).append(r)
    styles = iter(("s1", "s2", "s3", "s4") * len(groups))
    series = [_points(name, sorted(group, key=lambda r: r.seconds.median), next(styles)) for name, group in groups.items()]
    real = scored[0].quality["frechet"].real if scored[0].quality else None
    levels = [(real, "held-out real data")] if real is not None else []
    picture = chart(series, Axis("milliseconds per sample", zero=True), Axis("Fréchet distance", zero=True), "quality against time", levels)
    caption = "Lower and further left is better. Bars: 95 % bootstrap interval. A line joins the base at several numbers of steps."
    return f'<figure class="card">{legend(series)}{picture}<figcaption>{caption}</figcaption></figure>'


def _points(name: str, rows: Sequence[Row], style: str) -> Series:
    scores = [r.quality["frechet"] for r in rows if r.quality]
    bars = [(s.low, s.high) for s in scores if s.low is not None and s.high is not None]
    base = name != "accelerated"
    labels = [f"{r.num_inference_steps} steps" if base else r.name for r in rows]
    points = [(r.seconds.median * 1e3, s.value) for r, s in zip(rows, scores)]
    return Series(name, points, style, line=base, marks=True, bars=bars, labels=labels)


def _costs(story: Story) -> str:
    rows = story.result.rows
    heads = ["", "steps", "time", "speed-up", "× floor", "GMACs", "memory", "PSNR", "Fréchet", "label read"]
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(_cost_row(r) for r in rows)
    notes = "".join(f"<li>{escape(f'{r.name}: {n}')}</li>" for r in rows for n in r.notes)
    warning = ""
    if story.result.busy:
        warning = '<p class="warn">Other jobs were running: do not trust the times of this page.</p>'
    return (
        f'<h2>What it costs</h2>{warning}<figure class="card scroll">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></figure>"
        f'<p class="note">{escape(_how(story.result))}</p><ul class="notes">{notes}</ul>'
    )


def _cost_row(r: Row) -> str:
    rival = f"<small>equal time to {escape(', '.join(r.equal_time_to))}</small>" if r.equal_time_to else ""
    cells = [
        str(r.num_inference_steps or ""),
        f"{seconds(r.seconds.median)}<small>{seconds(r.seconds.q1)} to {seconds(r.seconds.q3)}</small>{_first(r)}",
        f"{r.speedup:.2f}x",
        f"{r.ratio_to_floor:.2f}" if r.ratio_to_floor else "",
        f"{giga(r.macs)}<small>{giga(r.flops)} GFLOPs</small>" if r.macs and r.flops else "",
        _memory(r),
        f"{decibels(r.drift.psnr)}<small>{r.drift.relative_l2:.1e} rel.</small>" if r.drift and r.drift.relative_l2 else "same",
        _with_interval(r, "frechet", 2, 1, ""),
        _with_interval(r, "label agreement", 1, 100, " %"),
    ]
    return f"<tr{' class=rival' if rival else ''}><td>{escape(r.name)}{rival}</td>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"


def _first(r: Row) -> str:
    """The first call, where it took much longer than the others: compilation."""
    return f"<small>first call {seconds(r.seconds.cold)}</small>" if r.seconds.cold > 3 * r.seconds.median * r.items else ""


def _memory(r: Row) -> str:
    parts = ((r.weight_bytes, "weights"), (r.activation_bytes, "activations"), (r.peak_memory_bytes, "process"))
    first, *rest = [f"{megabytes(size)} MB {name}" for size, name in parts if size] or [""]
    return first + "".join(f"<small>{text}</small>" for text in rest)


def _with_interval(r: Row, metric: str, digits: int, scale: float, unit: str) -> str:
    if r.quality is None or metric not in r.quality:
        return ""
    s = r.quality[metric]
    bounds = "" if s.low is None or s.high is None else f"<small>{s.low * scale:.{digits}f} to {s.high * scale:.{digits}f}</small>"
    return f"{s.value * scale:.{digits}f}{unit}{bounds}"


def _how(result: BenchResult) -> str:
    p, r = result.protocol, result.roof
    text = (
        f"Per sample, in batches of {result.rows[0].items}: the median and quartiles of {p['repeats']} interleaved runs. GMACs are "
        "billions of multiply-adds, FLOPs twice that. PSNR and relative error are to the base from the same seeds. "
    )
    if r is None:
        return text
    rates = ", ".join(f"{k} products {giga(v)} GFLOP/s" for k, v in r.gemm.items())
    return text + (
        f"The floor is what the counted work would take at this machine's best rates, measured in the same run: {rates}, "
        f"attention {giga(r.attention)} GFLOP/s, copy {giga(r.copy)} GB/s."
    )


def _about(story: Story) -> str:
    m, result = story.result.machine, story.result
    load = "" if result.others_before is None else f"{result.others_before:.1f} before, {result.others_after:.1f} after"
    facts: dict[str, Any] = {
        **story.settings,
        "machine": f"{m.gpu + ', ' if m.gpu else ''}{m.cpu}, {m.capability}, {m.cores} cores, {m.threads} threads, {m.system}",
        "cores busy with other work": load,
        "versions": ", ".join(
            [
                f"ditkit {m.ditkit} {result.commit}".strip(),
                f"torch {m.torch}",
                f"Python {m.python}",
                *(f"{k} {v}" for k, v in m.libraries.items()),
            ]
        ),
    }
    scored = next((r.quality for r in result.rows if r.quality), None)
    for s in scored.scores if scored else ():
        if s.metric in ("frechet", "label agreement"):
            facts[f"{s.metric.replace('frechet', 'Fréchet distance')}, {s.extractor}"] = _measured(s)
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v)
    commands = "\n".join(escape(c) for c in story.next_steps)
    go_on = f"<h2>Go on</h2><pre><code>{commands}</code></pre>" if commands else ""
    return f"{go_on}<h2>How it was measured</h2><dl>{items}</dl>"


def _measured(s: Score) -> str:
    """How many samples against what, and how pictures enter the extractor."""
    rule = f"; pictures {s.settings['input']}" if "input" in s.settings else ""
    return f"{s.num_samples} samples against {s.reference}{rule}"
