"""``ditkit eval FOLDER``: quality of a bundle's samples against its data, every figure with its protocol."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ditkit.core.errors import DitkitError

if TYPE_CHECKING:
    from ditkit.eval.captions import CaptionJudge
    from ditkit.eval.quality import Judge, Quality
    from ditkit.output import Output
    from ditkit.pipeline import Pipeline

Features = Literal["pca64", "classifier", "efficientnet-lite0"]


@dataclass(frozen=True)
class Args:
    """Distances of samples to real pictures (Fréchet, kernel, precision, recall), beside those of held-out real pictures, and whether
    samples show what they were asked for: the label that a classifier reads, or, of captions, objects, colours and relations
    (scenes), or recall of the caption (emoji)."""

    folder: Annotated[str, tyro.conf.Positional]
    """a bundle, the name of a shipped one (digits), or a diffusers folder"""
    num_samples: int | None = None
    """pictures, by default 360, or one for each of 500 captions (emoji: 200); compare only equal numbers"""
    data: str | None = None
    """data set; by default the bundle's"""
    features: tuple[Features, ...] = ()
    """what the distances are measured on; by default pca64 and classifier, for captions efficientnet-lite0"""
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
    """JSON file for the figures; by default they are only printed. Of captions also a sheet of pictures beside it, .png"""
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
    from ditkit.eval.table import quality_table
    from ditkit.methods.specs import parse_spec
    from ditkit.pipeline import Pipeline

    if args.out is not None and args.out.suffix != ".json":
        raise DitkitError(f"out is {args.out}", allowed="a file that ends in .json")
    pipe = Pipeline.from_pretrained(args.folder, dtype=args.dtype, device=args.device)
    if args.methods:
        pipe = parse_spec(args.methods).applied(pipe)
    judge: Any
    judge, num = (_caption_judge if takes_text(pipe.model) else _judge)(pipe, args)
    told = judge.told(num)
    out = _sample(pipe, {"prompt" if takes_text(pipe.model) else "class_labels": told}, args)
    quality = judge(out.x, told)
    sys.stdout.write(quality_table(quality, out.record))
    if args.out is not None:
        _write(args.out, quality, out, judge, args.seed)
    return 0


def _judge(pipe: Pipeline, args: Args) -> tuple[Judge, int]:
    """Real data with labels, and the number of samples."""
    from ditkit.eval.quality import Judge

    card, num = pipe.config.data, 360 if args.num_samples is None else args.num_samples
    options = card.config if args.data in (None, card.name) else {}
    judge = Judge(args.data or card.name, args.features or ("pca64", "classifier"), options=options)
    judge.check_number(num)
    return judge, num


def _caption_judge(pipe: Pipeline, args: Args) -> tuple[CaptionJudge, int]:
    """Captions with their real pictures, and how many."""
    from ditkit.eval.captions import CaptionJudge, usual_number

    card = pipe.config.data
    num = usual_number(args.data or card.name) if args.num_samples is None else args.num_samples
    return CaptionJudge(card, num, args.features or ("efficientnet-lite0",), data=args.data), num


def _sample(pipe: Pipeline, told: dict[str, Any], args: Args) -> Output:
    return pipe(
        **told,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        solver=args.solver,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=args.progress,
    )


def _write(path: Path, quality: Quality, out: Output, judge: Judge | CaptionJudge, seed: int) -> None:
    """Figures and protocol as JSON; of captions also the sheet."""
    from ditkit.core.files import write_json
    from ditkit.eval.bench import plain
    from ditkit.eval.caption_grid import caption_grid
    from ditkit.eval.captions import CaptionJudge
    from ditkit.output import save_png

    path.parent.mkdir(parents=True, exist_ok=True)
    protocol = {k: v for k, v in out.record.items() if k not in ("class_labels", "prompts", "seeds")}
    data: dict[str, Any] = {"protocol": {**protocol, "first_seed": seed}, **asdict(quality)}
    if isinstance(judge, CaptionJudge):
        asked = judge.asked
        data["captions"] = list(asked.captions)
        sheet, credit = path.with_suffix(".png"), ", ".join(asked.licence.values())
        save_png(sheet, caption_grid(asked.captions, out.x, asked.real, credit=credit), {**data["protocol"], **asked.licence})
        sys.stdout.write(f"{sheet}\n")
    write_json(path, plain(data))
    sys.stdout.write(f"{path}\n")
