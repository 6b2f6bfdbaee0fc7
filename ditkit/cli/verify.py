"""``ditkit verify FOLDER``: whether weights are whole and unchanged, and whether we compute on them what diffusers computes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ditkit.interop.hints import System


@dataclass(frozen=True)
class Args:
    """Check a bundle, a diffusers folder or a released checkpoint, and print one line for the documentation."""

    source: Annotated[str, tyro.conf.Positional]
    """a bundle, a diffusers folder, or a released file of DiT, SiT or PixArt (.pt, .pth, .safetensors)"""
    reference: Path | None = None
    """another copy, in any layout, that must hold the same numbers"""
    system: System | None = None
    """which of two a released file is: DiT and SiT look alike, and so do the two PixArts"""
    num_heads: int | None = None
    """of a released file of no published size"""
    null_label: bool = True
    """the last row of a released file's label table stands for no label"""
    input_size: tuple[int, int] | None = None
    """height and width in latent pixels, of a released file that does not say it"""
    position_scale: float | None = None
    """of a released PixArt that is no published checkpoint"""
    device: str = "cpu"
    """where to compute"""
    record: bool = True
    """leave ditkit-verified.json beside the weights, so that a later run can name a tensor that changed"""


def main(argv: Sequence[str]) -> int:
    """Verify and print."""
    args = tyro.cli(Args, args=list(argv), prog="ditkit verify")
    from ditkit.interop.hints import Hints
    from ditkit.interop.verify import verify

    hints = Hints(
        system=args.system,
        num_heads=args.num_heads,
        null_label=args.null_label,
        input_size=args.input_size,
        position_scale=args.position_scale,
    )
    sys.stdout.write(verify(args.source, hints, args.reference, args.device, args.record).line + "\n")
    return 0
