"""Positions on grids of any number of axes: fixed sine-cosine tables, rotary embeddings, and the rules that place tokens.

A grid is a tuple with one entry for each axis, the slowest first: a number of tokens, or an ``Axis`` that says where they stand.
Tables are computed in float64 on the CPU, cast to fp32, and cached by grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ditkit.core.errors import DitkitError


class Axis(NamedTuple):
    """``n`` tokens at start + step * i, i = 0 .. n - 1."""

    n: int
    start: float = 0.0
    step: float = 1.0


Grid = tuple[int | Axis, ...]


def stretched(grid: tuple[int, ...], base: int, scale: float = 1.0) -> tuple[Axis, ...]:
    """Every grid onto [0, base / scale): i base / (n scale) (PixArt, STDiT3). ``base`` tokens at scale 1 are whole numbers."""
    return tuple(Axis(n, 0.0, base / (n * scale)) for n in grid)


def cropped(grid: tuple[int, ...], table: int, base: float) -> tuple[Axis, ...]:
    """The middle of a square table of ``table`` tokens a side, which spans [0, base) (SD3)."""
    if max(grid) > table:
        raise DitkitError(f"a grid of {grid}", allowed=f"at most {table} tokens a side: the position table has no more")
    return tuple(Axis(n, (table - n) // 2 * base / table, base / table) for n in grid)


def fitted(grid: tuple[int, int], base: tuple[int, int]) -> tuple[Axis, Axis]:
    """The grid scaled, centred and rounded into ``base`` (h, w), ends included as n (stop / n) (CogVideoX 1.0, HunyuanDiT)."""
    (h, w), (base_h, base_w) = grid, base
    high = h / w > base_h / base_w
    inner = (base_h, round(base_h / h * w)) if high else (round(base_w / w * h), base_w)
    axes = []
    for n, whole, size in zip(grid, base, inner):
        start = round((whole - size) / 2)
        last = (start + size) * (n - 1) / n
        axes.append(Axis(n, float(start), (last - start) / max(n - 1, 1)))
    return axes[0], axes[1]


def coordinates(grid: Grid) -> Tensor:
    """(1, N, A) float64 positions of the tokens, row-major."""
    axes = [a if isinstance(a, Axis) else Axis(a) for a in grid]
    lines = [a.start + a.step * torch.arange(a.n, dtype=torch.float64) for a in axes]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).reshape(1, -1, len(axes))


@lru_cache(maxsize=64)
def sincos_table(
    dim: int, grid: Grid, device: torch.device | None = None, order: tuple[int, ...] = (), widths: tuple[int, ...] = ()
) -> Tensor:
    """(1, N, dim) fixed position code (DiT, models.py, for two axes).

    Each axis has [sin, cos] of position times 10000^(-k / (width / 2)), k < width / 2.

    Args:
        order: in which order the axes take their channels; default: the *last* axis (the column) first, as DiT and PixArt have it.
        widths: channels of each axis of the grid; default: equal parts.
    """
    axes = len(grid)
    widths = widths or (dim // axes,) * axes
    if sum(widths) != dim or any(w % 2 for w in widths) or len(widths) != axes:
        raise DitkitError(f"dim is {dim}", allowed=f"multiples of {2 * axes} for {axes} position axes, or even widths that sum to it")
    with torch.inference_mode(False):
        return sincos_at(coordinates(grid), widths, _checked(order, axes)).to(device)


def sincos_at(places: Tensor, widths: tuple[int, ...], order: tuple[int, ...] = ()) -> Tensor:
    """The same code at any places (b, N, A): (b, N, sum of widths) fp32."""
    codes = []
    for a in order or reversed(range(len(widths))):
        angle = places[..., a, None].double() * frequencies(widths[a]).to(places.device)
        codes += [angle.sin(), angle.cos()]
    return torch.cat(codes, -1).float()


def frequencies(width: int, theta: float = 10_000.0, linear: float = 1.0, ntk: float | Tensor = 1.0) -> Tensor:
    """(width / 2,) float64: (theta ntk)^(-2k / width) / linear. ``linear`` > 1 interpolates positions, ``ntk`` > 1 the low frequencies.

    ``ntk`` (B, 1, 1) gives (B, 1, width / 2).
    """
    device = ntk.device if isinstance(ntk, Tensor) else None
    return (theta * ntk) ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width) / linear


def frequency_aware(width: int, scale: float, length: float, theta: float = 10_000.0) -> Tensor:
    """NTK scaling by which the frequency whose period is the trained ``length`` is interpolated exactly, and lower ones no further.

    b' = b s^(d / d'), d' = d log_b(L / 2 pi); each frequency is at least the interpolated one (Lumina-Next, 2406.18583, on 2K images). A
    length within the shortest period, 2 pi: all are interpolated.
    """
    if length <= 2 * torch.pi:
        return frequencies(width, theta, linear=scale)
    turns = torch.log(torch.tensor(length / (2 * torch.pi), dtype=torch.float64)) / torch.log(torch.tensor(theta, dtype=torch.float64))
    return torch.maximum(frequencies(width, theta, ntk=scale ** float(1 / turns)), frequencies(width, theta, linear=scale))


def time_aware(width: int, scale: float, t: float | Tensor, theta: float = 10_000.0) -> Tensor:
    """From interpolation in noise (public t = 1) to NTK scaling at the data (t = 0): b' = b s^(d / d_t), d_t = (d - 1)(1 - t) + 1.

    Frequencies below the interpolated ones are raised to these, without which they would vanish at t = 1 (Lumina-Next, 2406.18583).
    ``t`` (B,) gives (B, 1, width / 2).
    """
    t = t.double()[:, None, None] if isinstance(t, Tensor) else t
    raised = frequencies(width, theta, ntk=scale ** (width / ((width - 1) * (1 - t) + 1)))
    return torch.maximum(raised, frequencies(width, theta, linear=scale).to(raised.device))


Pairing = Literal["interleaved", "halves", "halves by axis"]
Mix = Literal["axis by axis", "alternating"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions (2104.09864) over several axes: the pairs of a head's channels are turned by position times frequency.

    Args:
        widths: channels of the head that each axis of the grid turns; their sum is the head's width.
        pairing: which channels are a pair: "interleaved": 2j and 2j + 1 (FLUX, CogVideoX, Wan); "halves": j and j + d/2;
            "halves by axis": the same within the channels of each axis (Open-Sora-Plan).
        mix: "axis by axis", or "alternating": pair after pair of each axis in turn (Lumina-Next).
        order: in which order the axes take their channels; default: as in the grid. HunyuanDiT: (1, 0), the column first.
        theta, linear, ntk: see ``frequencies``.
    """

    widths: tuple[int, ...]
    pairing: Pairing = "interleaved"
    mix: Mix = "axis by axis"
    order: tuple[int, ...] = ()
    theta: float = 10_000.0
    linear: float = 1.0
    ntk: float = 1.0

    def __post_init__(self) -> None:
        if any(w < 2 or w % 2 for w in self.widths):
            raise DitkitError(f"widths {self.widths}", allowed="even numbers from 2, one for each axis")
        if self.mix == "alternating" and (len(set(self.widths)) > 1 or self.pairing != "interleaved"):
            raise DitkitError(f"widths {self.widths}, pairing {self.pairing!r} alternating", allowed="equal widths, interleaved")
        _checked(self.order, len(self.widths))

    def table(self, grid: Grid, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin for a full grid, each (1, N, head width) fp32, for ``Stream.rope``. Cached."""
        return _rope_table(self, grid, device)

    def at(self, coords: Tensor, frequencies: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """cos and sin at ``coords`` (b, N, A), each (b, N, head width) fp32; ``frequencies``: other ones, for each axis."""
        if coords.shape[-1] != len(self.widths):
            raise DitkitError(f"{coords.shape[-1]} position axes", allowed=f"{len(self.widths)}, as the rotary widths {self.widths}")
        turns = frequencies or self.frequencies()
        angles = [coords[..., a, None].double() * turns[a].to(coords.device) for a in self.order or range(len(self.widths))]
        if self.pairing == "interleaved":
            flat = torch.cat(angles, -1) if self.mix == "axis by axis" else torch.stack(angles, -1).flatten(-2)
            angle = flat.repeat_interleave(2, -1)
        else:
            angle = torch.cat([u for a in angles for u in (a, a)] if self.pairing == "halves by axis" else [*angles, *angles], -1)
        return angle.cos().float(), angle.sin().float()

    def frequencies(self) -> list[Tensor]:
        """Those of each axis of the grid."""
        return [frequencies(w, self.theta, self.linear, self.ntk) for w in self.widths]

    def apply(self, q: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """``apply_rope`` with this pairing."""
        return apply_rope(q, rope, self.pairing, tuple(self.widths[a] for a in self.order) or self.widths)


@lru_cache(maxsize=64)
def _rope_table(rope: Rope, grid: Grid, device: torch.device | None) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        cos, sin = rope.at(coordinates(grid))
        return cos.to(device), sin.to(device)


def apply_rope(q: Tensor, rope: tuple[Tensor, Tensor] | None, pairing: Pairing = "interleaved", widths: tuple[int, ...] = ()) -> Tensor:
    """Turn queries or keys q (B, H, N, d) by rope (cos, sin), each (b, N, d); in fp32, returned in q's dtype. None: q.

    ``widths``: only for "halves by axis", the channels of each axis in their order.
    """
    if rope is None:
        return q
    cos, sin = (u[:, None] for u in rope)
    x = q.float()
    if pairing == "interleaved":
        even, odd = sin.unflatten(-1, (-1, 2)).unbind(-1)
        sin = torch.stack((-even, odd), -1).flatten(-2)  # the sign is the table's, which is smaller
        turned = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        parts = x.split(widths, -1) if pairing == "halves by axis" else (x,)
        turned = torch.cat([u for part in parts for u in _turn(part)], -1)
    return torch.addcmul(x * cos, turned, sin).to(q.dtype)


def _turn(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.chunk(2, -1)
    return -b, a


def _checked(order: tuple[int, ...], axes: int) -> tuple[int, ...]:
    if order and sorted(order) != list(range(axes)):
        raise DitkitError(f"order is {order}", allowed=f"the axes 0 to {axes - 1}, each once")
    return order
