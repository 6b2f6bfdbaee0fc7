"""Small charts as inline SVG, whose colours come from the page (classes ``s1`` .. ``s4``), so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 14, 46


@dataclass(frozen=True)
class Series:
    """A line through points (x, y), or points alone with error bars (low, high) and names."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str  # class of the page's palette
    line: bool = True
    marks: bool = False
    bars: Sequence[tuple[float, float]] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """What an axis shows; ``log`` for a logarithmic one, ``zero`` to begin at 0."""

    label: str
    log: bool = False
    zero: bool = False


class _Scale:
    """Values to pixels."""

    def __init__(self, values: Sequence[float], axis: Axis, low_pixel: float, high_pixel: float) -> None:
        low, high = min(values), max(values)
        self.log = axis.log and low > 0
        if self.log:
            low, high = math.log10(low), math.log10(high)
        if axis.zero and not self.log:
            low = min(low, 0.0)
        pad = (high - low or abs(high) or 1.0) * 0.06
        self.low = low if axis.zero and low == 0 else low - pad
        self.high = high + pad
        self.pixels = low_pixel, high_pixel

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        a, b = self.pixels
        return a + (b - a) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if not self.log:
            return nice_ticks(self.low, self.high)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        found = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        inside = [v for v in found if self.low <= math.log10(v) <= self.high]
        return inside if len(inside) >= 2 else nice_ticks(10**self.low, 10**self.high)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from low to high, about ``count`` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(series: Sequence[Series], x: Axis, y: Axis, title: str, levels: Sequence[tuple[float, str]] = ()) -> str:
    """A chart as an ``<svg>``. ``title`` is read by screen readers; ``levels`` are dashed horizontal lines with their names."""
    xs = [p[0] for s in series for p in s.points]
    ys = [p[1] for s in series for p in s.points] + [v for s in series for bar in s.bars for v in bar] + [v for v, _ in levels]
    sx, sy = _Scale(xs, x, LEFT, WIDTH - RIGHT), _Scale(ys, y, HEIGHT - BOTTOM, TOP)
    names = [((sx(a), sy(b)), text) for s in series for (a, b), text in zip(s.points, s.labels)]
    parts = [*_axes(sx, sy, x, y), *(_level(sy(v), name) for v, name in levels), *(u for s in series for u in _series(s, sx, sy))]
    bars = [(sx(a), sy(high), sy(low)) for s in series for (a, _), (low, high) in zip(s.points, s.bars)]
    parts += _names(names, bars)
    body = "".join(parts)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'


def legend(series: Sequence[Series]) -> str:
    """The names of the series with their colours, as HTML."""
    items = "".join(f'<span class="key {s.style}"><i></i>{escape(s.name)}</span>' for s in series if s.name)
    return f'<div class="legend">{items}</div>'


def _axes(sx: _Scale, sy: _Scale, x: Axis, y: Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = []
    for v in sy.ticks():
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{sy(v):.1f}" y2="{sy(v):.1f}"/>')
        lines.append(_text(LEFT - 8, sy(v) + 4, number(v), "end"))
    lines += [_text(sx(v), bottom + 18, number(v), "middle") for v in sx.ticks()]
    lines.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    lines.append(_text((LEFT + right) / 2, HEIGHT - 6, x.label, "middle", "label"))
    middle = (TOP + bottom) / 2
    lines.append(f'<text class="label" text-anchor="middle" transform="translate(13 {middle:.0f}) rotate(-90)">{escape(y.label)}</text>')
    return lines


def _series(s: Series, sx: _Scale, sy: _Scale) -> list[str]:
    places = [(sx(a), sy(b)) for a, b in s.points]
    out = []
    if s.line and len(places) > 1:
        path = " ".join(f"{'M' if i == 0 else 'L'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(places))
        out.append(f'<path class="line {s.style}" d="{path}"/>')
    for (a, _), (low, high) in zip(places, s.bars):
        out.append(f'<line class="bar {s.style}" x1="{a:.1f}" x2="{a:.1f}" y1="{sy(low):.1f}" y2="{sy(high):.1f}"/>')
    if s.marks or not s.line:
        out += [f'<circle class="dot {s.style}" cx="{a:.1f}" cy="{b:.1f}" r="5"/>' for a, b in places]
    return out


def _names(names: Sequence[tuple[tuple[float, float], str]], bars: Sequence[tuple[float, float, float]]) -> list[str]:
    """The names of points, each beside its own where no other name and no bar (x, top, bottom) stands: right or left, above or below."""
    boxes: list[tuple[float, float, float]] = []  # of names: left, right, baseline
    out = []

    def free(left: float, right: float, v: float) -> bool:
        named = any(left < r and lo < right and abs(v - u) <= 14 for lo, r, u in boxes)
        return not named and not any(left < x < right and v + 3 > top and v - 10 < bottom for x, top, bottom in bars)

    for (x, y), text in sorted(names):
        length = 7.0 * len(text)
        places = [(side, y - 8 + shift) for shift in (0, 25, -15, 40, -30, 55, -45, 70, -60) for side in (x + 9, x - 9 - length)]
        inside = [(left, v) for left, v in places if left >= LEFT and left + length <= WIDTH - RIGHT and TOP <= v <= HEIGHT - BOTTOM - 4]
        left, v = next((at for at in inside if free(at[0], at[0] + length, at[1])), (inside or places)[-1])
        boxes.append((left, left + length, v))
        out.append(_text(left, v, text, "start", "name") if left > x else _text(left + length, v, text, "end", "name"))
    return out


def _level(y: float, name: str) -> str:
    line = f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(WIDTH - RIGHT, y - 6, name, "end", "name")


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def number(value: float) -> str:
    """A tick: as short as it can be."""
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.0e}"
