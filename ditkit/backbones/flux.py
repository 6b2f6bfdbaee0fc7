"""FLUX.1 (Black Forest Labs, 2024; no paper, see Kontext, arXiv 2506.15742): double-stream blocks, then single-stream blocks.

The first blocks are MM-DiT's, with normalised queries and keys and rotary positions over three axes (0, row, column); text stands
at (0, 0, 0). In the rest text and picture have the same weights, and attention and MLP run side by side on one input:

    u += gate * W2 [Attn(q, k, v) | GELU(m)],   [q | k | v | m] = W1 mod(LN u)

c = TimeMLP(1000 t) + MLP(pooled text) + TimeMLP(1000 g) where guidance was distilled into the network ("dev"; not in "schnell").

Differs from the released code: pictures come as (B, C, H, W) and are packed into 2 x 2 patches here; the text may be masked; between
blocks text and picture stay two streams; t and g are multiplied by 1000 in fp32, not in the activations' dtype.
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
from ditkit.nn.adaln import AdaLNBlock, AdaLNHead, AdaLNPart, adaln_zero_, on
from ditkit.nn.embeddings import TimeEmbed
from ditkit.nn.layers import Linear, modulate
from ditkit.nn.patches import PatchEmbed, unpatchify
from ditkit.nn.positions import Rope, apply_rope
from ditkit.nn.text import TextTokens, VectorEmbed, check_batch

from .dit import draw_parameters

HALF = 65504.0  # the largest number in fp16


class FluxConfig(Config):
    """Shape of a FLUX network. Defaults: FLUX.1-dev."""

    input_size: tuple[int, int] = Field((128, 128), description="height and width of the training data, in latent pixels")
    in_channels: int = Field(16, ge=1, description="channels of the data, and of what is given beside it (a masked picture, edges)")
    out_channels: int = Field(16, ge=1, description="channels of the output")
    patch_size: int = Field(2, ge=1, le=64)
    dim: int = Field(3072, ge=4)
    depth: int = Field(19, ge=1, le=200, description="double-stream blocks")
    single_depth: int = Field(38, ge=0, le=200, description="single-stream blocks, after the others")
    num_heads: int = Field(24, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    text_dim: int = Field(4096, ge=1, description="width of the text encoder's states")
    pooled_dim: int = Field(768, ge=1, description="width of the pooled text")
    rope_widths: tuple[int, int, int] = Field((16, 56, 56), description="channels of a head turned by index, row and column")
    guidance: float | None = Field(
        3.5,
        ge=0,
        description="scale that the network is told unless the caller says another (dev); None: it has no input for one (schnell)",
    )

    @model_validator(mode="after")
    def _fits(self) -> FluxConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is no multiple of num_heads {self.num_heads}")
        if sum(self.rope_widths) != self.dim // self.num_heads or any(w < 2 or w % 2 for w in self.rope_widths):
            raise ValueError(f"rope_widths {self.rope_widths} are no even numbers from 2 with sum {self.dim // self.num_heads}")
        if any(side < 1 or side % self.patch_size for side in self.input_size):
            raise ValueError(f"input_size {self.input_size} is no multiple of patch_size {self.patch_size}")
        return self


class DoubleBlock(AdaLNBlock):
    """MM-DiT's block; in fp16 the text, which grows, is kept finite."""

    def forward(self, s: Streams, seam: Seam, kv: Streams | None = None) -> Streams:
        return finite_half(super().forward(s, seam, kv), ("text",))


