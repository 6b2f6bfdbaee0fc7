"""The figure of an experiment: one panel a claim, and one for each curve that the protocol asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditkit.core.files import atomic_file
from ditkit.core.lazy import require

from .protocol import Curves
from .result import Reproduction
from .verdicts import PairedResult, TrendResult

INK, PALE, COLOURS = "#222222", "#9a9a9a", ("#1f6fb4", "#d1651b", "#2f8f4e", "#8a4fa3")
AXES = {"mse": "held-out mean squared error", "frechet": "Fréchet distance to real data", "accuracy": "class accuracy"}


def draw(found: Reproduction, path: Path) -> Path:
    """Write the figure as PNG."""
    require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [*found.protocol.curves, *found.claims]
    figure = Figure(figsize=(5.4 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        _style(axes)
        if isinstance(panel, Curves):
            _curves(panel, found, axes)
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

    for series, colour in zip(panel.series, COLOURS):
        steps = [found.protocol.arms[a].num_inference_steps for a in series.arms]
        values = [_values(found, a, panel.metric) for a in series.arms]
        axes.plot(steps, [sum(v) / len(v) for v in values], color=colour, label=series.label)
        for n, v in zip(steps, values):
            axes.plot([n] * len(v), v, "o", color=colour, markersize=4, alpha=0.6)
    axes.axhline(
        found.real[panel.metric], color=PALE, linestyle="--", linewidth=1, label=f"real test pictures ({found.real['num_samples']})"
    )
    every = sorted({found.protocol.arms[a].num_inference_steps for s in panel.series for a in s.arms})
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
    scale = 100.0 if panel.relative or panel.metric == "accuracy" else 1.0
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
    unit = "%" if panel.relative else "points" if panel.metric == "accuracy" else "distance"
    axes.set_xlabel(f"better by ({unit}); bar: 95 % bounds, ticks: seeds")
    axes.set_title(f"{panel.name}: {panel.verdict}", fontsize=9)
    axes.legend(frameon=False, fontsize=7, loc="best")
