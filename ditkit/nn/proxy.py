"""Few tokens that stand for the windows of a grid, and the block that lets all others ask them (PT-DiT, 2409.04005, section 3).

p = Pool(x);  p += Attn(LN p);  x += Z1 Cross(LN x, LN p);  x += g1 Attn_window(mod(LN x));  x += Z2 (g Attn_shifted(mod'(LN x)));
x += Cross(x, text);  x += g2 MLP(mod(LN x)). Z1 and Z2 are linear layers that start as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.errors import DitkitError
from ditkit.core.masks import MaskFn, Within
from ditkit.core.seams import Attn, Seam
from ditkit.core.streams import Layout, Stream, Streams, grid_layout
from ditkit.core.windows import Cells

from .adaln_single import AdaLNSingleBlock, CrossAttention, SelfAttention, heads, img, merge
from .layers import modulate

Grid = tuple[int, ...]
How = Literal["mean", "first"]
Groups = Literal["strided", "contiguous"]


@dataclass(frozen=True)
class Proxies:
    """The tokens of a grid that stand for its windows.

    Args:
        sides: of a window, in tokens; windows at the upper borders may be smaller.
        counts: how many proxies a window has along each axis.
        how: the mean of the tokens that a proxy stands for, or the first of them.
        groups: "strided": every counts-th token is of one group, as the released code has it; "contiguous": a part of the window, as
            the paper draws it. The same where counts are 1.
    """

    sides: Grid
    counts: Grid
    how: How = "mean"
    groups: Groups = "strided"

    def __post_init__(self) -> None:
        if len(self.sides) != len(self.counts) or any(n < 1 or side % n for side, n in zip(self.sides, self.counts)):
            raise DitkitError(f"{self.counts} proxies in windows of {self.sides}", allowed="on each axis a divisor of the window's side")

    def pool(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, N, D) of a full grid -> (B, P S, D): the S proxies of each of P windows, windows one after the other."""
        whole = tuple(-(-n // side) * side for n, side in zip(grid, self.sides))
        u = x.unflatten(1, grid)
        if whole == grid:
            return self._reduce(u)
        missing = [n for a, b in zip(reversed(whole), reversed(grid)) for n in (0, a - b)]
        there = self._reduce(F.pad(torch.ones_like(u[:1, ..., :1]), (0, 0, *missing)))
        return self._reduce(F.pad(u, (0, 0, *missing))) / there.clamp(min=1e-6)

    def _reduce(self, u: Tensor) -> Tensor:
        """(B, *sides, D) of whole windows -> (B, P S, D)."""
        axes, apart = len(self.sides), self.groups == "strided"
        parts = [(-1, side // n, n) if apart else (-1, n, side // n) for side, n in zip(self.sides, self.counts)]
        for axis, part in enumerate(parts):
            u = u.unflatten(1 + 2 * axis, part)
            member = 2 + 2 * axis + (not apart)
            u = u.mean(member) if self.how == "mean" else u.select(member, 0)
        if max(self.counts) > 1:  # (P, S) of each axis -> all P, all S
            u = u.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
        return u.flatten(1, -2)

    def layout(self, grid: Grid, device: torch.device | None = None) -> Layout:
        """Where the proxies of a grid stand, each in the middle of its tokens; a group that is all border is none. Cached."""
        return _layout(self, grid, device)


@lru_cache(maxsize=64)
def _layout(proxies: Proxies, grid: Grid, device: torch.device | None) -> Layout:
    with torch.inference_mode(False):
        whole = grid_layout(grid)
        coords = proxies.pool(whole.coords, grid)
        there = proxies.pool(torch.ones(1, whole.total, 1), grid).reshape(1, -1) > 0
        valid = None if there.all() else there.to(device)
        return Layout(coords.to(device), coords.shape[1], valid=valid)


class ProxyBlock(AdaLNSingleBlock):
    """One block over the streams "img", "proxy" (made anew from "img", see ``stream``) and "text".

    Args:
        dim, num_heads, mlp_ratio: widths.
        proxies: which tokens stand for which.
        shifted: has attention in shifted windows too.
    """

    def __init__(self, dim: int, num_heads: int, proxies: Proxies, mlp_ratio: float = 4.0, shifted: bool = True) -> None:
        super().__init__(dim, num_heads, mlp_ratio)
        self.proxies, self.shifted, self.kind = proxies, shifted, (proxies, shifted)
        self.branches = ("proxy", "visual", "attn", *(("shift",) if shifted else ()), "cross", "mlp")
        self.proxy = SelfAttention(dim, num_heads)
        self.visual, self.visual_out = CrossAttention(dim, num_heads), nn.Linear(dim, dim)
        if shifted:
            self.shift_table = nn.Parameter(torch.randn(3, dim) / dim**0.5)
            self.shift, self.shift_out = SelfAttention(dim, num_heads), nn.Linear(dim, dim)
        self.masks = self._masks()
        self.silence()

    def _masks(self) -> dict[str, tuple[MaskFn, ...]]:
        """Windows are gathered: no more is computed than is seen."""
        sides = self.proxies.sides
        found: dict[str, tuple[MaskFn, ...]] = {"attn": (Within(Cells(sides=sides, how="gathered")),)}
        if self.shifted:
            half = tuple(side // 2 for side in sides)
            found["shift"] = (Within(Cells(sides=sides, shift=half, how="gathered")),)
        return found

    def silence(self) -> None:
        """Zeros in Z1 and Z2: the block starts with windows alone."""
        for layer in (self.visual_out, *((self.shift_out,) if self.shifted else ())):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @staticmethod
    def stream(x: Tensor, grid: Grid, proxies: Proxies) -> Stream:
        """What a block needs beside "img" (B, N, D): a stream whose tokens each block makes."""
        layout = proxies.layout(grid, x.device)
        return Stream(x.new_zeros(len(x), layout.total, x.shape[-1]), layout)

    def calls(self, s: Streams) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        found: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {"proxy": (("proxy",), ("proxy",)), "visual": (("img",), ("proxy",))}
        return {**found, **({"shift": (("img",), ("img",))} if self.shifted else {}), **super().calls(s)}

    def projections(self) -> dict[str, nn.Module]:
        p, v = self.proxy, self.visual
        found = {"proxy.qkv": p.qkv, "proxy.proj": p.proj, "proxy.visual_kv": v.kv}
        found |= {"img.visual_q": v.q, "img.visual_proj": v.proj, "img.visual_out": self.visual_out}
        if self.shifted:
            found |= {"img.shift_qkv": self.shift.qkv, "img.shift_proj": self.shift.proj, "img.shift_out": self.shift_out}
        return {**found, **super().projections()}

    def forward(self, s: Streams, seam: Seam, prepared: dict[str, Tensor] | None = None) -> Streams:  # type: ignore[override]
        """One block; there is no ``kv``, since windows are those of its own tokens. ``prepared``: k and v of the text, made ahead."""
        c, layout = s["img"].c, s["img"].layout
        assert c is not None
        if layout.grid is None:
            raise DitkitError("proxies stand for windows of the grid", allowed="all tokens, in order")
        mod = self.modulation(c)
        s = {**s, "proxy": s["proxy"]._replace(x=self.proxies.pool(s["img"].x, layout.grid))}
        s = self.inject(self.confer(s, seam), seam)
        s = self.attend(s, seam, *mod[:3])
        if self.shifted:
            s = self.attend_shifted(s, seam, c)
        s = self.ask(s, seam, prepared)
        return self.feed(s, seam, *mod[3:])

    def confer(self, s: Streams, seam: Seam) -> Streams:
        """Among the proxies; nothing modulates them."""

        def linear(name: str, module: nn.Module, x: Tensor) -> Tensor:
            return seam.linear(f"proxy.{name}", module, x)

        def attention(h: dict[str, Tensor]) -> dict[str, Tensor]:
            q, k, v = self.proxy.to_qkv(h["proxy"], (), linear)
            layouts = {"proxy": s["proxy"].layout}
            o = seam.attend(Attn("proxy", {"proxy": q}, {"proxy": k}, {"proxy": v}, layouts, layouts), s)
            return {"proxy": linear("proj", self.proxy.proj, merge(o["proxy"]))}

        return seam.residual("proxy", attention, {"proxy": _norm(s["proxy"].x)}, {}, s)

    def inject(self, s: Streams, seam: Seam) -> Streams:
        """All tokens ask the proxies; Z1 stands where a gate would."""
        linear = img(seam, "visual_")

        def cross(h: dict[str, Tensor]) -> dict[str, Tensor]:
            kv = self.visual.to_kv(h["proxy"], lambda name, module, x: seam.linear(f"proxy.visual_{name}", module, x))
            q = heads(linear("q", self.visual.q, h["img"]), self.visual.num_heads)
            layouts = {"img": s["img"].layout}, {"proxy": s["proxy"].layout}
            o = merge(seam.attend(Attn("visual", {"img": q}, {"proxy": kv["k"]}, {"proxy": kv["v"]}, *layouts), s)["img"])
            return {"img": linear("out", self.visual_out, linear("proj", self.visual.proj, o))}

        return seam.residual("visual", cross, {n: _norm(s[n].x) for n in ("img", "proxy")}, {}, s)

    def attend_shifted(self, s: Streams, seam: Seam, c: Tensor) -> Streams:
        """In windows that lie across four of the others; modulated as those, but for a table of its own; gated before Z2."""
        dim = self.table.shape[1]
        shift, scale, gate = (self.shift_table + c[..., dim : 4 * dim].unflatten(-1, (3, dim))).unbind(-2)
        linear, layouts = img(seam, "shift_"), {"img": s["img"].layout}

        def attention(h: dict[str, Tensor]) -> dict[str, Tensor]:
            q, k, v = self.shift.to_qkv(h["img"], (), linear)
            o = seam.attend(Attn("shift", {"img": q}, {"img": k}, {"img": v}, layouts, layouts), s)
            return {"img": linear("out", self.shift_out, gate * linear("proj", self.shift.proj, merge(o["img"])))}

        return seam.residual("shift", attention, {"img": modulate(s["img"].x, shift, scale)}, {}, s)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
