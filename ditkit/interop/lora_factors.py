"""The arithmetic of LoRA pairs between layouts: projections that one layout fuses and another keeps apart, rows in another order.

Rows of B belong to rows of the weight, A to its inputs: whatever is done to the rows of W is done to B alone, and A stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The change (alpha / r) B A of one weight (out, in)."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """(alpha / r) B A: (out, in), in at least fp32."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        return self.scale * (self.b.to(dtype) @ self.a.to(dtype))


def pick_rows(f: Factors, rows: Tensor) -> Factors:
    """The pair that changes rows ``rows`` (n,) of f's weight: B[rows], A whole.

    Where these are some rows only, ranks that reach none of them are left out, so that what ``join_rows`` set side by side comes
    apart again; alpha / r stays.
    """
    b = f.b[rows]
    used = b.abs().amax(0) > 0
    if len(rows) == len(f.b) or not bool(used.any()) or bool(used.all()):
        return Factors(f.a, b, f.alpha)
    return Factors(f.a[used], b[:, used], f.scale * int(used.sum()))


def join_rows(parts: Sequence[tuple[Factors, Tensor]], out: int) -> Factors:
    """The pair for a weight of ``out`` rows, whose rows ``rows`` change as each part (pair, rows) says and the others not at all.

    Parts of one A and one scale share A; otherwise the A are stacked and B is block-diagonal, so that ranks add up. Exact, up to
    the rounding of B where the scales differ (they are then taken into B).
    """
    first = parts[0][0]
    one_scale = all(f.scale == first.scale for f, _ in parts)
    if one_scale and all(torch.equal(f.a, first.a) for f, _ in parts):
        b = first.b.new_zeros(out, first.rank)
        for f, rows in parts:
            b[rows] = f.b
        return Factors(first.a, b, first.alpha)
    rank, start = sum(f.rank for f, _ in parts), 0
    b = first.b.new_zeros(out, rank)
    for f, rows in parts:
        b[rows, start : start + f.rank] = f.b if one_scale else f.scale * f.b
        start += f.rank
    return Factors(torch.cat([f.a for f, _ in parts]), b, first.scale * rank if one_scale else float(rank))
