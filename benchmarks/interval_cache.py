"""What a fixed-interval cache (FORA) costs on the shipped digits, against its bound: a step without sub-layer calls + the calls left.

    python benchmarks/interval_cache.py            # batches 64 and 1; writes benchmarks/interval-cache_MACHINE_DATE.json; 2 minutes

All runs are timed interleaved. ``longest`` reuses at every step but the first and the last; it and the base give the two unknowns of

    time = steps x (a step without calls) + full steps x (what the calls of a step take)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ditkit.core.files import write_json
from ditkit.core.run import Run
from ditkit.eval.bench import BenchResult, Candidate, run_bench
from ditkit.eval.table import table
from ditkit.methods.efficiency.fora import FORA
from ditkit.pipeline import Pipeline

INTERVALS = (2, 3)


def rows(pipe: Pipeline, batch: int, steps: int) -> list[Candidate]:
    """The base, two intervals, and the longest."""
    labels = [k % 10 for k in range(batch)]

    def candidate(name: str, one: Pipeline) -> Candidate:
        return Candidate(name, lambda: one(labels, num_inference_steps=steps, batch_size=batch, progress=False).x, batch)

    cached = {f"interval {n}": n for n in INTERVALS} | {"longest": steps}
    return [candidate("base", pipe), *(candidate(name, pipe.with_methods(FORA(interval=n))) for name, n in cached.items())]


def bounds(pipe: Pipeline, result: BenchResult, steps: int) -> dict[str, dict[str, float]]:
    """Of each interval: seconds per sample by median, the bound, their ratio."""
    seconds = {r.name: r.seconds.median for r in result.rows}

    def full(n: int) -> int:
        return int(Run(pipe.with_methods(FORA(interval=n)).model, steps).finish()["fora"]["full_steps"])

    calls = (seconds["base"] - seconds["longest"]) / (steps - full(steps))  # of one step
    empty = seconds["base"] / steps - calls
    found = {}
    for n in INTERVALS:
        bound = steps * empty + full(n) * calls
        found[f"interval {n}"] = {
            "full_steps": full(n),
            "seconds": seconds[f"interval {n}"],
            "bound": bound,
            "ratio": seconds[f"interval {n}"] / bound,
        }
    return found


def main(argv: list[str] | None = None) -> int:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 1])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(argv)
    pipe, found = Pipeline.from_pretrained("digits"), {}
    for batch in args.batches:
        result = run_bench(rows(pipe, batch, args.steps), suite="interval-cache", repeats=args.repeats, warmups=1)
        against: dict[str, Any] = bounds(pipe, result, args.steps)
        found[f"batch {batch}"] = {**result.to_dict(), "bounds": against}
        sys.stdout.write(f"{table(result)}\n")
        for name, b in against.items():
            sys.stdout.write(
                f"{name}: {1e3 * b['seconds']:.2f} ms, bound {1e3 * b['bound']:.2f} ms ({b['full_steps']} full steps): {b['ratio']:.3f}x\n"
            )
        path = args.out / f"interval-cache_{result.machine.slug}_{result.date}.json"
        write_json(path, found)
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
