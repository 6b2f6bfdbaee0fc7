"""``ditkit VERB``: each verb is a module of this package with ``Args`` and ``run``; a verb is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ditkit.core.errors import DitkitError, nearest

VERBS = {
    "list": "backbones, methods, recipes: what there is",
    "train": "train a recipe",
    "sample": "make pictures with a bundle",
    "app": "a page in the browser: sample, base and accelerated side by side",
    "convert": "any layout of weights to any other: released .pt, diffusers folder, bundle",
    "verify": "check real weights, against diffusers where it has the model",
    "eval": "quality of a bundle's samples",
    "bench": "time, MACs, memory and quality of bundles, interleaved",
    "demo": "train on digits, sample, accelerate, write an HTML report",
    "reproduce": "a paper's central claim in miniature, with a verdict",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit code 0: done; 2: bad input, one clear line on stderr; 1: the work itself failed."""
    import ditkit

    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        lines = "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
        sys.stdout.write(f"ditkit {ditkit.__version__}: the Diffusion Transformer toolkit\n\n{lines}\n\nditkit VERB --help says more.\n")
        return 0
    if args[0] == "--version":
        sys.stdout.write(f"{ditkit.__version__}\n")
        return 0
    if args[0] not in VERBS:
        return _fail(
            DitkitError(f"there is no verb {args[0]!r}", allowed=", ".join(VERBS), hint=nearest(args[0], VERBS) or "ditkit --help")
        )
    try:
        return int(importlib.import_module(f"ditkit.cli.{args[0]}").main(args[1:]) or 0)
    except DitkitError as error:
        return _fail(error)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _fail(error: DitkitError) -> int:
    sys.stderr.write(f"error: {error}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
