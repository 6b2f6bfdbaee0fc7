"""Buckets: sizes of about equal area for pictures of any shape, so that nothing is squashed and little is cut off.

PixArt's tables (arXiv 2310.00426, appendix) are 40 sizes, published as data. ``sizes_within`` gives them by a rule, for a multiple of a
sixteenth of the side: all rectangles of whole units whose area is at most that of the square and at least nine tenths of it, with sides
of at most 4 to 1. It gives one more, 1344 x 704 at 1024, which the published table has lying and not standing.

Different from the released code: a picture is never enlarged, and the nearest size is that of the nearest logarithm of the ratio, so that
wide and high pictures are treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ditkit.core.config import Config

Size = tuple[int, int]  # height and width, pixels


class Buckets(Config):
    """Sizes that pictures are brought to, all of one batch to the same one."""

    resolutions: tuple[int, ...] = Field(min_length=1, description="sides of squares, in pixels: each is a budget, the area of that square")
    multiple: int = Field(ge=1, description="of which every side is a multiple: patch size x pixels of a latent (PixArt: 16)")
    max_ratio: float = Field(4.0, ge=1, description="longer side over shorter side; pictures beyond it are left out")
    fill: float = Field(0.9, gt=0, le=1, description="smallest area of a size, as a share of the budget")
    sizes: Literal["largest", "all"] = Field(
        "largest", description="a picture is trained at the largest budget that it fills, or at each of them"
    )

    @model_validator(mode="after")
    def _fits(self) -> Buckets:
        for side in self.resolutions:
            if side < 1 or side % self.multiple:
                raise ValueError(f"resolution {side} is no multiple of {self.multiple}")
        if list(self.resolutions) != sorted(set(self.resolutions)):
            raise ValueError(f"resolutions {self.resolutions} do not rise")
        return self

    def of(self, height: int, width: int) -> tuple[Size, ...]:
        """The sizes at which a picture of that size is trained; none if it is too small or too long."""
        if max(height, width) > self.max_ratio * min(height, width):
            return ()
        return _sizes_of(self, height, width)

    def fault(self, height: int, width: int) -> str:
        """Why a picture of that size cannot be used; "" if it can."""
        if self.of(height, width):
            return ""
        if max(height, width) > self.max_ratio * min(height, width):
            return f"has sides of {width} and {height} pixels (buckets: one up to {self.max_ratio:g} times the other)"
        return (
            f"has {width}x{height} pixels, too few to fill any size of {self.resolutions[0]} x {self.resolutions[0]} without enlarging it"
        )


@lru_cache(maxsize=256)
def sizes_within(resolution: int, multiple: int, max_ratio: float = 4.0, fill: float = 0.9) -> tuple[Size, ...]:
    """The sizes of a budget, widest first."""
    side = resolution // multiple
    least, most = fill * side * side - 1e-9, side * side
    found = [(h, w) for h in range(1, most + 1) for w in range(math.ceil(least / h), most // h + 1) if max(h, w) <= max_ratio * min(h, w)]
    return tuple((h * multiple, w * multiple) for h, w in sorted(found, key=lambda size: (size[0] / size[1], size[0])))


@lru_cache(maxsize=1 << 16)
def _sizes_of(buckets: Buckets, height: int, width: int) -> tuple[Size, ...]:
    found = []
    for resolution in reversed(buckets.resolutions):
        table = sizes_within(resolution, buckets.multiple, buckets.max_ratio, buckets.fill)
        filled = [size for size in table if size[0] <= height and size[1] <= width]
        if filled:
            found.append(min(filled, key=lambda size: abs(math.log(height / width) - math.log(size[0] / size[1]))))
            if buckets.sizes == "largest":
                break
    return tuple(found)


def grouped(sizes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """The numbers of the samples of each size, small sizes first."""
    numbers: dict[tuple[int, ...], list[int]] = {}
    for i, size in enumerate(sizes):
        numbers.setdefault(size, []).append(i)
    return [np.array(numbers[size], np.int64) for size in sorted(numbers, key=lambda size: (np.prod(size), size))]
