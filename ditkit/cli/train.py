"""``ditkit train RECIPE``: train a recipe of the package, or a YAML file of yours; any of its values can be set on the command line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
import yaml

from ditkit.core.config import parse_yaml
from ditkit.core.errors import DitkitError
from ditkit.train.recipe import Recipe, TrainerRecipe, load_recipe

if TYPE_CHECKING:
    from ditkit.train import TrainResult

PLAIN = {"out", "resume", "no_resume", "progress", "no_progress", "help"}
STOPPED = 143  # as a shell reports SIGTERM


@dataclass(frozen=True)
class Args:
    """Train a recipe, going on from its newest checkpoint if there is one."""

    recipe: Annotated[str, tyro.conf.Positional]
    """name of a recipe (ditkit list recipes), or a .yaml file"""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """folder of the run; by default runs/RECIPE"""
    resume: bool = True
    """no-resume: start anew; what an earlier run left is moved aside"""
    progress: bool = True
    """a live line on stderr"""


def main(argv: Sequence[str]) -> int:
    """Train. Exit code 143: a signal ended it after a checkpoint; the same command goes on."""
    plain, settings = split_settings(argv)
    args = tyro.cli(Args, args=plain, prog="ditkit train", description=describe())
    recipe = with_settings(load_recipe(args.recipe), settings)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    from ditkit.train import train
    from ditkit.train.guards import TrainingStopped

    try:
        result = train(recipe, args.out or Path("runs") / Path(args.recipe).stem, args.resume, args.progress)
    except TrainingStopped as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(summary(result) + "\n")
    return 0 if result.finished else STOPPED


def split_settings(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments of the verb, and settings of the recipe: ``--trainer.steps 2000`` or ``--base runs/digits``, by dotted key."""
    plain: list[str] = []
    settings: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--") or key in PLAIN:
            plain.append(word)
            continue
        settings[key] = value if equals else next(words, "")
        if not settings[key]:
            raise DitkitError(f"--{key} has no value", hint=f"--{key} VALUE")
    return plain, settings


def with_settings(recipe: Recipe, settings: dict[str, str]) -> Recipe:
    """The recipe with values set by dotted key; each value is read as YAML, so 1e-3, true, null and [0.9, 0.95] mean what they do there."""
    values: dict[str, Any] = recipe.to_dict()
    for key, text in settings.items():
        *sections, last = key.split(".")
        target = values
        for name in sections:
            if target.get(name) is None:
                target[name] = {}
            target = target[name]
            if not isinstance(target, dict):
                raise DitkitError(f"--{key}: {name} is no section", hint="see the recipe's YAML")
        target[last] = parse_yaml(text, f"--{key}")
    return Recipe.parse(values, "command line")


def describe() -> str:
    """What ``--help`` says of the recipe's values."""
    width = max(len(name) for name in TrainerRecipe.model_fields)
    lines = []
    for name, field in TrainerRecipe.model_fields.items():
        default = yaml.safe_dump(TrainerRecipe().to_dict()[name], default_flow_style=True).split("\n")[0]
        lines.append(f"  --trainer.{name:<{width}}  {field.description} ({default})")
    return (
        "Train a recipe, going on from its newest checkpoint if there is one.\n\n"
        "Every value of the recipe can be set by its dotted key, as YAML: --trainer.steps 2000, --backbone.config.depth 4,\n"
        "--sampling.guidance.scale 2, --process.name gaussian, --base runs/digits. The trainer's, with their defaults:\n" + "\n".join(lines)
    )


def summary(result: TrainResult) -> str:
    """One line."""
    if not result.finished:
        return f"{result.folder}: stopped after step {result.step}, checkpoint written; the same command goes on"
    loss = f", validation loss {result.validation['ema']:.4f}" if result.validation else ""
    skipped = f", {result.skipped} steps skipped" if result.skipped else ""
    return f"{result.folder}: {result.step} steps{loss}{skipped}; ditkit sample {result.folder}"
