"""Counter-based noise: every number is a function of (seed, step, purpose), so a picture never depends on its batch.

Picture k of seed s has the seed s + k. The bits are Philox-4x64 (Salmon et al. 2011): its stream is fixed by numpy's
compatibility policy, and the transforms to uniform and normal numbers are written here, so they are fixed too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ditkit.core.errors import DitkitError

Draw = Callable[[int, str], Tensor]


def normal(seeds: Sequence[int], step: int, purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32 (len(seeds), *shape) on the CPU; row k depends on seeds[k] alone.

    Args:
        seeds: one for each picture, 0 to 2^64 - 1.
        step: counts the draws of one purpose, 0 to 2^64 - 1.
        purpose: any name ("start", "step", "time"); different purposes are independent.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    rows = []
    for bits in _bits(seeds, step, purpose, 2 * pairs):
        radius = np.sqrt(-2.0 * np.log1p(-_unit(bits[:pairs], 53)))  # Box and Muller 1958; 1 - u lies in (0, 1]
        angle = 2.0 * np.pi * _unit(bits[pairs:], 53)
        rows.append(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count])
    return _stack(rows, shape)


def uniform(seeds: Sequence[int], step: int, purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """Uniform numbers in [0, 1), float32 (len(seeds), *shape), multiples of 2^-24. Arguments as for ``normal``."""
    return _stack([_unit(bits, 24) for bits in _bits(seeds, step, purpose, math.prod(shape))], shape)


def source(seeds: Sequence[int], like: Tensor) -> Draw:
    """``draw(step, purpose) -> Tensor like x`` for the solvers, where ``like`` is x (B, ...) with B = len(seeds)."""
    if len(seeds) != len(like):
        raise DitkitError(f"{len(seeds)} seeds for a batch of {len(like)}", allowed="one seed for each picture")
    return lambda step, purpose: normal(seeds, step, purpose, like.shape[1:]).to(like)


def _bits(seeds: Sequence[int], step: int, purpose: str, count: int) -> list[np.ndarray]:
    """Raw 64-bit words: the key is (seed, purpose), the high word of the counter is the step."""
    name = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    for value, what in [*((s, "seed") for s in seeds), (step, "step")]:
        if not 0 <= value < 2**64:
            raise DitkitError(f"{what} is {value}", allowed="0 to 2^64 - 1")
    counter = np.array([0, 0, 0, step], np.uint64)
    keys = [np.array([int(s), name], np.uint64) for s in seeds]
    return [np.random.Philox(counter=counter, key=key).random_raw(count) for key in keys]


def _unit(bits: np.ndarray, digits: int) -> np.ndarray:
    """The top ``digits`` bits as a number in [0, 1), float64."""
    return (bits >> np.uint64(64 - digits)) * 2.0**-digits


def _stack(rows: list[np.ndarray], shape: Sequence[int]) -> Tensor:
    if not rows:
        return torch.empty(0, *shape)
    return torch.from_numpy(np.stack(rows).astype(np.float32)).reshape(len(rows), *shape)
