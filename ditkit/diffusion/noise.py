"""Counter-based noise: every number is a function of (seed, step, purpose), so a picture never depends on its batch.

Picture k of seed s has the seed s + k. The bits are Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011), computed for all pictures at once on the CPU: they are the same on every machine and for every version.
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
        step: counts the draws of one purpose, 0 to 2^32 - 1.
        purpose: any name ("start", "step", "time"); different purposes are independent.
    """
    words = _words(seeds, step, purpose, math.prod(shape))
    radius = np.sqrt(-2.0 * np.log((words[0::2] + 1.0) * 2.0**-32))  # Box and Muller 1958, on (0, 1]
    angle = words[1::2] * (2.0 * np.pi * 2.0**-32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)  # (2, 2, S, blocks): words 0, 1 and words 2, 3
    return _rows(pairs.reshape(4, *words.shape[1:]), shape)


def uniform(seeds: Sequence[int], step: int, purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """Uniform numbers in [0, 1), float32 (len(seeds), *shape), multiples of 2^-24. Arguments as for ``normal``."""
    words = _words(seeds, step, purpose, math.prod(shape))
    return _rows((words >> np.uint64(8)) * 2.0**-24, shape)


def source(seeds: Sequence[int], like: Tensor) -> Draw:
    """``draw(step, purpose) -> Tensor like x`` for the solvers, where ``like`` is x (B, ...) with B = len(seeds)."""
    if len(seeds) != len(like):
        raise DitkitError(f"{len(seeds)} seeds for a batch of {len(like)}", allowed="one seed for each picture")
    shape, device, dtype = like.shape[1:], like.device, like.dtype
    return lambda step, purpose: normal(seeds, step, purpose, shape).to(device, dtype)


def _words(seeds: Sequence[int], step: int, purpose: str, count: int) -> np.ndarray:
    """32-bit words in uint64, (4, len(seeds), blocks) with 4 blocks >= count. Key: the seed; counter: (block, step, purpose)."""
    for value, bits, what in [*((s, 64, "seed") for s in seeds), (step, 32, "step")]:
        if not 0 <= value < 2**bits:
            raise DitkitError(f"{what} is {value}", allowed=f"0 to 2^{bits} - 1")
    key = np.array([int(s) for s in seeds], np.uint64)[:, None]
    name = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    blocks = np.arange(-(-count // 4), dtype=np.uint64)[None]
    constants = [np.full((1, 1), c, np.uint64) for c in (step, name & 0xFFFFFFFF, name >> 32)]
    return philox([blocks, *constants], [key & MASK, key >> HALF])


MASK, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


def philox(counter: Sequence[np.ndarray], key: Sequence[np.ndarray]) -> np.ndarray:
    """Philox-4x32-10: four counter words and two key words, uint64 arrays of 32-bit values that broadcast -> (4, ...)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & MASK, (p0 >> HALF) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & MASK, (k1 + _KEY_STEPS[1]) & MASK
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3))


def _rows(values: np.ndarray, shape: Sequence[int]) -> Tensor:
    """(4, S, blocks) -> float32 (S, *shape): a row reads its blocks in order, four numbers each."""
    _, seeds, blocks = values.shape
    flat = values.astype(np.float32).transpose(1, 2, 0).reshape(seeds, 4 * blocks)[:, : math.prod(shape)]
    return torch.from_numpy(np.ascontiguousarray(flat)).reshape(seeds, *shape)
