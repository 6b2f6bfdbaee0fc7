"""Hunyuan-DiT (arXiv 2405.08748): a DiT with long skips that reads English and Chinese, by CLIP and T5 at once.

Blocks of the second half get the output of their mirror image in the first, as in a U-Net. Text comes in by cross-attention to the
states of both encoders in a row, where a learned vector stands for padding, and pooled, with the time, as a shift of each block's first
norm. Queries and keys are normalised; rotary positions turn the picture's, in the cross-attention its queries alone.

Differs from the released code: keys and values of the text are made once a run; the pairs of the skips are a setting, so that
networks of fewer blocks can be cut out; the style, of which there is one, is not asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.core.backbone import Backbone, Prepared
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.seams import Attn, Seam
from ditkit.core.streams import Stream, Streams, grid_layout
from ditkit.nn.adaln import AdaLNHead, adaln_zero_, on
from ditkit.nn.adaln_single import heads, merge
from ditkit.nn.embeddings import TimeEmbed, timestep_code
from ditkit.nn.layers import Linear, Mlp, plain
from ditkit.nn.patches import PatchEmbed, unpatchify
from ditkit.nn.pooling import AttentionPool, SiluMlp
from ditkit.nn.positions import Rope, apply_rope, fitted
from ditkit.nn.text import check_batch, text_layout

from .dit import draw_parameters

POOL_HEADS = 8


class HunyuanConfig(Config):
    """Shape of a Hunyuan-DiT. Defaults: version 1.2 at 1024 pixels."""

    input_size: tuple[int, int] = Field((128, 128), description="height and width of the training data, in latent pixels")
    in_channels: int = Field(4, ge=1, description="channels of the data")
    out_channels: int = Field(8, ge=1, description="channels of the output: twice in_channels where the variance is learned")
    patch_size: int = Field(2, ge=1, le=64)
    dim: int = Field(1408, ge=4)
    depth: int = Field(40, ge=1, le=200)
    num_heads: int = Field(16, ge=1)
    mlp_ratio: float = Field(4.3637, gt=0)
    skips: tuple[tuple[int, int], ...] | None = Field(
        None, description="long skips (from, to); None: block i to depth - 1 - i, but for the two blocks in the middle"
    )
    text_dim: int = Field(1024, ge=1, description="width of CLIP's states")
    text_length: int = Field(77, ge=1, description="tokens of CLIP's text")
    t5_dim: int = Field(2048, ge=POOL_HEADS, description="width of T5's states")
    t5_length: int = Field(256, ge=1, description="tokens of T5's text")
    pooled_dim: int = Field(1024, ge=1, description="width of what T5's states are pooled to")
    size_and_style: bool = Field(False, description="is told sizes and crop of the picture, and has a style vector (up to version 1.1)")
    position_base: int = Field(32, ge=1, description="tokens a side of the square into which the positions of every grid are fitted")

    @model_validator(mode="after")
    def _fits(self) -> HunyuanConfig:
        if self.dim % self.num_heads or self.dim // self.num_heads % 4:
            raise ValueError(f"dim {self.dim} with num_heads {self.num_heads}: heads must be multiples of 4 wide (rotary, on two axes)")
        if self.t5_dim % POOL_HEADS:
            raise ValueError(f"t5_dim {self.t5_dim} is no multiple of {POOL_HEADS} (heads of the pooling)")
        if any(side < 1 or side % self.patch_size for side in self.input_size):
            raise ValueError(f"input_size {self.input_size} is no multiple of patch_size {self.patch_size}")
        if self.skips is None and self.depth % 2:
            raise ValueError(f"depth {self.depth} is odd: give the skips")
        ends = [b for _, b in self.skips or ()]
        if any(not 0 <= a < b < self.depth for a, b in self.skips or ()) or len(set(ends)) < len(ends):
            raise ValueError(f"skips {self.skips} are no pairs of an earlier and a later of {self.depth} blocks, one for each later block")
        return self

    def long_skips(self) -> tuple[tuple[int, int], ...]:
        """Block ``to`` gets the output of block ``from``."""
        return tuple((i, self.depth - 1 - i) for i in range(self.depth // 2 - 1)) if self.skips is None else self.skips


class NormedCross(nn.Module):
    """Queries of the picture, keys and values of a text of another width; LayerNorm of each head of queries and keys."""

    def __init__(self, dim: int, text_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(text_dim, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(dim // num_heads, eps=1e-6) for _ in range(2))

    def to_kv(self, text: Tensor, linear: Linear = plain) -> dict[str, Tensor]:
        """text (B, L, D_text) -> k and v (B, H, L, d)."""
        k, v = linear("kv", self.kv, text).chunk(2, -1)
        return {"k": self.k_norm(heads(k, self.num_heads)), "v": heads(v, self.num_heads)}


class HunyuanBlock(nn.Module):
    """z = W LN[z | skip] where there is one;  z += Attn(LN z + shift(c));  z += Cross(LN z, text);  z += MLP(LN z). No gates."""

    branches = ("attn", "cross", "mlp")

    def __init__(self, dim: int, num_heads: int, hidden: int, text_dim: int, skip: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.skip_norm = nn.LayerNorm(2 * dim, eps=1e-6) if skip else None
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.ada, self.qkv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(dim // num_heads, eps=1e-6) for _ in range(2))
        self.cross, self.mlp = NormedCross(dim, text_dim, num_heads), Mlp(dim, hidden)

    def calls(self, s: Streams) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Its attention calls: name -> (query streams, key streams)."""
        return {"attn": (("img",), ("img",)), "cross": (("img",), ("text",))}

    def projections(self) -> dict[str, nn.Module]:
        """What the seam ``linear`` is called with: name -> module."""
        c, m = self.cross, self.mlp
        mine = {"ada": self.ada, "qkv": self.qkv, "proj": self.proj, "cross_q": c.q, "cross_proj": c.proj, "fc1": m.fc1, "fc2": m.fc2}
        skip = {} if self.skip is None else {"skip": self.skip}
        return {**{f"img.{name}": module for name, module in {**skip, **mine}.items()}, "text.kv": c.kv}

    def forward(self, s: Streams, seam: Seam, prepared: dict[str, Tensor] | None = None, skip: dict[str, Tensor] | None = None) -> Streams:
        """One block.

        Args:
            prepared: k and v of the text, where they were made ahead.
            skip: the output of an earlier block, by stream, for a block that has a long skip.
        """
        if self.skip is not None and self.skip_norm is not None:
            assert skip is not None
            both = self.skip_norm(torch.cat([s["img"].x, skip["img"]], -1))
            s = {**s, "img": s["img"]._replace(x=on(seam, "img")("skip", self.skip, both))}
        s = self.attend(s, seam)
        s = self.ask(s, seam, prepared)
        return seam.residual("mlp", lambda h: {"img": self.mlp(h["img"], on(seam, "img"))}, {"img": self.norm3(s["img"].x)}, {}, s)

    def attend(self, s: Streams, seam: Seam) -> Streams:
        """Among the tokens of the picture; time and pooled text shift what they see."""
        linear, img = on(seam, "img"), s["img"]
        assert img.c is not None

        def attention(h: dict[str, Tensor]) -> dict[str, Tensor]:
            q, k, v = (heads(u, self.num_heads) for u in linear("qkv", self.qkv, h["img"]).chunk(3, -1))
            q, k = apply_rope(self.q_norm(q), img.rope), apply_rope(self.k_norm(k), img.rope)
            o = seam.attend(Attn("attn", {"img": q}, {"img": k}, {"img": v}, {"img": img.layout}, {"img": img.layout}), s)
            return {"img": linear("proj", self.proj, merge(o["img"]))}

        return seam.residual("attn", attention, {"img": self.norm1(img.x) + linear("ada", self.ada, F.silu(img.c))}, {}, s)

    def ask(self, s: Streams, seam: Seam, prepared: dict[str, Tensor] | None) -> Streams:
        """The text; only queries have positions."""
        linear, img, text, cross = on(seam, "img"), s["img"], s["text"], self.cross

        def attention(h: dict[str, Tensor]) -> dict[str, Tensor]:
            made = None if seam.adapts else prepared  # what a base made ahead lacks what a view adds to the projection
            kv = made or cross.to_kv(text.x, on(seam, "text"))
            q = apply_rope(cross.q_norm(heads(linear("cross_q", cross.q, h["img"]), cross.num_heads)), img.rope)
            o = seam.attend(Attn("cross", {"img": q}, {"text": kv["k"]}, {"text": kv["v"]}, {"img": img.layout}, {"text": text.layout}), s)
            return {"img": linear("cross_proj", cross.proj, merge(o["img"]))}

        return seam.residual("cross", attention, {"img": self.norm2(img.x)}, {}, s)


