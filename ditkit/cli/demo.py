"""``ditkit demo``: train on real digits, sample, accelerate, and write one self-contained HTML report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Args:
    """Train on real handwritten digits, sample, accelerate, and write a report (about five minutes on two CPU cores)."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/demo")
    """folder for the trained model, the report and the measurements"""
    recipe: str = "digits"
    """name of a recipe (ditkit list recipes), or a .yaml file"""
    steps: int | None = None
    """training steps; by default the recipe's"""
    num_samples: int = 360
    """samples of each variant whose quality is measured"""
    repeats: int = 5
    """timed runs of each variant"""
    resume: bool = True
    """no-resume: train anew, even if an earlier demo has trained the model"""
    progress: bool = True
    """live lines on stderr"""


def main(argv: Sequence[str]) -> int:
    """Run the demo."""
    args = tyro.cli(Args, args=list(argv), prog="ditkit demo")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("ditkit").setLevel(logging.INFO)
    from ditkit.demo import demo
    from ditkit.eval.pipelines import Setting
    from ditkit.eval.table import table
    from ditkit.train.recipe import Recipe, load_recipe

    recipe = load_recipe(args.recipe)
    if args.steps is not None:
        values = recipe.to_dict()
        recipe = Recipe.parse({**values, "trainer": {**values["trainer"], "steps": args.steps}}, "--steps")
    done = demo(
        recipe,
        args.out,
        name=Path(args.recipe).stem,
        resume=args.resume,
        setting=Setting(num_images=20, num_samples=args.num_samples, repeats=args.repeats, warmups=1),
        command="ditkit demo " + " ".join(argv),
        progress=args.progress,
    )
    sys.stdout.write(f"{table(done.result)}\nreport:  {done.report.resolve()}\nresults: {done.results}\nmodel:   {done.bundle}\n")
    return 0
