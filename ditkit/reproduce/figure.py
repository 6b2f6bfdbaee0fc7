"""The figure of an experiment: one panel a claim, and one for each curve, Pareto front and learned table that the protocol asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditkit.core.files import atomic_file
from ditkit.core.lazy import require

from .protocol import Curves, Pareto
from .result import Reproduction
from .summary import SHARES
from .verdicts import PairedResult, TrendResult

INK, PALE, COLOURS = "#222222", "#9a9a9a", ("#1f6fb4", "#d1651b", "#2f8f4e", "#8a4fa3")
AXES = {
    "mse": "held-out mean squared error",
    "frechet": "Fréchet distance to real data",
    "accuracy": "class accuracy",
    "drift": "mean squared difference from the reference",
}
UNITS = {"frechet": "distance", "extra": "things a picture"}
ABREAST = 4  # panels in a row


def draw(found: Reproduction, path: Path) -> Path:
    """Write the figure as PNG."""
    require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [*found.protocol.pareto, *found.protocol.curves, *found.maps, *found.claims]
    across = min(len(panels), ABREAST)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.4 * across, 4.4 * down), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(down, across, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.remove()
    for panel, axes in zip(panels, places):
        _style(axes)
        if isinstance(panel, Curves):
            _curves(panel, found, axes)
        elif isinstance(panel, Pareto):
            _pareto(panel, found, axes)
        elif isinstance(panel, str):
            _map(panel, found, axes)
        elif isinstance(panel, TrendResult):
            _trend(panel, found, axes)
        else:
            _effects(panel, found, axes)
    figure.suptitle(f"{found.protocol.title} ({found.part} part, {len(found.protocol.seeds)} seeds)", fontsize=11)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return path


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _values(found: Reproduction, arm: str, metric: str) -> list[float]:
    return [r.metrics[metric] for r in found.rows if r.arm == arm]


def _curves(panel: Curves, found: Reproduction, axes: Any) -> None:
    """Mean over seeds with a dot for each seed."""
    from matplotlib.ticker import LogLocator, NullLocator

    taken = {r.arm: r.num_inference_steps for r in found.rows}
    for series, colour in zip(panel.series, COLOURS):
        steps = [taken[a] for a in series.arms]
        values = [_values(found, a, panel.metric) for a in series.arms]
        axes.plot(steps, [sum(v) / len(v) for v in values], color=colour, label=series.label)
        for n, v in zip(steps, values):
            axes.plot([n] * len(v), v, "o", color=colour, markersize=4, alpha=0.6)
    axes.axhline(
        found.real[panel.metric], color=PALE, linestyle="--", linewidth=1, label=f"real test pictures ({found.real['num_samples']})"
    )
    every = sorted({taken[a] for s in panel.series for a in s.arms})
    axes.set_xscale("log")
    axes.set_xticks(every, [str(n) for n in every], minor=False)
    axes.set_xticks([], minor=True)
    if panel.metric == "frechet":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("network evaluations")
    axes.set_ylabel(AXES[panel.metric])
    axes.legend(frameon=False, fontsize=8)


def _pareto(panel: Pareto, found: Reproduction, axes: Any) -> None:
    """One point an arm, the mean over seeds, and a line through those that no other beats in both."""
    from matplotlib.ticker import NullFormatter

    rows = {r.arm: r for r in found.rows}
    scale, unit = (1e3, "ms a picture") if panel.cost == "seconds" else (1e-6, "million multiply-adds a picture")
    points = []
    for arm in panel.arms:
        values = _values(found, arm, panel.metric)
        cost = rows[arm].sample_seconds if panel.cost == "seconds" else rows[arm].sample_macs
        points.append((float(cost or 0) * scale, sum(values) / len(values), rows[arm].label))
    best = front([(cost, value) for cost, value, _ in points])
    axes.plot([c for c, _ in best], [v for _, v in best], color=COLOURS[0], linewidth=1, drawstyle="steps-post", label="front")
    for cost, value, _ in points:
        axes.plot(cost, value, "o", color=COLOURS[0] if (cost, value) in best else PALE, markersize=5)
    if panel.metric == "frechet":
        axes.axhline(found.real["frechet"], color=PALE, linestyle="--", linewidth=1, label=f"real ({found.real['num_samples']})")
    if min(value for _, value, _ in points) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15, y=0.1)
    axes.set_xlabel(unit)
    axes.set_ylabel(AXES[panel.metric])
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=2)
    name_points(points, axes)


def name_points(points: Sequence[tuple[float, float, str]], axes: Any) -> None:
    """Each point's name beside it, where it covers no point and no other name."""
    axes.autoscale_view()  # else the transformations are those of an empty panel
    places = [axes.transAxes.inverted().transform(axes.transData.transform(p[:2])) for p in points]
    taken = [(x - 0.008, y - 0.012, x + 0.008, y + 0.012) for x, y in places]
    for (x, y), (*point, label) in sorted(zip(places, points), key=lambda p: -p[0][1]):
        width, height = 0.0115 * len(label), 0.034  # of 6 points, as shares of the panel
        offsets = [(side, step * height) for step in (0.6, -0.6, 1.6, -1.6, 2.6, -2.6, 3.6, -3.6) for side in (0.012, -0.012 - width)]
        boxes = [(x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2) for dx, dy in offsets]
        free = [b for b in boxes if b[0] > -0.02 and b[2] < 1.1 and not any(_meet(b, other) for other in taken)]
        box = (free or boxes)[0]
        taken.append(box)
        middle = (box[1] + box[3]) / 2
        line = {"arrowstyle": "-", "color": PALE, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2} if abs(middle - y) > height else None
        axes.annotate(label, point, (box[0], middle), textcoords="axes fraction", va="center", fontsize=6, color=INK, arrowprops=line)


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is as good as in both numbers, and better in one; by the first number. Less is better."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(set(points)):
        if not best or value < best[-1][1]:
            best.append((cost, value))
    return best


