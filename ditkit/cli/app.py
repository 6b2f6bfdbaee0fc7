"""``ditkit app``: a page in the browser that samples bundles, base and accelerated side by side."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ditkit.core.errors import DitkitError

LOOPBACK = ("127.", "localhost", "::1")


@dataclass(frozen=True)
class Args:
    """Open a page that makes pictures with a bundle and with methods on it, side by side: live, timed, and with their difference."""

    bundles: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """bundles, names of shipped ones, or diffusers folders; none: the shipped ones"""
    host: str = "127.0.0.1"
    """address to listen on; another one than 127.0.0.1 lets other machines in"""
    port: int = 7860
    """0: any that is free"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: fp32 on the CPU, bf16 on a GPU"""
    device: str = "auto"
    """auto: the GPU where there is one"""


def main(argv: Sequence[str]) -> int:
    """Serve until interrupted."""
    args = tyro.cli(Args, args=list(argv), prog="ditkit app")
    if not 0 <= args.port < 1 << 16:
        raise DitkitError(f"port is {args.port}", allowed="0 to 65535")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    from ditkit.bundle import find_bundle

    for bundle in args.bundles:
        find_bundle(bundle)  # a mistyped name ends here, before anything large is imported
    from ditkit.app.server import Server
    from ditkit.app.studio import Studio

    server = Server(Studio(args.bundles, args.dtype, args.device), args.host, args.port)
    if not args.host.startswith(LOOPBACK):
        sys.stderr.write("whoever can reach this machine can use the page; there is no password\n")
    sys.stdout.write(f"{server.url}  (Ctrl+C ends it)\n")
    sys.stdout.flush()
    server.run()
    return 0
