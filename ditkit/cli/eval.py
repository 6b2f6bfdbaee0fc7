"""``ditkit eval FOLDER``: quality of a bundle's samples against its data, every figure with its protocol."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ditkit.core.errors import DitkitError


@dataclass(frozen=True)
class Args:
    """Fréchet distance, kernel distance, precision, recall and label agreement of samples, beside those of held-out real data."""

    folder: Annotated[str, tyro.conf.Positional]
    """a bundle, the name of a shipped one (digits), or a diffusers folder"""
    num_samples: int = 360
    """pictures; distances depend on the number, so compare only equal ones"""
    data: str | None = None
    """data set; by default the bundle's"""
    extractors: tuple[Literal["pca64", "classifier"], ...] = ("pca64", "classifier")
    """what the distances are measured on"""
    methods: str | None = None
    """attach methods first: fora:interval=3, int8+compile, ..."""
    num_inference_steps: int | None = None
    """solver steps; by default the bundle's"""
    guidance_scale: float | None = None
    """by default the bundle's"""
    solver: str | None = None
    """by default the bundle's"""
    seed: int = 0
    """of the first picture; picture k has seed + k"""
    batch_size: int = 60
    """pictures at a time"""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """JSON file for the figures; by default they are only printed"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: fp32 on the CPU, bf16 on a GPU"""
    device: str = "auto"
    """auto: the GPU where there is one"""
    progress: bool = True
    """live lines on stderr"""


def main(argv: Sequence[str]) -> int:
    """Sample, measure, print."""
    args = tyro.cli(Args, args=list(argv), prog="ditkit eval")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    from ditkit.conditioning.inputs import takes_text
    from ditkit.core.files import write_json
    from ditkit.eval.bench import plain
    from ditkit.eval.quality import Judge
    from ditkit.eval.table import quality_table
    from ditkit.methods.specs import parse_spec
    from ditkit.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(args.folder, dtype=args.dtype, device=args.device)
    if args.methods:
        spec = parse_spec(args.methods)
        pipe = pipe.with_methods(*spec.build())
        pipe = pipe.compile(spec.grain) if spec.grain else pipe
    if takes_text(pipe.model):
        raise DitkitError(
            "the model is told captions", allowed="a model that is told class labels", hint="ditkit bench measures time, cost and drift"
        )
    judge = Judge(args.data or pipe.config.data.name, args.extractors)
    judge.check_number(args.num_samples)
    labels = judge.labels(args.num_samples)
    out = pipe(
        labels.tolist(),
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        solver=args.solver,
        seed=args.seed,
        batch_size=min(args.batch_size, args.num_samples),
        progress=args.progress,
    )
    quality = judge(out.x, labels)
    sys.stdout.write(quality_table(quality, out.record))
    if args.out is not None:
        protocol = {k: v for k, v in out.record.items() if k != "class_labels" and k != "seeds"}
        write_json(args.out, plain({"protocol": {**protocol, "first_seed": args.seed}, **asdict(quality)}))
    return 0
