"""A ball of radius 8 over 1k to 16k tokens: the full attention, the dense mask, gathered tiles (and FlexAttention on a GPU).

    python benchmarks/windows.py [--device cuda] [--radius 8] [--sides 32 64 128]

Prints the least time of one attention call of 6 heads of 64 (on a CPU, processor time over all threads), and the exponent of time in
tokens fitted to each row.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

from ditkit.core.masks import Within, render
from ditkit.core.seams import Attn, sdpa
from ditkit.core.streams import grid_layout
from ditkit.core.windows import Ball, How


def attention(side: int, radius: float, how: How | None, heads: int, width: int, device: str) -> Attn:
    """One call over a grid of side x side tokens; how None: everything is seen."""
    layout = {"img": grid_layout((side, side), torch.device(device))}
    q, k, v = ({"img": torch.randn(1, heads, side * side, width, device=device)} for _ in range(3))
    mask = None if how is None else render([Within(Ball(radius=radius, how=how))], layout, layout)
    return Attn("attn", q, k, v, layout, layout, mask)


def seconds(a: Attn, repeats: int) -> float:
    """The least of ``repeats`` calls after a first one: other work on the machine only adds."""
    found = []
    gpu = a.q["img"].is_cuda
    clock = time.perf_counter if gpu else time.process_time
    for _ in range(repeats + 1):
        start = clock()
        sdpa(a)
        if gpu:
            torch.cuda.synchronize()
        found.append(clock() - start)
    return min(found[1:])


def exponent(tokens: list[int], times: list[float]) -> float:
    """The slope of log time over log tokens, least squares."""
    x, y = [math.log(n) for n in tokens], [math.log(t) for t in times]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--radius", type=float, default=8.0)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    tokens = [side * side for side in args.sides]
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.heads} heads of {args.width}")
    print("ms".rjust(10), *(f"{n:>10}" for n in tokens), "  exponent")
    kinds: list[How | None] = ["gathered", "dense", None]
    for how in [*kinds, "blocks"] if args.device == "cuda" else kinds:  # type: ignore[list-item]
        some = [side for side in args.sides if how != "dense" or side <= 64]  # beyond, the mask alone is gigabytes
        times = [seconds(attention(side, args.radius, how, args.heads, args.width, args.device), args.repeats) for side in some]
        cells = [f"{1000 * t:10.2f}" for t in times] + [" " * 10] * (len(args.sides) - len(some))
        print(f"{how or 'full':>10}", *cells, f"{exponent(tokens[: len(some)], times):10.2f}", flush=True)


if __name__ == "__main__":
    main()