@registry.register("backbones", "hunyuan")
class Hunyuan(Backbone):
    """x (B, C, H, W), network time t (B,) or (B, N), text (B, 77, 1024), t5 (B, 256, 2048), their masks -> (B, C_out, H, W)."""

    config_class = HunyuanConfig
    traits = frozenset({"grid", "static tokens"})
    sizes = {"HunyuanDiT-v1.1": dict(size_and_style=True), "HunyuanDiT-v1.2": dict()}

    def __init__(self, config: HunyuanConfig | None = None, **values: Any) -> None:
        super().__init__()
        self.config = cfg = HunyuanConfig(**values) if config is None else config
        self.skips = cfg.long_skips()
        self.patch_embed = PatchEmbed(cfg.in_channels, cfg.patch_size, cfg.dim)
        self.time = TimeEmbed(cfg.dim)
        self.pool = AttentionPool(cfg.t5_length, cfg.t5_dim, POOL_HEADS, cfg.pooled_dim)
        self.style = nn.Parameter(torch.randn(1, cfg.dim)) if cfg.size_and_style else None
        extra = cfg.pooled_dim + (6 * 256 + cfg.dim if cfg.size_and_style else 0)
        self.extra = SiluMlp(extra, 4 * cfg.dim, cfg.dim)
        self.t5 = SiluMlp(cfg.t5_dim, 4 * cfg.t5_dim, cfg.text_dim)
        self.padding = nn.Parameter(torch.randn(cfg.text_length + cfg.t5_length, cfg.text_dim))
        ends, hidden = {b for _, b in self.skips}, int(cfg.dim * cfg.mlp_ratio)
        self.blocks = nn.ModuleList(HunyuanBlock(cfg.dim, cfg.num_heads, hidden, cfg.text_dim, i in ends) for i in range(cfg.depth))
        self.final = AdaLNHead(cfg.dim, cfg.patch_size**2 * cfg.out_channels)
        half = cfg.dim // cfg.num_heads // 2
        self.rope = Rope((half, half), order=(1, 0))
        self.reset_parameters()

    def own_blocks(self) -> list[HunyuanBlock]:
        """The blocks, by their type."""
        return list(self.blocks)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Xavier; N(0, 0.02) for time and pooled text; zeros in the shifts and the output."""
        adaln_zero_(self, self.final.proj)
        for layer in (self.time.fc1, self.time.fc2, self.extra.fc1, self.extra.fc2):
            nn.init.normal_(layer.weight, std=0.02)

    def shorter(self, keep: Sequence[int]) -> dict[str, Any]:
        skips = tuple((keep.index(a), keep.index(b)) for a, b in self.config.long_skips() if a in keep and b in keep)
        return {"depth": len(keep), "skips": skips}

    def prepare(  # type: ignore[override]
        self,
        *,
        text: Tensor,
        t5: Tensor | None = None,
        mask: Tensor | None = None,
        t5_mask: Tensor | None = None,
        size: Tensor | None = None,
    ) -> Prepared:
        """What both encoders say, as one sequence; of each block its keys and values of it; the part of the shifts that knows no time.

        Args:
            text: (B, L, D_text) CLIP's last states, L the config's ``text_length``.
            t5: (B, L_t5, D_t5) T5's, as many as ``t5_length``. There is no doing without: it is pooled too.
            mask, t5_mask: (B, L) true where a token is; None: everywhere. A learned vector is in place of the others.
            size: (B, 6) height and width of the original and of the picture, top and left of the crop, in pixels; or (B, 2), the
                height and width of both. For a model with ``size_and_style``.
        """
        cfg = self.config
        if t5 is None:
            raise DitkitError("t5 is not given", allowed=f"(B, {cfg.t5_length}, {cfg.t5_dim})", hint="Hunyuan-DiT reads two encoders")
        _check(text, "text", cfg.text_length, cfg.text_dim)
        _check(t5, "t5", cfg.t5_length, cfg.t5_dim)
        check_batch(text, t5)
        text_layout(text, mask, cfg.text_dim)  # the masks' shapes
        text_layout(t5, t5_mask, cfg.t5_dim)
        dtype = self.padding.dtype
        tokens = torch.cat([text.to(dtype), self.t5(t5)], 1)
        there = torch.cat([_seen(text, mask), _seen(t5, t5_mask)], 1)
        tokens = torch.where(there[..., None], tokens, self.padding)
        pooled = [self.pool(t5.to(dtype)), *self._size_and_style(size, len(text))]
        blocks = tuple(b.cross.to_kv(tokens) for b in self.own_blocks()) if self.ahead() else ()
        extra = self.extra(torch.cat(pooled, -1))[:, None]
        return Prepared({"text": tokens, "layout": text_layout(tokens, None, cfg.text_dim), "extra": extra}, blocks)

    def _size_and_style(self, size: Tensor | None, batch: int) -> list[Tensor]:
        if (self.style is None) != (size is None):
            has = "no size_and_style" if self.style is None else "size_and_style"
            raise DitkitError(f"the model has {has}, and size is {'not ' if size is None else ''}given", hint="see its config")
        if self.style is None or size is None:
            return []
        if size.shape not in ((batch, 2), (batch, 6)):
            raise DitkitError(f"size is {tuple(size.shape)}", allowed=f"({batch}, 6), or ({batch}, 2): height and width")
        size = torch.cat([size, size, torch.zeros_like(size)], 1) if size.shape[1] == 2 else size
        return [timestep_code(size).flatten(1).to(self.style.dtype), self.style.expand(batch, -1)]

    def null(
        self, *, text: Tensor, t5: Tensor, mask: Tensor | None = None, t5_mask: Tensor | None = None, size: Tensor | None = None
    ) -> dict[str, Tensor]:
        """A text that is all padding; sizes stay. Released weights were trained with the states of the empty prompt: give those instead."""
        none = {"text": torch.zeros_like(text), "mask": torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)}
        none |= {"t5": torch.zeros_like(t5), "t5_mask": torch.zeros(t5.shape[:2], dtype=torch.bool, device=t5.device)}
        return none if size is None else {**none, "size": size}

    def embed(self, x: Tensor, t: Tensor, prepared: Prepared) -> Streams:
        cfg, shared = self.config, prepared.shared
        if x.dim() != 4 or x.shape[1] != cfg.in_channels:
            raise DitkitError(f"x is {tuple(x.shape)}", allowed=f"(B, {cfg.in_channels}, H, W)")
        check_batch(x, shared["text"])
        h, w = self.patch_embed.grid(x)
        rope = self.rope.table(fitted((h, w), (cfg.position_base, cfg.position_base)), x.device)
        img = Stream(self.patch_embed(x), grid_layout((h, w), x.device), self.time(t) + shared["extra"], rope)
        return {"img": img, "text": Stream(shared["text"], shared["layout"])}

    def conditioning(self, t: Tensor, prepared: Prepared) -> dict[str, Tensor]:
        return {"img": self.time(t) + prepared.shared["extra"]}

    def head(self, s: Streams) -> Tensor:
        img = s["img"]
        return self.final(img.x, img.c)

    def unembed(self, tokens: Tensor, x: Tensor) -> Tensor:
        return unpatchify(tokens, self.patch_embed.grid(x), self.config.patch_size)

    @classmethod
    def tiny(cls) -> Hunyuan:
        torch.manual_seed(0)
        sizes: dict[str, Any] = dict(in_channels=3, out_channels=3, dim=16, depth=2, num_heads=2, mlp_ratio=2.0, skips=((0, 1),))
        text: dict[str, Any] = dict(text_dim=6, text_length=3, t5_dim=8, t5_length=4, pooled_dim=5, size_and_style=True)
        return draw_parameters(cls(HunyuanConfig(**sizes, **text, input_size=(8, 12), position_base=4))).eval()

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        cfg, g = self.config, torch.Generator().manual_seed(seed)
        x = torch.randn(batch, cfg.in_channels, *cfg.input_size, generator=g)
        cond = {}
        for name, mask, length, width in (("text", "mask", cfg.text_length, cfg.text_dim), ("t5", "t5_mask", cfg.t5_length, cfg.t5_dim)):
            cond[name] = torch.randn(batch, length, width, generator=g)
            cond[mask] = torch.arange(length)[None] < torch.randint(1, length + 1, (batch, 1), generator=g)
        if cfg.size_and_style:
            cond["size"] = torch.randint(0, 512, (batch, 6), generator=g).float()
        return x, torch.rand(batch, generator=g) * 999, cond


def _check(text: Tensor, name: str, length: int, width: int) -> None:
    if text.dim() != 3 or text.shape[1:] != (length, width):
        raise DitkitError(f"{name} is {tuple(text.shape)}", allowed=f"(B, {length}, {width}), padded to that length")


def _seen(text: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
