"""Rotary positions on grids larger than those of training (Lumina-T2X, 2405.05945, section 2.3; Lumina-Next, 2406.18583, section 2.3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ditkit.core.config import Config

from .positions import Rope, frequencies, frequency_aware, time_aware


class Extrapolation(Config):
    """What changes where a grid is larger than the trained one. s: how many times longer the sequence or, with two axes, each of them.

    Network time t is 0 for noise and 1 for data, as Lumina has it.
    """

    rule: Literal["none", "interpolation", "ntk", "switch", "time_aware", "frequency_aware"] = Field(
        "none",
        description="interpolation: positions / s; ntk: base x s; switch: the first while t < watershed, then the second (as released); "
        "time_aware: from the first to the second; frequency_aware: only frequencies that never turned fully in training",
    )
    scale: float | None = Field(None, gt=0, description="s; None: by the size of the picture, at least 1")
    watershed: float = Field(0.3, ge=0, le=1, description="of the rule switch")
    proportional: bool = Field(False, description="attention as sharp as among the trained number of tokens: logits x sqrt(log_N0 N)")
    base_tokens: int | None = Field(None, ge=2, description="N0; None: the tokens of input_size")

    @property
    def timed(self) -> bool:
        """The positions depend on time."""
        return self.rule in ("switch", "time_aware")


def turns(rope: Rope, how: Extrapolation, scale: float, lengths: tuple[int, ...], t: Tensor | None = None) -> list[Tensor]:
    """The frequencies of each axis: (width / 2,) float64 or, by the timed rules, (B, 1, width / 2).

    Args:
        rope: with the scaling that it was trained with, which stays.
        scale: s.
        lengths: trained tokens along each axis, for "frequency_aware".
        t: (B,) network time, for the timed rules.
    """
    return [_axis(width, rope, how, scale, length, t) for width, length in zip(rope.widths, lengths, strict=True)]


def _axis(width: int, rope: Rope, how: Extrapolation, scale: float, length: int, t: Tensor | None) -> Tensor:
    base, linear = rope.theta * rope.ntk, rope.linear
    interpolated, ntk = frequencies(width, base, linear * scale), frequencies(width, base, linear, scale)
    if how.rule == "interpolation":
        return interpolated
    if how.rule == "ntk":
        return ntk
    if how.rule == "frequency_aware":
        return frequency_aware(width, scale, length, base) / linear
    if how.rule == "none" or t is None:
        return frequencies(width, base, linear)
    if how.rule == "time_aware":
        return time_aware(width, scale, 1 - t, base) / linear
    early = (t < how.watershed)[:, None, None]
    return torch.where(early, interpolated.to(t.device), ntk.to(t.device))


def times_longer(how: Extrapolation, tokens: int, trained: int, axes: int) -> float:
    """s for ``tokens`` in place of ``trained``, spread over ``axes`` rotary axes."""
    return how.scale or max(1.0, math.pow(tokens / trained, 1 / axes))
