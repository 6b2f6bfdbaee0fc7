"""The demo: train a recipe, sample it, make it faster, and write a report that anyone can open.

ditkit demo --out runs/demo        # runs/demo/digits (the bundle), runs/demo/report.html, runs/demo/demo_MACHINE_DATE.json
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditkit.core import registry
from ditkit.eval.bench import BenchResult
from ditkit.eval.pipelines import Setting, compare_pipelines, variants
from ditkit.eval.quality import Judge
from ditkit.eval.report import History, Story, write_report
from ditkit.methods.specs import Spec, parse_spec
from ditkit.pipeline import Pipeline
from ditkit.train import Recipe, train
from ditkit.train.logs import LOG, read_log

log = logging.getLogger("ditkit")

#: what is tried, where the registry has it
ACCELERATIONS = ("fora:interval=3", "int8+compile")
GRIDS = 6  # sample grids shown of training


@dataclass(frozen=True)
class DemoResult:
    """Where things are, and what was measured."""

    report: Path
    results: Path
    bundle: Path
    result: BenchResult


def demo(
    recipe: Recipe,
    out: str | Path,
    *,
    name: str = "model",
    resume: bool = True,
    setting: Setting | None = None,
    accelerations: Sequence[str] = ACCELERATIONS,
    command: str = "",
    progress: bool = True,
) -> DemoResult:
    """Train ``recipe`` in ``out/NAME`` (or take what an earlier demo trained there), accelerate it, write the report to ``out``.

    Raises:
        DitkitError: training was stopped, or a part does not fit.
    """
    out, bundle = Path(out), Path(out) / name
    setting = setting or Setting(num_images=20, repeats=4, warmups=1)
    log.info("1/3  training %s: %d steps", name, recipe.trainer.steps)
    trained = train(recipe, bundle, resume, progress)
    if not trained.finished:
        raise SystemExit(143)
    log.info("2/3  sampling and accelerating")
    pipe, judge = Pipeline.from_pretrained(bundle), Judge(recipe.data.name, resamples=100)
    todo = variants({"base": pipe}, available(accelerations))
    result, samples = compare_pipelines(todo, setting, judge, suite="demo", command=command, progress=progress)
    log.info("3/3  writing the report")
    story = Story(
        title="A Diffusion Transformer learns real handwritten digits"
        if recipe.data.name == "digits"
        else f"A Diffusion Transformer on {name}",
        data=recipe.data.name,
        classes=judge.train.labels,
        history=history(bundle, recipe),
        result=result,
        samples={k: v.x for k, v in samples.items()},
        labels=judge.labels(setting.num_samples),
        real=judge.test_x,
        real_labels=judge.test_y,
        settings=_settings(recipe, pipe),
        next_steps=_next_steps(bundle),
    )
    return DemoResult(write_report(out / "report.html", story), result.write(out), bundle, result)


def available(accelerations: Sequence[str]) -> list[Spec]:
    """Those whose methods exist here."""
    known = {*registry.entries("methods"), "compile"}
    return [parse_spec(text) for text in accelerations if all(part.split(":")[0] in known for part in text.split("+"))]


def history(folder: Path, recipe: Recipe) -> History:
    """What the log of a run says, over all its sessions."""
    events = list(read_log(folder / LOG))
    lines = [e for e in events if e["event"] == "train" and isinstance(e.get("loss"), float)]
    validation = [(e["step"], e["raw"], e["ema"]) for e in events if e["event"] == "validation"]
    grids = [(e["step"], folder / e["file"]) for e in events if e["event"] == "samples"]
    chosen = [grids[round(i * (len(grids) - 1) / (GRIDS - 1))] for i in range(GRIDS)] if len(grids) > GRIDS else grids
    seconds, before = 0.0, 0
    for e in lines:
        seconds += (e["step"] - before) * recipe.trainer.batch_size / e["images_per_second"]
        before = e["step"]
    pictures = [(step, path.read_bytes()) for step, path in dict.fromkeys(chosen) if path.is_file()]
    return History([(e["step"], e["loss"]) for e in lines], validation, pictures, seconds, recipe.trainer.steps)


def _settings(recipe: Recipe, pipe: Pipeline) -> dict[str, str]:
    t, s = recipe.trainer, pipe.config.sampling
    network: dict[str, Any] = pipe.config.backbone.config
    shape = ", ".join(f"{k} {network[k]}" for k in ("dim", "depth", "num_heads", "patch_size") if k in network)
    return {
        "network": f"{pipe.config.backbone.name}: {shape}",
        "training": f"{t.steps} steps of {t.batch_size}, {t.optimizer}, rate {t.learning_rate:g}, EMA {t.ema_decay:g}, seed {t.seed}",
        "process and sampling": f"{pipe.config.process.name}; {s.solver}, {s.num_inference_steps} steps, guidance {pipe.guidance.scale:g}",
    }


def _next_steps(bundle: Path) -> list[str]:
    return [
        f"ditkit sample {bundle} --class-labels 3 --num-images 16 -o out.png",
        f"ditkit bench {bundle} --methods fora:interval=2",
        f"ditkit eval {bundle}",
        "ditkit list",
    ]
