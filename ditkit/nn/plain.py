"""The transformer block without modulation: conditions are tokens, in a row with the others or asked by cross-attention.

x += Attn(LN x)      [x += Cross(LN x, context)]      x += MLP(LN x)        LN with scale and shift of its own

ViT's block (2010.11929), as DiT's in-context and cross-attention variants have it (2212.09748, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ditkit.core.errors import DitkitError
from ditkit.core.seams import Attn, Seam
from ditkit.core.streams import Stream, Streams

from .adaln_single import CrossAttention, heads, merge
from .layers import Linear, Mlp
from .positions import apply_rope


class PlainBlock(nn.Module):
    """One block over the streams ``names``; other streams pass through.

    Args:
        dim, num_heads, mlp_ratio: widths.
        names: streams that are one sequence to it: the same weights, each token sees all. Its projections bear the first name.
        context: a stream whose keys and values are asked after the self-attention, and which stays as it is; "": none.
        mlp_norm_eps: of the norm before the MLP; the others have 1e-6.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        names: tuple[str, ...] = ("img",),
        context: str = "",
        mlp_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise DitkitError(f"dim {dim} with num_heads {num_heads}", allowed="a multiple of num_heads")
        self.num_heads, self.names, self.context = num_heads, names, context
        self.branches = ("attn", "cross", "mlp") if context else ("attn", "mlp")
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=mlp_norm_eps)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        if context:
            self.cross_norm, self.cross = nn.LayerNorm(dim, eps=1e-6), CrossAttention(dim, num_heads)

    def calls(self, s: Streams) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Its attention calls: name -> (query streams, key streams)."""
        names = tuple(n for n in self.names if n in s)
        return {"attn": (names, names), **({"cross": (names, (self.context,))} if self.context else {})}

    def projections(self) -> dict[str, nn.Module]:
        """What the seam ``linear`` is called with: name -> module."""
        mine: dict[str, nn.Module] = {"qkv": self.qkv, "proj": self.proj, "fc1": self.mlp.fc1, "fc2": self.mlp.fc2}
        if self.context:
            mine |= {"cross_q": self.cross.q, "cross_proj": self.cross.proj}
        found = {f"{self.names[0]}.{name}": module for name, module in mine.items()}
        return {**found, f"{self.context}.kv": self.cross.kv} if self.context else found

    def forward(self, s: Streams, seam: Seam, kv: Streams | None = None) -> Streams:
        """One block. ``kv``: streams that give keys and values instead of those of ``s`` (cross-density attention)."""
        names = [n for n in self.names if n in s]
        source = {**s, **(kv or {})}

        def linear(name: str, module: nn.Module, x: Tensor, part: slice | None = None) -> Tensor:
            return seam.linear(f"{self.names[0]}.{name}", module, x, part)

        def attention(h: dict[str, Tensor]) -> dict[str, Tensor]:
            here = {n: h[n] for n in names if n not in (kv or {})}
            q, k, v = self._qkv(here, s, linear) if here else ({}, {}, {})
            for n in [n for n in names if n not in here]:
                q[n], k[n], v[n] = self._across(h[n], s[n], source[n], linear)
            q, k, v = ({n: u[n] for n in names} for u in (q, k, v))  # in the order of the layouts
            o = seam.attend(Attn("attn", q, k, v, {n: s[n].layout for n in names}, {n: source[n].layout for n in names}), s)
            return in_a_row(lambda u: linear("proj", self.proj, u), {n: merge(u) for n, u in o.items()})

        def cross(h: dict[str, Tensor]) -> dict[str, Tensor]:
            context = source[self.context]
            told = self.cross.to_kv(context.x, lambda name, module, x: seam.linear(f"{self.context}.{name}", module, x))
            q = in_a_row(lambda u: linear("cross_q", self.cross.q, u), h)
            call = Attn(
                "cross",
                {n: heads(u, self.num_heads) for n, u in q.items()},
                {self.context: told["k"]},
                {self.context: told["v"]},
                {n: s[n].layout for n in names},
                {self.context: context.layout},
            )
            o = seam.attend(call, s)
            return in_a_row(lambda u: linear("cross_proj", self.cross.proj, u), {n: merge(u) for n, u in o.items()})

        def mlp(h: dict[str, Tensor]) -> dict[str, Tensor]:
            return in_a_row(lambda u: self.mlp(u, linear), h)

        s = seam.residual("attn", attention, {n: self.norm1(s[n].x) for n in names}, {}, s)
        if self.context:
            s = seam.residual("cross", cross, {n: self.cross_norm(s[n].x) for n in names}, {}, s)
        return seam.residual("mlp", mlp, {n: self.norm2(s[n].x) for n in names}, {}, s)

    def _across(self, h: Tensor, st: Stream, source: Stream, linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of h (B, N, D), keys and values of the tokens of ``source``."""
        dim = h.shape[-1]
        q = heads(linear("qkv", self.qkv, h, slice(0, dim)), self.num_heads)
        kv = linear("qkv", self.qkv, self.norm1(source.x), slice(dim, None)).chunk(2, -1)
        k, v = (heads(u, self.num_heads) for u in kv)
        return apply_rope(q, st.rope), apply_rope(k, source.rope), v

    def _qkv(self, h: dict[str, Tensor], s: Streams, linear: Linear) -> tuple[dict[str, Tensor], ...]:
        """h (B, N, D) by stream -> q, k, v (B, H, N, d) by stream; q and k turned by the stream's rotary tables."""
        q: dict[str, Tensor] = {}
        k: dict[str, Tensor] = {}
        v: dict[str, Tensor] = {}
        for n, u in in_a_row(lambda u: linear("qkv", self.qkv, u), h).items():
            a, b, v[n] = (heads(part, self.num_heads) for part in u.chunk(3, -1))
            q[n], k[n] = apply_rope(a, s[n].rope), apply_rope(b, s[n].rope)
        return q, k, v


class PlainHead(nn.Module):
    """Linear(LN x): (B, N, D) -> (B, N, P); nothing modulates it."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, out)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        return self.proj(self.norm(x))


def in_a_row(f: Callable[[Tensor], Tensor], h: dict[str, Tensor]) -> dict[str, Tensor]:
    """One call of ``f`` on the tokens (B, N, D) of all streams, and its result given back to each."""
    y = f(torch.cat(list(h.values()), 1)) if len(h) > 1 else f(next(iter(h.values())))
    return dict(zip(h, y.split([u.shape[1] for u in h.values()], 1)))
