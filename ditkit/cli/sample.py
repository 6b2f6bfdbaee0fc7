"""``ditkit sample FOLDER``: pictures from a bundle, a shipped bundle by name, or a diffusers folder."""

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
    from ditkit.output import Output
    from ditkit.pipeline import Pipeline


@dataclass(frozen=True)
class Args:
    """Make pictures. What is not given is the bundle's own default."""

    folder: Annotated[str, tyro.conf.Positional]
    """a bundle, the name of a shipped one (digits), or a diffusers folder"""
    class_labels: tuple[int, ...] = ()
    """one or more labels, each used num-images / number-of-labels times; none: all classes in turn"""
    prompt: tuple[str, ...] = ()
    """one or more, for a model that is told captions, each in quotes; none: captions of its test data"""
    negative_prompt: tuple[str, ...] = ()
    """what guidance leads away from: one, or one for each prompt; none: the null caption"""
    long_prompts: Literal["error", "truncate"] | None = None
    """what to do with a prompt of too many tokens; by default as the bundle says"""
    text_encoder: Path | None = None
    """the folder where the bundle's text encoder is now"""
    num_images: int | None = None
    """pictures in all"""
    num_images_per_prompt: int | None = None
    """or pictures for each prompt or label"""
    num_inference_steps: int | None = None
    """solver steps"""
    guidance_scale: float | None = None
    """s in u + s (c - u): 0 is unconditional, 1 conditional; FLUX.1-dev is told it instead"""
    true_cfg_scale: float | None = None
    """s in u + s (c - u), also where the network is told guidance-scale (FLUX.1-dev)"""
    guidance: Literal["none", "all", "first-three"] | None = None
    """none: conditional; all: every channel; first-three: the rule of released DiT and SiT weights"""
    seed: int = 0
    """of the first picture; picture k has seed + k"""
    solver: str | None = None
    """name of a solver"""
    height: int | None = None
    """of a picture; by default as trained"""
    width: int | None = None
    """of a picture; by default as trained"""
    batch_size: int | None = None
    """pictures at a time"""
    methods: str | None = None
    """attached for this call, on one line: fora:interval=2+int8, or fora:interval=2+compile"""
    inputs: tuple[str, ...] = ()
    """pictures that attached methods take, NAME=FILE: control=edges.png"""
    compile: Literal["block", "step"] | None = None
    """compile the network: block starts in seconds, step is faster per step"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: fp32 on the CPU, bf16 on a GPU"""
    device: str = "auto"
    """auto: the GPU where there is one"""
    remake: Path | None = None
    """make one picture again: a PNG that ditkit saved"""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out.png")
    """one PNG with all pictures in a grid"""
    each: Path | None = None
    """also a folder with one PNG for each picture"""
    zoom: int | None = None
    """pixels of the file for one of the picture; by default small pictures are enlarged"""


def main(argv: Sequence[str]) -> int:
    """Sample and save."""
    args = tyro.cli(Args, args=list(argv), prog="ditkit sample")
    for path in (args.output, args.each):
        if path is not None and path.parent.exists() and not path.parent.is_dir():
            raise DitkitError(f"{path.parent} is a file", hint="choose another place for the pictures")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("ditkit").setLevel(logging.INFO)
    from ditkit.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(args.folder, dtype=args.dtype, device=args.device, text_encoder=args.text_encoder)
    pipe, inputs = _accelerated(pipe, args), _inputs(args.inputs)
    out = pipe.remake(args.remake, inputs) if args.remake else _sample(pipe, args, inputs)
    zoom = args.zoom or max(1, 64 // max(out.images[0].size))
    out.save(args.output, zoom)
    paths = [] if args.each is None else out.save_each(args.each, zoom)
    sys.stdout.write(f"{args.output}: {summary(out)}{f'; {len(paths)} files in {args.each}' if paths else ''}\n")
    return 0


def _accelerated(pipe: Pipeline, args: Args) -> Pipeline:
    from ditkit.methods.specs import parse_spec

    spec = parse_spec(args.methods) if args.methods is not None else None
    if spec is not None:
        if spec.grain and args.compile:
            raise DitkitError(f"--compile {args.compile} and {spec.compilation!r} in --methods", allowed="one of them")
        pipe = spec.applied(pipe)
    return pipe if args.compile is None else pipe.compile(args.compile)


def _inputs(pairs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path) or name in found:
            raise DitkitError(f"--inputs {pair!r}", allowed="NAME=FILE, each name once", hint="--inputs control=edges.png")
        found[name] = path
    return found


def _sample(pipe: Pipeline, args: Args, inputs: dict[str, str]) -> Output:
    return pipe(
        args.class_labels or None,
        prompt=args.prompt or None,
        negative_prompt=args.negative_prompt or None,
        long_prompts=args.long_prompts,
        num_images=args.num_images,
        num_images_per_prompt=args.num_images_per_prompt,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        true_cfg_scale=args.true_cfg_scale,
        guidance=args.guidance,
        seed=args.seed,
        solver=args.solver,
        height=args.height,
        width=args.width,
        inputs=inputs,
        batch_size=args.batch_size,
    )


def summary(out: Output) -> str:
    """What was made, in one line: a guidance scale of 0 or 1 is said in words."""
    record, scale, told = out.record, out.record["guidance"]["scale"], out.record["guidance"].get("told")
    kind = {0: "unconditional (scale 0)", 1: "conditional, not guided (scale 1)"}.get(scale, f"guidance scale {scale:g}")
    channels = record["guidance"]["channels"]
    where = "" if channels == "all" or scale in (0, 1) else f" on the first {channels} channels"
    heard = "" if told is None else f", told scale {told:g}"
    methods = "".join(f", {m['label']}" for m in record["methods"])
    cut = f", {record['truncated']} prompts cut" if record.get("truncated") else ""
    return (
        f"{len(out.seeds)} pictures, {record['num_inference_steps']} steps of {record['solver']}, {kind}{where}{heard}{methods}{cut}, "
        f"seeds {out.seeds[0]} to {out.seeds[-1]}, {out.report['seconds']:.1f} s"
    )
