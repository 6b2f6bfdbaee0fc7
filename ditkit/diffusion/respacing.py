"""Respacing: which of T training steps a sampler visits, in the spellings of the field (Improved DDPM, section 4; DDIM; diffusers)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ditkit.core.errors import DitkitError


def respace(num_train_steps: int, spec: str | Sequence[int]) -> list[int]:
    """The indices that are kept, ascending, of 0 .. num_train_steps - 1.

    Args:
        spec: "K": K steps evenly from the first to the last ("1" keeps index 0 only, as released);
            "a,b,c" or [a, b, c]: that many from each of equal sections;
            "ddimK": the smallest integer stride from 0 that gives exactly K steps;
            "leadingK": stride T // K from 0; "trailingK": stride T / K down from T - 1; "dpmK": the K upper ones of K + 1 evenly from
            first to last, which its DPM-Solver calls linspace (diffusers).
    """
    match = re.fullmatch(r"(ddim|leading|trailing|dpm)?(\d+(?: *, *\d+)*)", spec) if isinstance(spec, str) else None
    if isinstance(spec, str) and match is None:
        raise DitkitError(f"spacing is {spec!r}", allowed="'K', 'a,b,c', 'ddimK', 'leadingK', 'trailingK' or 'dpmK' with numbers")
    kind = match[1] if match else None
    counts = [int(n) for n in match[2].split(",")] if match else [int(n) for n in spec]
    if not counts or min(counts) < 1 or sum(counts) > num_train_steps or (kind and len(counts) > 1):
        raise DitkitError(f"spacing {spec!r} of {num_train_steps} steps", allowed=f"1 to {num_train_steps} steps in all")
    if kind == "ddim":
        return _ddim(num_train_steps, counts[0])
    if kind == "leading":
        return [i * (num_train_steps // counts[0]) for i in range(counts[0])]
    if kind == "dpm":
        return [int(n) for n in np.linspace(0, num_train_steps - 1, counts[0] + 1).round()[1:]]
    if kind == "trailing":
        places = np.round(np.arange(num_train_steps, 0, -num_train_steps / counts[0]))[: counts[0]]
        return [int(n) - 1 for n in reversed(places)]
    return _sections(num_train_steps, counts)


def _ddim(num_train_steps: int, count: int) -> list[int]:
    for stride in range(1, num_train_steps + 1):
        kept = range(0, num_train_steps, stride)
        if len(kept) == count:
            return list(kept)
    near = sorted({len(range(0, num_train_steps, s)) for s in range(1, num_train_steps + 1)}, key=lambda n: abs(n - count))[:2]
    raise DitkitError(f"no integer stride keeps {count} of {num_train_steps} steps", allowed=f"e.g. {near[0]} or {near[-1]}")


def _sections(num_train_steps: int, counts: list[int]) -> list[int]:
    """Equal sections (the first ones one longer where T is no multiple), a fractional stride in each, rounded half to even."""
    size, longer = divmod(num_train_steps, len(counts))
    kept: list[int] = []
    start = 0
    for k, count in enumerate(counts):
        length = size + (k < longer)
        if count > length:
            raise DitkitError(f"{count} steps in a section of {length}", allowed=f"at most {length} in section {k + 1} of {len(counts)}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride  # summed, as released: the rounding of halves depends on it
        start += length
    return kept
