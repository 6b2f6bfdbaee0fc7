"""The block of Flag-DiT and Next-DiT: LLaMA's, modulated, with text through a gate (Lumina-T2X, 2405.05945; Lumina-Next, 2406.18583).

Flag    x += g1 Attn(RMS(x) (1 + s1) + b1)      x += g2 SwiGLU(RMS(x) (1 + s2) + b2)
Next    x += tanh(g1) RMS'(Attn(RMS(x) (1 + s1)))      x += tanh(g2) RMS'(SwiGLU(RMS(x) (1 + s2)))

Attn = Wo [softmax(q k') v + tanh(gate) softmax(q yk') yv]: a second softmax over the text y with the same queries, one gate a head, at
first closed. Queries and keys are normalised over all heads together, then turned; those of the text are not turned.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.seams import Attn, Seam
from ditkit.core.streams import Layout, Stream, Streams

from .adaln import on
from .adaln_single import heads, merge
from .layers import Linear, SwiGLU, plain
from .positions import apply_rope


class GatedText(nn.Module):
    """Keys and values of a text y (B, L, D_text), and a gate for each head that asks. What depends on y alone can be made ahead."""

    def __init__(self, text_dim: int, num_heads: int, num_kv_heads: int, head_dim: int, qk_norm: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        width = num_kv_heads * head_dim
        self.num_kv_heads = num_kv_heads
        self.norm = nn.RMSNorm(text_dim, eps=eps)
        self.kv = nn.Linear(text_dim, 2 * width, bias=False)
        self.k_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.gate = nn.Parameter(torch.zeros(num_heads))

    def to_kv(self, text: Tensor, linear: Linear = plain) -> dict[str, Tensor]:
        """text (B, L, D_text) -> k and v (B, K, L, d)."""
        k, v = linear("kv", self.kv, self.norm(text)).chunk(2, -1)
        return {"k": heads(self.k_norm(k), self.num_kv_heads), "v": heads(v, self.num_kv_heads)}


class FlagBlock(nn.Module):
    """One block: the stream "img" asks itself and, where there is text, "text", which passes through unchanged.

    Args:
        cond_dim: width of the conditioning ``c``.
        hidden: width of the SwiGLU.
        num_kv_heads: heads of keys and values, each asked by num_heads / num_kv_heads queries (GQA, 2305.13245).
        text_dim: width of the text's states; None: no text.
        sandwich: Next-DiT's form, with norms after attention and SwiGLU, scales without shifts, and tanh of the gates.
        norm_weights: the norms before them have weights (not so in Next-DiT for classes).
        base_tokens: if not 0, logits of N tokens are multiplied by sqrt(log N / log base_tokens): attention as sharp as among
            ``base_tokens`` (proportional attention, 2306.08645). That to the text is not.
    """

    branches = ("attn", "mlp")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        cond_dim: int,
        hidden: int,
        num_kv_heads: int | None = None,
        text_dim: int | None = None,
        sandwich: bool = False,
        norm_weights: bool = True,
        qk_norm: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.sandwich, self.base_tokens = sandwich, 0
        head_dim = dim // num_heads
        kv_width = head_dim * self.num_kv_heads
        self.ada = nn.Linear(cond_dim, (4 if sandwich else 6) * dim)
        self.norm1, self.norm2 = (nn.RMSNorm(dim, eps=eps, elementwise_affine=norm_weights) for _ in range(2))
        self.post1, self.post2 = (nn.RMSNorm(dim, eps=eps) if sandwich else nn.Identity() for _ in range(2))
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * kv_width, bias=False)
        self.q_norm, self.k_norm = (nn.LayerNorm(width) if qk_norm else nn.Identity() for width in (dim, kv_width))
        self.proj = nn.Linear(dim, dim, bias=False)
        self.text = None if text_dim is None else GatedText(text_dim, num_heads, self.num_kv_heads, head_dim, qk_norm, eps)
        self.mlp = SwiGLU(dim, hidden)

    def calls(self, s: Streams) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Its attention calls: name -> (query streams, key streams)."""
        return {"attn": (("img",), ("img",)), **({} if self.text is None else {"cross": (("img",), ("text",))})}

    def projections(self) -> dict[str, nn.Module]:
        """What the seam ``linear`` is called with: name -> module."""
        mine = {"ada": self.ada, "q": self.q, "kv": self.kv, "proj": self.proj, "fc1": self.mlp.fc1, "fc2": self.mlp.fc2}
        found: dict[str, nn.Module] = {f"img.{name}": module for name, module in mine.items()}
        return found if self.text is None else {**found, "text.kv": self.text.kv}

    def forward(self, s: Streams, seam: Seam, kv: Streams | None = None, prepared: dict[str, Tensor] | None = None) -> Streams:
        """One block.

        Args:
            kv: a stream "img" that gives keys and values instead of that of ``s`` (cross-density attention).
            prepared: k and v of the text, where they were made ahead.
        """
        linear, img = on(seam, "img"), s["img"]
        source = (kv or s).get("img", img)
        assert img.c is not None
        (b1, s1, g1), (b2, s2, g2) = self.modulation(img.c, linear)

        def attention(h: dict[str, Tensor]) -> dict[str, Tensor]:
            asked = h["img"] if source is img else scaled(self.norm1(source.x), b1, s1)
            q, call = self.own_call(h["img"], asked, img, source, linear)
            o = seam.attend(call, s)["img"]
            if self.text is not None:
                o = o + self.text.gate.tanh()[:, None, None] * seam.attend(self.cross_call(q, s, seam, prepared), s)["img"]
            return {"img": self.post1(linear("proj", self.proj, merge(o)))}

        def mlp(h: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"img": self.post2(self.mlp(h["img"], linear))}

        s = seam.residual("attn", attention, {"img": scaled(self.norm1(img.x), b1, s1)}, {"img": g1}, s)
        return seam.residual("mlp", mlp, {"img": scaled(self.norm2(s["img"].x), b2, s2)}, {"img": g2}, s)

    def modulation(self, c: Tensor, linear: Linear = plain) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]:
        """c (B, 1 | N, E) -> shift, scale, gate of the attention, then of the SwiGLU; a shift is None where there is none."""
        m = linear("ada", self.ada, F.silu(c)).chunk(4 if self.sandwich else 6, -1)
        if not self.sandwich:
            return (m[0], m[1], m[2]), (m[3], m[4], m[5])
        return (None, m[0], m[1].tanh()), (None, m[2], m[3].tanh())

    def own_call(self, h: Tensor, asked: Tensor, img: Stream, source: Stream, linear: Linear) -> tuple[Tensor, Attn]:
        """Self-attention of h (B, N, D) to ``asked``: its queries (B, H, N, d), turned, and the call."""
        q = apply_rope(heads(self.q_norm(linear("q", self.q, h)), self.num_heads), img.rope)
        k, v = linear("kv", self.kv, asked).chunk(2, -1)
        k = apply_rope(heads(self.k_norm(k), self.num_kv_heads), source.rope)
        k = k if not self.base_tokens else k * sharpening(source.layout, self.base_tokens, k.dtype)
        layouts = {"img": img.layout}, {"img": source.layout}
        return q, Attn("attn", {"img": q}, {"img": k}, {"img": heads(v, self.num_kv_heads)}, *layouts)

    def cross_call(self, q: Tensor, s: Streams, seam: Seam, prepared: dict[str, Tensor] | None) -> Attn:
        """The same queries ask the text."""
        assert self.text is not None
        text = s["text"]
        made = None if seam.adapts else prepared  # what a base made ahead lacks what a view adds to the projection
        kv = made or self.text.to_kv(text.x, on(seam, "text"))
        return Attn("cross", {"img": q}, {"text": kv["k"]}, {"text": kv["v"]}, {"img": s["img"].layout}, {"text": text.layout})


