"""MM-DiT (SD3, arXiv 2403.03206; SD3.5): text and picture have weights of their own and one attention.

c = TimeMLP(t) + MLP(pooled text). In each block both streams are modulated by Linear(SiLU(c)), their queries, keys and values meet
in one softmax, and each has its own output projection and MLP (figure 2). The last block only reads the text. SD3.5 normalises
queries and keys (RMSNorm); SD3.5-medium's first 13 blocks have a second attention of the picture to itself.

Text arrives as embeddings. Differs from the released code: the text may be masked; any position table, stored as released, whose
middle is cut out for the grid at hand; the patch convolution is written as a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.core.backbone import Backbone, Prepared
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.seams import Attn, Seam
from ditkit.core.streams import Stream, Streams, grid_layout
from ditkit.nn.adaln import AdaLNBlock, AdaLNHead, AdaLNPart, adaln_zero_, on
from ditkit.nn.embeddings import TimeEmbed
from ditkit.nn.layers import Linear, modulate
from ditkit.nn.patches import PatchEmbed, unpatchify
from ditkit.nn.positions import Axis, sincos_table
from ditkit.nn.text import TextTokens, VectorEmbed, check_batch

from .dit import draw_parameters


class MMDiTConfig(Config):
    """Shape of an MM-DiT. Defaults: SD3-medium."""

    input_size: tuple[int, int] = Field((128, 128), description="height and width of the training data, in latent pixels")
    in_channels: int = Field(16, ge=1, description="channels of the data")
    out_channels: int = Field(16, ge=1, description="channels of the output")
    patch_size: int = Field(2, ge=1, le=64)
    dim: int = Field(1536, ge=4)
    depth: int = Field(24, ge=1, le=200)
    num_heads: int = Field(24, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    text_dim: int = Field(4096, ge=1, description="width of the text encoders' states")
    pooled_dim: int = Field(2048, ge=1, description="width of the pooled text")
    position_size: int = Field(192, ge=1, description="side of the stored position table, in tokens: the largest grid")
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys (SD3.5)")
    dual_attention: tuple[int, ...] = Field((), description="blocks in which the picture has a second attention, to itself alone")

    @model_validator(mode="after")
    def _fits(self) -> MMDiTConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is no multiple of num_heads {self.num_heads}")
        if self.dim % 4:
            raise ValueError(f"dim {self.dim} is no multiple of 4 (the position code has sine and cosine on two axes)")
        if any(side < 1 or side % self.patch_size for side in self.input_size):
            raise ValueError(f"input_size {self.input_size} is no multiple of patch_size {self.patch_size}")
        if max(self.input_size) > self.patch_size * self.position_size:
            raise ValueError(f"input_size {self.input_size} is larger than the position table, {self.position_size} patches a side")
        if sorted(set(self.dual_attention)) != list(self.dual_attention) or not set(self.dual_attention) <= set(range(self.depth)):
            raise ValueError(f"dual_attention {self.dual_attention} are no ascending block numbers below depth {self.depth}")
        return self


class DualPart(AdaLNPart):
    """A stream's part with a second attention, to itself; its shift, scale and gate follow those of attention and MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qk_norm: bool = False) -> None:
        super().__init__(dim, num_heads, mlp_ratio, qk_norm)
        self.chunks = 9
        self.ada = nn.Linear(dim, 9 * dim)
        self.qkv2, self.proj2 = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm2 = nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm2 = nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()

    def to_qkv2(self, h: Tensor, linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, N, D) -> q, k, v (B, H, N, d) of the second attention."""
        q, k, v = linear("qkv2", self.qkv2, h).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm2(q), self.k_norm2(k), v

    def across2(self, h: Tensor, other: Tensor, linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
        """The same with queries of h alone, keys and values of ``other`` (B, M, D)."""
        dim = h.shape[-1]
        q = linear("qkv2", self.qkv2, h, slice(0, dim)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = linear("qkv2", self.qkv2, other, slice(dim, None)).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm2(q), self.k_norm2(k), v


class DualBlock(AdaLNBlock):
    """A block whose stream ``img`` has a second attention, to itself (SD3.5-medium).

    x += g1 Attn([mod(LN x); text]) + g3 Attn2(mod(LN x)): both see the block's input.
    """

    branches = ("attn", "attn2", "mlp")

    def calls(self, s: Streams) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        return {**super().calls(s), "attn2": (("img",), ("img",))}

    def projections(self) -> dict[str, nn.Module]:
        part: Any = self.parts["img"]
        return {**super().projections(), "img.qkv2": part.qkv2, "img.proj2": part.proj2}

    def forward(self, s: Streams, seam: Seam, kv: Streams | None = None) -> Streams:
        mod = self.modulation(s, seam)
        after = self.attention(s, mod, seam, kv)
        return self.feed(self._second(s, after, mod["img"], seam, kv), mod, seam)

    def _second(self, s: Streams, after: Streams, mod: tuple[Any, ...], seam: Seam, kv: Streams | None) -> Streams:
        part: Any = self.parts["img"]
        shift, scale, gate = mod[6:]
        linear, img = on(seam, "img"), s["img"]
        source = (kv or s).get("img", img)

        def attention(h: dict[str, Tensor]) -> dict[str, Tensor]:
            if source is img:
                q, k, v = part.to_qkv2(h["img"], linear)
            else:
                q, k, v = part.across2(h["img"], modulate(source.x, shift, scale), linear)
            o = seam.attend(Attn("attn2", {"img": q}, {"img": k}, {"img": v}, {"img": img.layout}, {"img": source.layout}), s)["img"]
            return {"img": linear("proj2", part.proj2, o.transpose(1, 2).flatten(2))}

        return seam.residual("attn2", attention, {"img": modulate(img.x, shift, scale)}, {"img": gate}, after)


@registry.register("backbones", "mmdit")
class MMDiT(Backbone):
    """x (B, C, H, W), network time t (B,) or (B, N), text (B, L, D_text), pooled (B, D_pooled) -> (B, C_out, H, W)."""

    config_class = MMDiTConfig
    positions: Tensor
    traits = frozenset({"grid", "static tokens"})
    sizes = {
        "SD3-medium": dict(),
        "SD3.5-medium": dict(position_size=384, qk_norm=True, dual_attention=tuple(range(13))),
        "SD3.5-large": dict(dim=2432, depth=38, num_heads=38, qk_norm=True),
    }

    def __init__(self, config: MMDiTConfig | None = None, **values: Any) -> None:
        super().__init__()
        self.config = cfg = MMDiTConfig(**values) if config is None else config
        self.patch_embed = PatchEmbed(cfg.in_channels, cfg.patch_size, cfg.dim)
        self.time = TimeEmbed(cfg.dim)
        self.pooled = VectorEmbed(cfg.pooled_dim, cfg.dim)
        self.text = TextTokens(cfg.text_dim, cfg.dim)
        self.blocks = nn.ModuleList(self._block(i) for i in range(cfg.depth))
        self.final = AdaLNHead(cfg.dim, cfg.patch_size**2 * cfg.out_channels)
        self.register_buffer("positions", torch.empty(1, cfg.position_size**2, cfg.dim))
        self.reset_parameters()

    def _block(self, i: int) -> AdaLNBlock:
        cfg, last = self.config, i == self.config.depth - 1
        text = AdaLNPart(cfg.dim, cfg.num_heads, cfg.mlp_ratio, cfg.qk_norm, writes=not last)
        if last and cfg.qk_norm:  # stored in the released weights, though nobody queries
            text.q_norm = nn.RMSNorm(cfg.dim // cfg.num_heads, eps=1e-6).requires_grad_(False)
        kinds = (DualPart, DualBlock) if i in cfg.dual_attention else (AdaLNPart, AdaLNBlock)
        return kinds[1]({"img": kinds[0](cfg.dim, cfg.num_heads, cfg.mlp_ratio, cfg.qk_norm), "text": text})

    def reset_parameters(self) -> None:
        """As DiT's: Xavier, N(0, 0.02) for the time, zeros in modulation and output. The position table is a sine-cosine code."""
        adaln_zero_(self, self.final.proj)
        for layer in (self.time.fc1, self.time.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        if not self.positions.is_meta:
            self.positions.copy_(self.fresh_positions())

    def fresh_positions(self) -> Tensor:
        """(1, M^2, D) sine-cosine code, M the table's side: places i base / M, base the side of the trained grid (SD3, section 5.3.2)."""
        cfg = self.config
        side = Axis(cfg.position_size, 0.0, max(cfg.input_size) // cfg.patch_size / cfg.position_size)
        return sincos_table.__wrapped__(cfg.dim, (side, side))  # not kept in its cache: it is large and used once

    def shorter(self, keep: Sequence[int]) -> dict[str, Any]:
        dual = tuple(place for place, i in enumerate(keep) if i in self.config.dual_attention)
        return {"depth": len(keep), "dual_attention": dual}

    def prepare(self, *, text: Tensor, pooled: Tensor, mask: Tensor | None = None) -> Prepared:  # type: ignore[override]
        """What the encoders say of the caption.

        Args:
            text: (B, L, D_text) states; of SD3, CLIP's (padded with zeros to T5's width) before T5's.
            pooled: (B, D_pooled) pooled CLIP states.
            mask: (B, L), false at padding that nobody may see. None: all is seen, as SD3 was trained.
        """
        layout = self.text.layout(text, mask)
        return Prepared({"text": self.text(text), "pooled": self.pooled(self.pooled.check(pooled, len(text))), "layout": layout})

    def null(self, *, text: Tensor, pooled: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """No caption: zeros, as where SD3's training drops an encoder. A negative prompt is another caption, given to ``prepare``."""
        return {"text": torch.zeros_like(text), "pooled": torch.zeros_like(pooled), **({} if mask is None else {"mask": mask})}

    def embed(self, x: Tensor, t: Tensor, prepared: Prepared) -> Streams:
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            raise DitkitError(f"x is {tuple(x.shape)}", allowed=f"(B, {self.config.in_channels}, H, W)")
        text, layout = prepared.shared["text"], prepared.shared["layout"]
        check_batch(x, text)
        grid = self.patch_embed.grid(x)
        c = self.time(t) + prepared.shared["pooled"]
        img = Stream(self.patch_embed(x) + self.crop(*grid).to(x.dtype), grid_layout(grid, x.device), c)
        noisiest = c if t.dim() == 1 else self.time(t.amax(1)) + prepared.shared["pooled"]  # where each patch has its own time
        return {"img": img, "text": Stream(text, layout, noisiest)}

    def conditioning(self, t: Tensor, prepared: Prepared) -> dict[str, Tensor]:
        c = self.time(t) + prepared.shared["pooled"]
        return {"img": c, "text": c}

    def crop(self, h: int, w: int) -> Tensor:
        """(1, h w, D): the middle of the position table."""
        side = self.config.position_size
        if max(h, w) > side:
            raise DitkitError(f"a grid of {h} x {w} patches", allowed=f"at most {side} a side: the position table has no more")
        top, left = (side - h) // 2, (side - w) // 2
        return self.positions.unflatten(1, (side, side))[:, top : top + h, left : left + w].flatten(1, 2)

    def head(self, s: Streams) -> Tensor:
        img = s["img"]
        return self.final(img.x, img.c)

    def unembed(self, tokens: Tensor, x: Tensor) -> Tensor:
        return unpatchify(tokens, self.patch_embed.grid(x), self.config.patch_size)

    @classmethod
    def tiny(cls) -> MMDiT:
        torch.manual_seed(0)
        cfg = MMDiTConfig(
            input_size=(8, 8),
            in_channels=3,
            out_channels=3,
            dim=24,
            depth=2,
            num_heads=3,
            mlp_ratio=2.0,
            text_dim=10,
            pooled_dim=6,
            position_size=7,
            qk_norm=True,
            dual_attention=(0,),
        )
        return draw_parameters(cls(cfg)).eval()

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        cfg, g = self.config, torch.Generator().manual_seed(seed)
        x = torch.randn(batch, cfg.in_channels, *cfg.input_size, generator=g)
        text, pooled = torch.randn(batch, 5, cfg.text_dim, generator=g), torch.randn(batch, cfg.pooled_dim, generator=g)
        mask = torch.arange(5)[None] < torch.randint(2, 6, (batch, 1), generator=g)
        return x, torch.rand(batch, generator=g) * 999, {"text": text, "pooled": pooled, "mask": mask}
