"""DiT (arXiv 2212.09748): a plain transformer over latent patches, conditioned by adaLN-Zero. SiT (2401.08740) is the same network.

c = TimeMLP(t) + Label(y); each block is modulated by Linear(SiLU(c)), whose gates start at zero, so that a fresh network is
the identity in every block and outputs exactly 0. The paper's other ways to condition (section 3.2) are settings: modulation
without gates, or time and label as two tokens, asked by cross-attention or in a row with the image.

Differs from the released code: any grid, not only square; the fixed position table is computed, not stored; the patch
convolution is written as a linear layer. The process decides what the network's time and its output channels mean.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.core.backbone import Backbone, Prepared
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.streams import Layout, Stream, Streams, grid_layout
from ditkit.nn.adaln import AdaLNBlock, AdaLNHead, AdaLNPart
from ditkit.nn.embeddings import LabelEmbed, TimeEmbed
from ditkit.nn.patches import PatchEmbed, unpatchify
from ditkit.nn.plain import PlainBlock, PlainHead
from ditkit.nn.positions import Rope, sincos_table

_WIDTHS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


class DiTConfig(Config):
    """Shape of a DiT. Defaults: DiT-S/2 on 32 x 32 x 4 latents of 1,000 classes."""

    input_size: tuple[int, int] = Field((32, 32), description="height and width of the training data, in latent pixels")
    in_channels: int = Field(4, ge=1, description="channels of the data")
    out_channels: int = Field(8, ge=1, description="channels of the output: twice in_channels where the variance is learned")
    patch_size: int = Field(2, ge=1, le=64)
    dim: int = Field(384, ge=4)
    depth: int = Field(12, ge=1, le=200)
    num_heads: int = Field(6, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    num_classes: int = Field(1000, ge=1)
    null_label: bool = Field(True, description="a further row of the label table stands for no label (needed for guidance)")
    time_freq_shift: Literal[0, 1] = Field(
        0, description="time frequencies 10000^(-i / (128 - shift)): 0 as released, 1 in diffusers' port"
    )
    embedding_init: Literal["released", "unit"] = Field(
        "released",
        description="time and labels start at N(0, 0.02), or labels at N(0, 1) and time by Xavier: small widths then learn labels at once",
    )
    mlp_norm_eps: float = Field(1e-6, gt=0, description="of the norm before the MLP: 1e-6 as released, 1e-5 in diffusers' port")
    conditioning: Literal["adaln_zero", "adaln", "cross_attention", "in_context"] = Field(
        "adaln_zero", description="how blocks know time and label: modulation with or without gates, or two tokens beside the image's"
    )
    positions: Literal["sincos", "rope"] = Field(
        "sincos", description="a fixed code added to the tokens, or rotary positions of rows and columns in every attention"
    )

    @property
    def modulated(self) -> bool:
        """Blocks and head are modulated by c; otherwise time and label are tokens."""
        return self.conditioning in ("adaln_zero", "adaln")

    @model_validator(mode="after")
    def _fits(self) -> DiTConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is no multiple of num_heads {self.num_heads}")
        if self.dim % 4:
            raise ValueError(f"dim {self.dim} is no multiple of 4 (the position code has sine and cosine on two axes)")
        if self.positions == "rope" and self.dim // self.num_heads % 4:
            raise ValueError(f"heads of width {self.dim // self.num_heads}: rotary positions on two axes need a multiple of 4")
        if any(side < 1 or side % self.patch_size for side in self.input_size):
            raise ValueError(f"input_size {self.input_size} is no multiple of patch_size {self.patch_size}")
        return self


def _block(cfg: DiTConfig) -> nn.Module:
    if cfg.modulated:
        gated = cfg.conditioning == "adaln_zero"
        return AdaLNBlock({"img": AdaLNPart(cfg.dim, cfg.num_heads, cfg.mlp_ratio, mlp_norm_eps=cfg.mlp_norm_eps, gated=gated)})
    if cfg.conditioning == "cross_attention":
        return PlainBlock(cfg.dim, cfg.num_heads, cfg.mlp_ratio, ("img",), "cond", cfg.mlp_norm_eps)
    return PlainBlock(cfg.dim, cfg.num_heads, cfg.mlp_ratio, ("img", "cond"), mlp_norm_eps=cfg.mlp_norm_eps)


@registry.register("backbones", "dit")
class DiT(Backbone):
    """x (B, C, H, W), network time t (B,) or (B, N), class labels y (B,) -> (B, C_out, H, W)."""

    config_class = DiTConfig
    traits = frozenset({"grid", "static tokens"})
    sizes = {
        f"DiT-{name}/{p}": dict(depth=depth, dim=dim, num_heads=heads, patch_size=p)
        for name, (depth, dim, heads) in _WIDTHS.items()
        for p in (2, 4, 8)
    }

    def __init__(self, config: DiTConfig | None = None, **values: Any) -> None:
        super().__init__()
        self.config = cfg = DiTConfig(**values) if config is None else config
        self.patch_embed = PatchEmbed(cfg.in_channels, cfg.patch_size, cfg.dim)
        self.time = TimeEmbed(cfg.dim, freq_shift=cfg.time_freq_shift)
        self.label = LabelEmbed(cfg.num_classes, cfg.dim, cfg.null_label)
        self.blocks = nn.ModuleList(_block(cfg) for _ in range(cfg.depth))
        self.final = (AdaLNHead if cfg.modulated else PlainHead)(cfg.dim, cfg.patch_size**2 * cfg.out_channels)
        self.rope = Rope((cfg.dim // cfg.num_heads // 2,) * 2) if cfg.positions == "rope" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation: Xavier, N(0, 0.02) for time and labels, zeros in the output and, for adaLN-Zero, in modulation."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        released = self.config.embedding_init == "released"
        nn.init.normal_(self.label.weight, std=0.02 if released else 1.0)
        for layer in (self.time.fc1, self.time.fc2) if released else ():
            nn.init.normal_(layer.weight, std=0.02)
        zero_modulation = self.config.conditioning == "adaln_zero"
        for layer in (m for n, m in self.named_modules() if n == "final.proj" or (zero_modulation and n.endswith(".ada"))):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def prepare(self, *, y: Tensor) -> Prepared:  # type: ignore[override]
        """y (B,) class labels; ``num_classes`` stands for no label."""
        label = self.label(self.label.check(y))[:, None]
        return Prepared({"label": label, "layout": Layout(torch.zeros(1, 2, 2, device=label.device), 2)})  # of time and label as tokens

    def null(self, y: Tensor) -> dict[str, Tensor]:
        """The conditioning that stands for none, for a batch like y."""
        if not self.config.null_label:
            raise DitkitError("this model has no null label, so it cannot be guided", hint="guidance_scale=1, or train with null_label")
        return {"y": torch.full_like(y, self.config.num_classes)}

    def embed(self, x: Tensor, t: Tensor, prepared: Prepared) -> Streams:
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            raise DitkitError(f"x is {tuple(x.shape)}", allowed=f"(B, {self.config.in_channels}, H, W)")
        grid = self.patch_embed.grid(x)
        tokens, rope = self.patch_embed(x), None
        if self.rope is None:
            tokens = tokens + sincos_table(self.config.dim, grid, x.device).to(x.dtype)
        else:
            rope = self.rope.table(grid, x.device)
        img = Stream(tokens, grid_layout(grid, x.device), rope=rope)
        if self.config.modulated:
            return {"img": img._replace(c=self.conditioning(t if t.dim() == 2 else t[:, None], prepared)["img"])}
        return {"img": img, "cond": self._as_tokens(t, prepared)}

    def conditioning(self, t: Tensor, prepared: Prepared) -> dict[str, Tensor]:
        return {"img": self.time(t) + prepared.shared["label"]} if self.config.modulated else {}

    def _as_tokens(self, t: Tensor, prepared: Prepared) -> Stream:
        """Time and label as a stream of two tokens, without positions."""
        if t.dim() != 1:
            raise DitkitError(
                f"time is {tuple(t.shape)}", allowed=f"(B,) with {self.config.conditioning}: time is one token", hint="adaln_zero"
            )
        return Stream(torch.cat([self.time(t), prepared.shared["label"]], 1), prepared.shared["layout"])

    def head(self, s: Streams) -> Tensor:
        img = s["img"]
        return self.final(img.x, img.c)

    def unembed(self, tokens: Tensor, x: Tensor) -> Tensor:
        return unpatchify(tokens, self.patch_embed.grid(x), self.config.patch_size)

    def table_parameters(self) -> int:
        """Numbers of the fixed position table at ``input_size``, which the published counts include; rotary positions have none."""
        if self.rope is not None:
            return 0
        h, w = (side // self.config.patch_size for side in self.config.input_size)
        return h * w * self.config.dim

    @classmethod
    def tiny(cls, **values: Any) -> DiT:
        torch.manual_seed(0)
        model = cls(**{**dict(input_size=(8, 12), in_channels=3, out_channels=6, dim=32, depth=4, num_heads=4, num_classes=5), **values})
        return draw_parameters(model).eval()

    @classmethod
    def tinies(cls) -> dict[str, Backbone]:
        if cls is not DiT:  # a subclass with blocks of its own
            return super().tinies()
        others = [{"conditioning": name} for name in ("adaln", "cross_attention", "in_context")] + [{"positions": "rope"}]
        return {**super().tinies(), **{next(iter(v.values())): cls.tiny(depth=2, **v) for v in others}}

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, self.config.in_channels, *self.config.input_size, generator=g)
        y = torch.randint(self.config.num_classes, (batch,), generator=g)
        return x, torch.rand(batch, generator=g) * 999, {"y": y}


def draw_parameters(model: Any, std: float = 0.5) -> Any:
    """Draw every parameter, so that no zero-initialised branch is silent: matrices N(0, std^2 / fan_in), vectors N(0, 0.2^2).

    Scales of LayerNorms are 1 more, so that they silence nothing.
    """
    for p in model.parameters():
        nn.init.normal_(p, std=0.2 if p.dim() < 2 else std / p.shape[-1] ** 0.5)
    for m in model.modules():
        if isinstance(m, nn.LayerNorm) and m.elementwise_affine:
            m.weight.data += 1
    return model