class SingleBlock(nn.Module):
    """Attention and MLP side by side over all its streams, with the same weights for each.

    Args:
        streams: in the order in which they are put one after the other.
    """

    branches = ("attn",)

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, streams: tuple[str, ...] = ("text", "img")) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.num_heads, self.streams, self.widths = num_heads, streams, (3 * dim, hidden)
        self.ada = nn.Linear(dim, 3 * dim)
        self.fc1, self.fc2 = nn.Linear(dim, 3 * dim + hidden), nn.Linear(dim + hidden, dim)
        self.q_norm, self.k_norm = (nn.RMSNorm(dim // num_heads, eps=1e-6) for _ in range(2))

    def calls(self, s: Streams) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Its attention calls: name -> (query streams, key streams)."""
        names = tuple(n for n in self.streams if n in s)
        return {"attn": (names, names)}

    def projections(self) -> dict[str, nn.Module]:
        """What the seam ``linear`` is called with: name -> module. ``fc1`` and ``fc2`` are called once, with the tokens of all streams."""
        return {"both.ada": self.ada, "both.fc1": self.fc1, "both.fc2": self.fc2}

    def forward(self, s: Streams, seam: Seam, kv: Streams | None = None) -> Streams:
        """One block. ``kv``: streams that give keys and values instead of those of ``s`` (cross-density attention)."""
        names = [n for n in self.streams if n in s]
        linear = on(seam, "both")
        mod = self.modulation(s, names, linear)
        source = {n: (kv or {}).get(n, s[n]) for n in names}

        def branch(h: dict[str, Tensor]) -> dict[str, Tensor]:
            own = torch.cat([h[n] for n in names], 1)
            if all(source[n] is s[n] for n in names):
                other = own
            else:
                other = torch.cat([h[n] if source[n] is s[n] else modulate(source[n].x, mod[n][0], mod[n][1]) for n in names], 1)
            packed_q, packed_k, packed_v, m = self.into(own, other, seam)
            rows, columns = ([d[n].x.shape[1] for n in names] for d in (s, source))
            q = {n: apply_rope(u, s[n].rope) for n, u in zip(names, packed_q.split(rows, 2))}
            k = {n: apply_rope(u, source[n].rope) for n, u in zip(names, packed_k.split(columns, 2))}
            v = dict(zip(names, packed_v.split(columns, 2)))
            o = seam.attend(Attn("attn", q, k, v, {n: s[n].layout for n in names}, {n: source[n].layout for n in names}), s)
            attended = torch.cat([o[n].transpose(1, 2) for n in names], 1).flatten(2)
            y = linear("fc2", self.fc2, torch.cat([attended, F.gelu(m, approximate="tanh")], -1))
            return dict(zip(names, y.split(rows, 1)))

        h = {n: modulate(s[n].x, mod[n][0], mod[n][1]) for n in names}
        return finite_half(seam.residual("attn", branch, h, {n: mod[n][2] for n in names}, s), names)

    def modulation(self, s: Streams, names: list[str], linear: Linear) -> dict[str, tuple[Tensor, ...]]:
        """Shift, scale and gate of each stream; made once where they share one conditioning."""
        mod: dict[str, tuple[Tensor, ...]] = {}
        for n in names:
            twin = next((other for other in mod if s[other].c is s[n].c), None)
            mod[n] = mod[twin] if twin else linear("ada", self.ada, F.silu(s[n].c)).chunk(3, -1)  # type: ignore[arg-type]
        return mod

    def into(self, h: Tensor, other: Tensor, seam: Seam) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h (B, N, D), other (B, M, D) -> q of h, k and v of ``other``, all (B, H, N | M, d), and the MLP's hidden units (B, N, hidden)."""
        dim, linear = h.shape[-1], on(seam, "both")
        if other is h:
            qkv, m = seam.pieces("both.fc1", self.fc1, h, self.widths)
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q = linear("fc1", self.fc1, h, slice(0, dim)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            m = linear("fc1", self.fc1, h, slice(3 * dim, None))
            k, v = linear("fc1", self.fc1, other, slice(dim, 3 * dim)).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v, m


def finite_half(s: Streams, names: tuple[str, ...] | list[str]) -> Streams:
    """The streams, in fp16 without infinities: released FLUX weights exceed its range."""
    if all(s[n].x.dtype != torch.float16 for n in names if n in s):
        return s
    return {**s, **{n: s[n]._replace(x=s[n].x.clip(-HALF, HALF)) for n in names if n in s}}


@registry.register("backbones", "flux")
class Flux(Backbone):
    """x (B, C, H, W), network time t (B,) or (B, N) in [0, 1], text (B, L, D_text), pooled (B, D_pooled) -> (B, C_out, H, W)."""

    config_class = FluxConfig
    traits = frozenset({"grid", "static tokens"})
    sizes = {"FLUX.1-dev": dict(), "FLUX.1-schnell": dict(guidance=None)}

    def __init__(self, config: FluxConfig | None = None, **values: Any) -> None:
        super().__init__()
        self.config = cfg = FluxConfig(**values) if config is None else config
        self.rope = Rope(cfg.rope_widths)
        self.patch_embed = PatchEmbed(cfg.in_channels, cfg.patch_size, cfg.dim)
        self.time = TimeEmbed(cfg.dim)
        self.guidance = TimeEmbed(cfg.dim) if cfg.guidance is not None else None
        self.pooled = VectorEmbed(cfg.pooled_dim, cfg.dim)
        self.text = TextTokens(cfg.text_dim, cfg.dim)
        double = (DoubleBlock({n: self._part() for n in ("text", "img")}) for _ in range(cfg.depth))
        single = (SingleBlock(cfg.dim, cfg.num_heads, cfg.mlp_ratio) for _ in range(cfg.single_depth))
        self.blocks = nn.ModuleList([*double, *single])
        self.final = AdaLNHead(cfg.dim, cfg.patch_size**2 * cfg.out_channels)
        self.reset_parameters()

    def _part(self) -> AdaLNPart:
        return AdaLNPart(self.config.dim, self.config.num_heads, self.config.mlp_ratio, qk_norm=True)

    def reset_parameters(self) -> None:
        """As DiT's: Xavier, N(0, 0.02) for time and guidance, zeros in modulation and output."""
        adaln_zero_(self, self.final.proj)
        for embed in (self.time, self.guidance):
            for layer in (embed.fc1, embed.fc2) if embed is not None else ():
                nn.init.normal_(layer.weight, std=0.02)

    def shorter(self, keep: Sequence[int]) -> dict[str, Any]:
        double = sum(i < self.config.depth for i in keep)
        return {"depth": double, "single_depth": len(keep) - double}

    def prepare(  # type: ignore[override]
        self, *, text: Tensor, pooled: Tensor, guidance: Tensor | float | None = None, mask: Tensor | None = None
    ) -> Prepared:
        """What the encoders say of the caption.

        Args:
            text: (B, L, D_text) states of T5.
            pooled: (B, D_pooled) pooled CLIP states.
            guidance: a number or (B,): the scale that the network is told, which was distilled into it; default: the config's.
            mask: (B, L), false at padding that nobody may see. None: all is seen, as FLUX was trained.
        """
        layout = self.text.layout(text, mask)
        vector = self.pooled(self.pooled.check(pooled, len(text)))
        guidance = self.config.guidance if guidance is None else guidance
        if guidance is not None:
            if self.guidance is None:
                raise DitkitError(f"guidance is {guidance}", allowed="none: this network has no input for it")
            scale = torch.as_tensor(guidance, dtype=torch.float32, device=text.device).expand(len(text))
            vector = vector + self.guidance(1000 * scale)
        return Prepared({"text": self.text(text), "vector": vector, "layout": layout})

    def null(self, *, text: Tensor, pooled: Tensor, guidance: Tensor | float | None = None, mask: Tensor | None = None) -> dict[str, Any]:
        """No caption: zeros, at the same guidance. A negative prompt is another caption, given to ``prepare``."""
        rest = {k: v for k, v in (("guidance", guidance), ("mask", mask)) if v is not None}
        return {"text": torch.zeros_like(text), "pooled": torch.zeros_like(pooled), **rest}

    def embed(self, x: Tensor, t: Tensor, prepared: Prepared) -> Streams:
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            raise DitkitError(f"x is {tuple(x.shape)}", allowed=f"(B, {self.config.in_channels}, H, W)")
        text, layout, vector = (prepared.shared[n] for n in ("text", "layout", "vector"))
        check_batch(x, text)
        grid = self.patch_embed.grid(x)
        c = self.time(1000 * t) + vector
        noisiest = c if t.dim() == 1 else self.time(1000 * t.amax(1)) + vector  # where each patch has its own time
        img = Stream(self.patch_embed(x), grid_layout(grid, x.device), c, self.rope.table((1, *grid), x.device))
        return {"img": img, "text": Stream(text, layout, noisiest)}  # text stands at 0, where nothing is turned

    def conditioning(self, t: Tensor, prepared: Prepared) -> dict[str, Tensor]:
        c = self.time(1000 * t) + prepared.shared["vector"]
        return {"text": c, "img": c, "both": c}

    def head(self, s: Streams) -> Tensor:
        img = s["img"]
        return self.final(img.x, img.c)

    def unembed(self, tokens: Tensor, x: Tensor) -> Tensor:
        return unpatchify(tokens, self.patch_embed.grid(x), self.config.patch_size, "channels first")

    @classmethod
    def tiny(cls) -> Flux:
        torch.manual_seed(0)
        cfg = FluxConfig(
            input_size=(8, 8),
            in_channels=3,
            out_channels=3,
            dim=24,
            depth=1,
            single_depth=1,
            num_heads=2,
            mlp_ratio=2.0,
            text_dim=10,
            pooled_dim=6,
            rope_widths=(4, 4, 4),
        )
        return draw_parameters(cls(cfg)).eval()

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        cfg, g = self.config, torch.Generator().manual_seed(seed)
        x = torch.randn(batch, cfg.in_channels, *cfg.input_size, generator=g)
        text, pooled = torch.randn(batch, 5, cfg.text_dim, generator=g), torch.randn(batch, cfg.pooled_dim, generator=g)
        mask = torch.arange(5)[None] < torch.randint(2, 6, (batch, 1), generator=g)
        told = {"guidance": 1 + 3 * torch.rand(batch, generator=g)} if cfg.guidance is not None else {}
        return x, torch.rand(batch, generator=g), {"text": text, "pooled": pooled, "mask": mask, **told}
