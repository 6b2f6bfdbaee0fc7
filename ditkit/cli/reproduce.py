"""``ditkit reproduce NAME``: a paper's central claim in miniature, against its baseline, as JSON and a figure, with a verdict."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

STOPPED = 143  # as a shell reports SIGTERM


@dataclass(frozen=True)
class Args:
    """Run an experiment whose hypothesis, metric and smallest effect were written before its first run. The verdict is shown, not
    shown or underpowered. Bases are trained once and found again; an interrupted run goes on where it was."""

    name: Annotated[str, tyro.conf.Positional]
    """name of an experiment (dit, sit, ...), or a protocol's .yaml file"""
    full: bool = False
    """the whole experiment, untimed; by default the headline, which ends within 20 minutes on two cores"""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/reproduce")
    """folder for NAME.json and NAME.png"""
    plan: bool = False
    """print the minutes that it will take, computed from the protocol, and end"""
    bases: Path | None = None
    """folder of trained bases; by default the user's cache"""
    progress: bool = True
    """live lines on stderr"""


def main(argv: Sequence[str]) -> int:
    """Run, print what was found."""
    args = tyro.cli(Args, args=list(argv), prog="ditkit reproduce")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("ditkit").setLevel(logging.INFO if args.progress else logging.WARNING)
    from ditkit.reproduce.protocol import Name, load_protocol

    part: Name = "full" if args.full else "default"
    protocol = load_protocol(args.name, part)  # bad input is said before torch is loaded
    if args.plan:
        from ditkit.reproduce.plan import plan

        sys.stdout.write("\n".join(plan(protocol).lines()) + "\n")
        return 0
    from ditkit.reproduce.bases import Stopped
    from ditkit.reproduce.runner import reproduce
    from ditkit.reproduce.summary import summary

    command = "ditkit reproduce " + " ".join(argv)
    try:
        found, path, figure = reproduce(args.name, args.out, part=part, store=args.bases, command=command, progress=args.progress)
    except Stopped:
        sys.stderr.write("stopped; the same command goes on\n")
        return STOPPED
    sys.stdout.write(f"{summary(found)}\nresults: {path}\nfigure:  {figure}\n")
    return 0