def _map(arm: str, found: Reproduction, axes: Any) -> None:
    """What the first seed's table reuses: steps to the right, branches down."""
    from matplotlib.colors import ListedColormap

    seed = str(found.protocol.seeds[0])
    reused = found.maps[arm][seed]
    share = sum(map(sum, reused)) / (len(reused) * len(reused[0]))
    axes.imshow(list(zip(*reused)), aspect="auto", cmap=ListedColormap(["#e4e8ee", COLOURS[1]]), vmin=0, vmax=1, interpolation="nearest")
    branches = found.maps[arm]["branches"]
    axes.set_yticks(range(len(branches)), branches, fontsize=6)
    axes.grid(visible=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    label = found.protocol.arms[arm].label or arm
    axes.set_title(f"{label}: {share:.0%} reused (orange), seed {seed}", fontsize=9)


def _trend(panel: TrendResult, found: Reproduction, axes: Any) -> None:
    """The metric over multiply-adds."""
    from matplotlib.ticker import LogLocator, NullLocator

    order = sorted(range(len(panel.arms)), key=lambda i: panel.macs[i])
    macs = [count / 1e6 for count in panel.macs]
    axes.plot([macs[i] for i in order], [panel.values[i] for i in order], color=COLOURS[0], linewidth=1.2)
    for i in order:
        values = _values(found, panel.arms[i], panel.metric)
        axes.plot([macs[i]] * len(values), values, "o", color=COLOURS[0], markersize=4, alpha=0.6)
        label = found.protocol.arms[panel.arms[i]].label or panel.arms[i]
        axes.annotate(label, (macs[i], max(values)), textcoords="offset points", xytext=(5, 5), fontsize=7, color=INK)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.16, y=0.12)
    axes.set_xlabel("million multiply-adds of one evaluation")
    axes.set_ylabel(AXES[panel.metric])
    axes.set_title(f"{panel.name}: {panel.verdict}\nSpearman's rho {panel.rho:+.2f}, exact p {panel.p:.4f}", fontsize=9)


def _effects(panel: PairedResult, found: Reproduction, axes: Any) -> None:
    """Each comparison with its bound; right of 0 the method is better."""
    labels = {name: arm.label or name for name, arm in found.protocol.arms.items()}
    scale = 100.0 if panel.relative or panel.metric in SHARES else 1.0
    effects = [*panel.effects, *panel.context]
    for place, e in enumerate(effects):
        colour = COLOURS[0] if e.verdict else PALE
        axes.plot([e.low * scale, e.high * scale], [-place, -place], color=colour, linewidth=2)
        axes.plot([v * scale for v in e.per_seed], [-place] * len(e.per_seed), "|", color=INK, markersize=7)
        axes.plot(e.effect * scale, -place, "o", color=colour, markersize=7)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.axvline(panel.smallest_effect * scale, color=PALE, linestyle=":", linewidth=1.2, label="smallest effect planned for")
    axes.set_yticks([-i for i in range(len(effects))], [f"{labels[e.method]}\nover {labels[e.baseline]}" for e in effects], fontsize=7)
    axes.set_ylim(-len(effects) + 0.4, 0.6)
    axes.grid(visible=False)
    if panel.margin:
        axes.axvline(-panel.margin * scale, color=COLOURS[1], linestyle=":", linewidth=1.2, label="margin")
    near = max(abs(v) * scale for e in panel.effects for v in (e.low, e.high, panel.smallest_effect))
    if max(abs(v) * scale for e in effects for v in (e.low, e.high)) > 20 * near:  # else what is judged would be one line
        axes.set_xscale("symlog", linthresh=near)
    unit = "%" if panel.relative else "points" if panel.metric in SHARES else UNITS.get(panel.metric, "mean square")
    axes.set_xlabel(f"better by ({unit}); bar: 95 % bounds, ticks: seeds")
    axes.set_title(f"{panel.name}: {panel.verdict}", fontsize=9)
    axes.legend(frameon=False, fontsize=7, loc="best")
