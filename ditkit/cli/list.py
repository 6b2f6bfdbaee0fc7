"""``ditkit list``: what there is, which paper, where the code is. Reads the registry; imports no torch, but for the matrix."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from ditkit.core import registry

RECIPES = Path(__file__).parents[1] / "recipes"
BUNDLES = Path(__file__).parents[1] / "bundles"
Kind = Literal["backbones", "methods", "encoders", "recipes", "bundles"]


@dataclass(frozen=True)
class Args:
    """List what ditkit has: names, papers and where the code is."""

    kind: Annotated[Kind | Literal["matrix"] | None, tyro.conf.Positional] = None
    """one kind, or all; matrix: which method goes with which backbone, and which pairs of methods are refused"""


def main(argv: Sequence[str]) -> int:
    """Print the registry."""
    args = tyro.cli(Args, args=list(argv), prog="ditkit list")
    if args.kind == "matrix":
        sys.stdout.write(_matrix())
        return 0
    kinds: list[Kind] = [args.kind] if args.kind else list(get_args(Kind))
    sections = []
    for kind in kinds:
        rows = _rows(kind)
        width = max((len(name) for name, _, _ in rows), default=0)
        lines = [f"  {name:<{width}}  {text}\n  {'':<{width}}  {where}" for name, text, where in rows]
        sections.append("\n".join([f"{kind} ({len(rows)})", *lines]))
    sys.stdout.write("\n\n".join(sections) + "\n")
    return 0


def _rows(kind: Kind) -> list[tuple[str, str, str]]:
    """Name, one line, where it is."""
    if kind == "recipes":
        return [(p.stem, _first_comment(p), f"ditkit train {p.stem}") for p in sorted(RECIPES.glob("*.yaml"))]
    if kind == "bundles":
        return [(p.parent.name, "shipped with ditkit", f"ditkit sample {p.parent.name}") for p in sorted(BUNDLES.glob("*/config.json"))]
    found = registry.entries(kind)
    return [(name, entry.summary, entry.module) for name, entry in sorted(found.items())]


def _matrix() -> str:
    """Methods against backbones, then what is refused, with the reasons."""
    from ditkit.testing.support import by_backbone, pairs

    found = by_backbone()
    names = sorted({b for row in found.values() for b in row})
    width = max(map(len, found))
    lines = [" " * width + "  " + "  ".join(names)]
    lines += [
        f"{m:<{width}}  " + "  ".join(("refused" if row[b] else "yes").ljust(len(b)) for b in names).rstrip() for m, row in found.items()
    ]
    refused = [f"{m} on {b}: {row[b]}" for m, row in found.items() for b in names if row[b]]
    refused += [f"{a} with {b}: {reason}" for (a, b), reason in pairs().items() if reason]
    return (
        "\n".join([*lines, "", "refused, and why (pairs of methods: on dit; all others go together)", *(f"  {line}" for line in refused)])
        + "\n"
    )


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