def scaled(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale) if shift is None else torch.addcmul(shift, x, 1 + scale)


def sharpening(layout: Layout, base: int, dtype: torch.dtype) -> Any:
    """sqrt(log N / log base) for the N tokens of the whole stream: a number or, where samples are padded, (B, 1, 1, 1)."""
    if layout.valid is None:
        return math.sqrt(math.log(layout.total) / math.log(base))
    length = layout.valid.sum(1) if layout.length is None else layout.length
    return (length.log() / math.log(base)).sqrt().to(dtype)[:, None, None, None]


class ScaleHead(nn.Module):
    """Linear(LN(x) (1 + scale)), scale = Linear(SiLU(c)): x (B, N, D), c (B, 1 | N, E) -> (B, N, P)."""

    def __init__(self, dim: int, out: int, cond_dim: int) -> None:
        super().__init__()
        self.ada, self.proj = nn.Linear(cond_dim, dim), nn.Linear(dim, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.proj(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + self.ada(F.silu(c))))


class PooledText(nn.Module):
    """Linear(LN(mean of the text's tokens)), added to the time code: text (B, L, D_text), mask (B, L) -> (B, 1, E)."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(text_dim), nn.Linear(text_dim, dim)

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            pooled = text.mean(1)
        else:  # without any token the mean is zero, not 0 / 0
            seen = mask.to(text.dtype)[..., None]
            pooled = (text * seen).sum(1) / seen.sum(1).clamp(min=1)
        return self.proj(self.norm(pooled))[:, None]
