"""The block of PixArt and its descendants: adaLN-single, and text by cross-attention (PixArt-alpha, 2310.00426, section 2.3).

(b1, s1, g1, b2, s2, g2) = E + T(t): a table of the block's own plus one projection of time that all blocks share.
x += g1 Attn(LN(x) (1 + s1) + b1)      x += Cross(x, text)      x += g2 MLP(LN(x) (1 + s2) + b2)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.seams import Attn, Seam
from ditkit.core.streams import Layout, Streams

from .kv_down import KVDown
from .layers import Linear, Mlp, modulate, plain


class SharedModulation(nn.Module):
    """T: time (B, 1 | N, D) -> (B, 1 | N, 7 D), the time itself for the head, then six parts for all blocks. A stream's ``c``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 6 * dim)

    def forward(self, t: Tensor) -> Tensor:
        return torch.cat([t, self.proj(F.silu(t))], -1)


class SelfAttention(nn.Module):
    """Queries, keys and values of one stream.

    Args:
        qk_norm: LayerNorm of queries and keys over all heads together (not head by head as in SD3).
        down: makes fewer keys and values; after the norm.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, down: KVDown | None = None) -> None:
        super().__init__()
        self.num_heads, self.down = num_heads, down
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(dim) if qk_norm else nn.Identity() for _ in range(2))

    def to_qkv(
        self, h: Tensor, grid: tuple[int, ...], linear: Linear = plain, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, N, D) -> q (B, H, N, d), k and v (B, H, N', d); these of ``other`` (B, M, D) where it is given. ``grid``: theirs."""
        if other is None:
            q, k, v = linear("qkv", self.qkv, h).chunk(3, -1)
        else:
            q = linear("qkv", self.qkv, h, slice(0, h.shape[-1]))
            k, v = linear("qkv", self.qkv, other, slice(h.shape[-1], None)).chunk(2, -1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.down is not None:
            k, v = self.down(k, grid), self.down(v, grid)
        return heads(q, self.num_heads), heads(k, self.num_heads), heads(v, self.num_heads)


class CrossAttention(nn.Module):
    """Queries of one stream, keys and values of another. What depends on the other alone can be made ahead, once a run."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def to_kv(self, text: Tensor, linear: Linear = plain) -> dict[str, Tensor]:
        """text (B, L, D) -> k and v (B, H, L, d)."""
        k, v = linear("kv", self.kv, text).chunk(2, -1)
        return {"k": heads(k, self.num_heads), "v": heads(v, self.num_heads)}


def heads(u: Tensor, num_heads: int) -> Tensor:
    """(B, N, D) -> (B, H, N, d)."""
    return u.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class AdaLNSingleBlock(nn.Module):
    """One block: the stream "img" asks itself, then "text", which passes through unchanged."""

    branches = ("attn", "cross", "mlp")

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qk_norm: bool = False, down: KVDown | None = None) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attn = SelfAttention(dim, num_heads, qk_norm, down)
        self.cross = CrossAttention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def calls(self, s: Streams) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Its attention calls: name -> (query streams, key streams)."""
        return {"attn": (("img",), ("img",)), "cross": (("img",), ("text",))}

    def keys(self, call: str, layouts: dict[str, Layout]) -> dict[str, Layout]:
        """The key layouts of a call: compressed keys are fewer than the tokens."""
        down = self.attn.down
        return layouts if down is None or call != "attn" else {"img": down.cached_layout(layouts["img"])}

    def projections(self) -> dict[str, nn.Module]:
        """What the seam ``linear`` is called with: name -> module."""
        a, c, m = self.attn, self.cross, self.mlp
        img = {"qkv": a.qkv, "proj": a.proj, "cross_q": c.q, "cross_proj": c.proj, "fc1": m.fc1, "fc2": m.fc2}
        return {**{f"img.{name}": module for name, module in img.items()}, "text.kv": c.kv}

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """c (B, 1 | N, 7 D) -> shift, scale, gate of the attention, then of the MLP, each (B, 1 | N, D)."""
        dim = self.table.shape[1]
        return (self.table + c[..., dim:].unflatten(-1, (6, dim))).unbind(-2)

    def forward(self, s: Streams, seam: Seam, prepared: dict[str, Tensor] | None = None, kv: Streams | None = None) -> Streams:
        """One block.

        Args:
            prepared: k and v of the text, where they were made ahead.
            kv: a stream "img" that gives keys and values instead of that of ``s`` (cross-density attention).
        """
        assert s["img"].c is not None
        mod = self.modulation(s["img"].c)
        s = self.attend(s, seam, *mod[:3], kv=kv)
        s = self.ask(s, seam, prepared)
        return self.feed(s, seam, *mod[3:])

    def attend(self, s: Streams, seam: Seam, shift: Tensor, scale: Tensor, gate: Tensor, *, kv: Streams | None = None) -> Streams:
        """Among the tokens of "img", or from them to those of ``kv``."""
        source, down = (kv or s).get("img", s["img"]), self.attn.down
        layout, asked = s["img"].layout, source.layout
        fewer = asked if down is None else down.layout(asked)  # here, so that the two kinds never share a graph

        def attention(h: dict[str, Tensor]) -> dict[str, Tensor]:
            other = None if source is s["img"] else modulate(source.x, shift, scale)
            q, k, v = self.attn.to_qkv(h["img"], asked.grid or (), img(seam), other)
            call = Attn("attn", {"img": q}, {"img": k}, {"img": v}, {"img": layout}, {"img": fewer})
            return {"img": img(seam)("proj", self.attn.proj, merge(seam.attend(call, s)["img"]))}

        return seam.residual("attn", attention, {"img": modulate(s["img"].x, shift, scale)}, {"img": gate}, s)

    def ask(self, s: Streams, seam: Seam, prepared: dict[str, Tensor] | None = None) -> Streams:
        """The text."""

        def cross(h: dict[str, Tensor]) -> dict[str, Tensor]:
            text = s["text"]
            made = None if seam.adapts else prepared  # what a base made ahead lacks what a view adds to the projection
            kv = made or self.cross.to_kv(text.x, lambda name, module, x: seam.linear(f"text.{name}", module, x))
            q = heads(img(seam)("cross_q", self.cross.q, h["img"]), self.cross.num_heads)
            call = Attn("cross", {"img": q}, {"text": kv["k"]}, {"text": kv["v"]}, {"img": s["img"].layout}, {"text": text.layout})
            return {"img": img(seam)("cross_proj", self.cross.proj, merge(seam.attend(call, s)["img"]))}

        return seam.residual("cross", cross, {"img": s["img"].x}, {}, s)  # neither norm nor gate

    def feed(self, s: Streams, seam: Seam, shift: Tensor, scale: Tensor, gate: Tensor) -> Streams:
        """The MLP."""

        def mlp(h: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"img": self.mlp(h["img"], img(seam))}

        return seam.residual("mlp", mlp, {"img": modulate(s["img"].x, shift, scale)}, {"img": gate}, s)


def img(seam: Seam, prefix: str = "") -> Linear:
    """The seam ``linear`` for the projections of "img", with ``prefix`` before their names."""
    return lambda name, module, x, part=None: seam.linear(f"img.{prefix}{name}", module, x, part)


def merge(o: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, D)."""
    return o.transpose(1, 2).flatten(2)


class AdaLNSingleHead(nn.Module):
    """Linear(LN(x) (1 + s) + b), (b, s) = E + t: the time itself, not its projection. x (B, N, D), c as in the blocks -> (B, N, P)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj = nn.Linear(dim, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        t = c[..., : self.table.shape[1]]
        return self.proj(modulate(x, self.table[0] + t, self.table[1] + t))
