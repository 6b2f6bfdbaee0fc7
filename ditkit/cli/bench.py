"""``ditkit bench``: time, MACs and FLOPs, bytes, memory and quality of bundles and methods, interleaved, with the floor."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ditkit.core.errors import DitkitError

if TYPE_CHECKING:
    from ditkit.eval.captions import CaptionJudge
    from ditkit.eval.features import Extractor
    from ditkit.eval.pipelines import Setting
    from ditkit.eval.quality import Judge
    from ditkit.pipeline import Pipeline


@dataclass(frozen=True)
class Args:
    """Compare bundles, and methods on the first of them. The first bundle is the base; each lossy variant is followed by the base
    with as few steps as take the same time."""

    folders: Annotated[tuple[str, ...], tyro.conf.Positional]
    """bundles, names of shipped ones, or diffusers folders"""
    methods: tuple[str, ...] = ()
    """variants of the first bundle: fora:interval=3, int8+compile, fora:interval=2+compile:grain=step, ..."""
    num_images: int = 60
    """pictures of one timed call"""
    num_inference_steps: int | None = None
    """solver steps; by default the bundle's"""
    guidance_scale: float | None = None
    """by default the bundle's"""
    num_samples: int = 360
    """pictures whose quality is measured; 0: only the timed ones are compared"""
    features: tuple[Literal["pca64", "classifier", "efficientnet-lite0"], ...] = ()
    """what distances to real pictures are measured on, by default pca64 and classifier, for captions efficientnet-lite0; on the last,
    where it is among them, also each variant's drift from the base"""
    repeats: int = 25
    """timed calls of each variant"""
    warmups: int = 3
    """calls before them"""
    seed: int = 0
    """of the first picture"""
    suite: str = "bench"
    """first part of the file's name"""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/bench")
    """folder for SUITE_MACHINE_DATE.json"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: fp32 on the CPU, bf16 on a GPU"""
    device: str = "auto"
    """auto: the GPU where there is one"""
    progress: bool = True
    """live lines on stderr"""


def main(argv: Sequence[str]) -> int:
    """Run the benchmark, print the table, write the JSON."""
    args = tyro.cli(Args, args=list(argv), prog="ditkit bench")
    if not args.folders:
        raise DitkitError("no bundle is given", allowed="one or more folders", hint="ditkit bench runs/digits --methods fora:interval=3")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    from ditkit.eval.pipelines import compare_pipelines, variants
    from ditkit.eval.table import table
    from ditkit.methods.specs import parse_spec
    from ditkit.pipeline import Pipeline

    specs = [parse_spec(text) for text in args.methods]
    pipes = {folder: Pipeline.from_pretrained(folder, dtype=args.dtype, device=args.device) for folder in args.folders}
    todo = variants(pipes, specs)
    judge = _judge(pipes[args.folders[0]], args)
    result, _ = compare_pipelines(
        todo,
        _setting(args),
        judge,
        drift_on=_drift_on(judge, args),
        suite=args.suite,
        command="ditkit bench " + " ".join(argv),
        progress=args.progress,
    )
    sys.stdout.write(f"{table(result)}\n{result.write(args.out)}\n")
    return 0


def _setting(args: Args) -> Setting:
    from ditkit.eval.pipelines import Setting

    return Setting(
        num_images=args.num_images,
        num_samples=max(args.num_samples, args.num_images),
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        repeats=args.repeats,
        warmups=args.warmups,
    )


def _judge(pipe: Pipeline, args: Args) -> Judge | CaptionJudge | None:
    """Real data to compare with: the bundle's own, where it can be had; without them quality is drift alone, and that is said."""
    from ditkit.conditioning.inputs import takes_text
    from ditkit.eval.captions import CaptionJudge
    from ditkit.eval.quality import Judge

    if not args.num_samples:
        return None
    card = pipe.config.data
    try:
        if takes_text(pipe.model):
            return CaptionJudge(card, _setting(args).num_samples, args.features or ("efficientnet-lite0",))
        return Judge(card.name, args.features or ("pca64", "classifier"), options=card.config)
    except DitkitError as error:
        sys.stderr.write(f"no distances to real data: {error}\n")
        return None


def _drift_on(judge: Judge | CaptionJudge | None, args: Args) -> Extractor | None:
    """The ImageNet features, where the judge has them or, without a judge, where they are asked for."""
    from ditkit.eval.features import FIXED

    if judge is not None:
        return next((e for e in judge.distances.extractors if e.name in FIXED), None)
    name = next((n for n in args.features if n in FIXED), None)
    return None if name is None else FIXED[name]()
