"""``ditkit convert SOURCE OUT``: any layout that we read to any that we write. The one verb that reads pickled weights."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ditkit.interop.hints import System


@dataclass(frozen=True)
class Args:
    """Convert a released checkpoint, a diffusers folder or a bundle. Weights are renamed, never recomputed."""

    source: Annotated[str, tyro.conf.Positional]
    """a released file of DiT, SiT or PixArt (.pt, .pth, .safetensors), a diffusers folder, or a bundle"""
    out: Annotated[Path, tyro.conf.Positional]
    """a folder; for --to official a new .safetensors file"""
    to: Literal["ditkit", "diffusers", "official"] = "ditkit"
    """the layout to write"""
    vae: Path | None = None
    """folder of a diffusers VAE, for weights that come without one"""
    system: System | None = None
    """which of two a released file is: DiT and SiT look alike, and so do the two PixArts"""
    weights: Literal["ema", "model"] = "ema"
    """which weights of a training checkpoint"""
    num_heads: int | None = None
    """of a released file of no published size"""
    null_label: bool = True
    """the last row of a released file's label table stands for no label"""
    input_size: tuple[int, int] | None = None
    """height and width in latent pixels, of a released file that does not say it"""
    position_scale: float | None = None
    """of a released PixArt that is no published checkpoint"""
    as_released: bool = False
    """diffusers DiT whose weights were converted from released ones: compute time code and norms as the released code does"""


def main(argv: Sequence[str]) -> int:
    """Convert and say what was written."""
    args = tyro.cli(Args, args=list(argv), prog="ditkit convert")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    from ditkit.interop.convert import convert
    from ditkit.interop.hints import Hints

    hints = Hints(
        system=args.system,
        weights=args.weights,
        num_heads=args.num_heads,
        null_label=args.null_label,
        as_released=args.as_released,
        input_size=args.input_size,
        position_scale=args.position_scale,
    )
    opened = convert(args.source, args.out, args.to, hints, args.vae)
    config = opened.config
    sampling = f"{config.sampling.solver}, {config.sampling.num_inference_steps} steps, guidance {config.sampling.guidance}"
    sys.stdout.write(f"{args.out}: {config.backbone.name} with the {config.process.name} process; {sampling}\n")
    return 0
