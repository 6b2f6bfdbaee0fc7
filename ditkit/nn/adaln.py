"""One adaLN-Zero block over one or more streams: DiT with one, MM-DiT with two, each with its own weights.

x_k += g1_k Attn({mod(LN x)})_k        x_k += g2_k MLP_k(mod(LN x_k))        (DiT, section 3.2; SD3, figure 2)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.seams import Attn, Seam
from ditkit.core.streams import Streams

from .layers import Linear, Mlp, modulate, plain
from .positions import apply_rope

Rotate = Callable[[Tensor, "tuple[Tensor, Tensor] | None"], Tensor]


class AdaLNPart(nn.Module):
    """The weights with which one stream takes part in a block.

    Args:
        dim, num_heads, mlp_ratio: widths.
        qk_norm: RMSNorm of queries and keys.
        mlp_norm_eps: of the norm before the MLP; the one before the attention has 1e-6.
        writes: False where the stream is only read (the text of SD3's last block): shift and scale, q k v, nothing else.
        gated: False for adaLN, which shifts and scales only (DiT, section 3.2).
        rotate: how the stream's rotary tables turn queries and keys; ``Rope.apply`` for other pairings than neighbours.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        writes: bool = True,
        mlp_norm_eps: float = 1e-6,
        gated: bool = True,
        rotate: Rotate = apply_rope,
    ) -> None:
        super().__init__()
        self.num_heads, self.writes, self.mlp_norm_eps, self.rotate = num_heads, writes, mlp_norm_eps, rotate
        self.chunks = (6 if gated else 4) if writes else 2
        self.ada = nn.Linear(dim, self.chunks * dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm and writes else nn.Identity()
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim) if writes else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio)) if writes else None

    def modulation(self, c: Tensor, linear: Linear = plain) -> tuple[Any, ...]:
        """c (B, 1 | N, D) -> shift, scale, gate of the attention, then of the MLP; a gate is None where there is none."""
        m = linear("ada", self.ada, F.silu(c)).chunk(self.chunks, -1)
        return m if self.chunks != 4 else (*m[:2], None, *m[2:], None)

    def to_qkv(self, h: Tensor, linear: Linear, rope: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, N, D) -> q, k, v (B, H, N, d), q and k turned by ``rope``."""
        q, k, v = linear("qkv", self.qkv, h).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.rotate(self.q_norm(q), rope), self.rotate(self.k_norm(k), rope), v

    def to_q(self, h: Tensor, linear: Linear, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Queries alone, (B, H, N, d)."""
        q = linear("qkv", self.qkv, h, slice(0, h.shape[-1])).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.rotate(self.q_norm(q), rope)

    def to_kv(self, h: Tensor, linear: Linear, rope: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values alone, (B, H, N, d)."""
        kv = linear("qkv", self.qkv, h, slice(h.shape[-1], None)).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        return self.rotate(self.k_norm(k), rope), v


class AdaLNBlock(nn.Module):
    """adaLN-Zero over the streams that have a part; the others pass through."""

    branches: tuple[str, ...] = ("attn", "mlp")

    def __init__(self, parts: dict[str, AdaLNPart]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def calls(self, s: Streams) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Its attention calls: name -> (query streams, key streams)."""
        names = tuple(n for n in self.parts if n in s)
        return {"attn": (tuple(n for n in names if self.parts[n].writes), names)}

    def projections(self) -> dict[str, nn.Module]:
        """What the seam ``linear`` is called with: name -> module."""
        found: dict[str, Any] = {}
        for k, p in self.parts.items():
            mine = {"ada": p.ada, "qkv": p.qkv, "proj": p.proj, "fc1": p.mlp and p.mlp.fc1, "fc2": p.mlp and p.mlp.fc2}  # type: ignore[union-attr]
            found.update({f"{k}.{n}": m for n, m in mine.items() if m is not None})
        return found

    def forward(self, s: Streams, seam: Seam, kv: Streams | None = None) -> Streams:
        """One block. ``kv``: streams that give keys and values instead of those of ``s`` (cross-density attention)."""
        mod = self.modulation(s, seam)
        return self.feed(self.attention(s, mod, seam, kv), mod, seam)

    def modulation(self, s: Streams, seam: Seam) -> dict[str, tuple[Any, ...]]:
        """Shift, scale and gate of each stream that has a part here."""
        return {n: p.modulation(s[n].c, on(seam, n)) for n, p in self.parts.items() if n in s}  # type: ignore[operator]

    def attention(self, s: Streams, mod: dict[str, tuple[Any, ...]], seam: Seam, kv: Streams | None = None) -> Streams:
        """The joint attention of all parts, added to the streams of those that write."""
        parts: dict[str, AdaLNPart] = {n: self.parts[n] for n in mod}  # type: ignore[misc]
        out = [n for n, p in parts.items() if p.writes]
        source = {**s, **(kv or {})}

        def joint(h: dict[str, Tensor]) -> dict[str, Tensor]:
            q, k, v = {}, {}, {}
            for n, p in parts.items():
                if kv and n in kv:
                    q[n] = p.to_q(h[n], on(seam, n), s[n].rope)
                    k[n], v[n] = p.to_kv(modulate(kv[n].x, mod[n][0], mod[n][1]), on(seam, n), kv[n].rope)
                else:
                    q[n], k[n], v[n] = p.to_qkv(h[n], on(seam, n), s[n].rope)
            call = Attn("attn", {n: q[n] for n in out}, k, v, {n: s[n].layout for n in out}, {n: source[n].layout for n in k})
            o = seam.attend(call, s)
            return {n: on(seam, n)("proj", parts[n].proj, o[n].transpose(1, 2).flatten(2)) for n in out}

        h = {n: modulate(s[n].x, mod[n][0], mod[n][1]) for n in parts}
        return seam.residual("attn", joint, h, {n: mod[n][2] for n in out}, s)

    def feed(self, s: Streams, mod: dict[str, tuple[Any, ...]], seam: Seam) -> Streams:
        """The MLPs of the parts that write."""
        parts: dict[str, AdaLNPart] = {n: self.parts[n] for n in mod if self.parts[n].writes}  # type: ignore[misc]

        def mlp(h: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: p.mlp(h[n], on(seam, n)) for n, p in parts.items()}  # type: ignore[misc]

        h = {n: modulate(s[n].x, mod[n][3], mod[n][4], p.mlp_norm_eps) for n, p in parts.items()}
        return seam.residual("mlp", mlp, h, {n: mod[n][5] for n in parts}, s)


def on(seam: Seam, stream: str) -> Linear:
    """The seam ``linear`` for the projections of one stream."""
    return lambda name, module, x, part=None: seam.linear(f"{stream}.{name}", module, x, part)


class AdaLNHead(nn.Module):
    """Linear(mod(LN x)): (B, N, D) -> (B, N, P). ``cond_dim``: width of the conditioning; default: ``dim``."""

    def __init__(self, dim: int, out: int, cond_dim: int | None = None) -> None:
        super().__init__()
        self.ada, self.proj = nn.Linear(cond_dim or dim, 2 * dim), nn.Linear(dim, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.ada(F.silu(c)).chunk(2, -1)
        return self.proj(modulate(x, shift, scale))


def adaln_zero_(model: nn.Module, *outputs: nn.Linear) -> None:
    """Xavier in every linear layer; zeros in all modulation and in ``outputs``, so that blocks start as the identity (DiT, section 3.2)."""
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
            if name.rpartition(".")[2] == "ada" or m in outputs:
                nn.init.zeros_(m.weight)
