"""DiT (arXiv 2212.09748): a plain transformer over latent patches, conditioned by adaLN-Zero. SiT (2401.08740) is the same network.

c = TimeMLP(t) + Label(y); each block is modulated by Linear(SiLU(c)), whose gates start at zero, so that a fresh network is
the identity in every block and outputs exactly 0.

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
from ditkit.core.streams import Stream, Streams, grid_layout
from ditkit.nn.adaln import AdaLNBlock, AdaLNHead, AdaLNPart
from ditkit.nn.embeddings import LabelEmbed, TimeEmbed
from ditkit.nn.patches import PatchEmbed, unpatchify
from ditkit.nn.positions import sincos_table

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

    @model_validator(mode="after")
    def _fits(self) -> DiTConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is no multiple of num_heads {self.num_heads}")
        if self.dim % 4:
            raise ValueError(f"dim {self.dim} is no multiple of 4 (the position code has sine and cosine on two axes)")
        if any(side < 1 or side % self.patch_size for side in self.input_size):
            raise ValueError(f"input_size {self.input_size} is no multiple of patch_size {self.patch_size}")
        return self


def _part(cfg: DiTConfig) -> AdaLNPart:
    return AdaLNPart(cfg.dim, cfg.num_heads, cfg.mlp_ratio, mlp_norm_eps=cfg.mlp_norm_eps)


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
        self.blocks = nn.ModuleList(AdaLNBlock({"img": _part(cfg)}) for _ in range(cfg.depth))
        self.final = AdaLNHead(cfg.dim, cfg.patch_size**2 * cfg.out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation: Xavier, N(0, 0.02) for time and labels, zeros in modulation and output (adaLN-Zero)."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        released = self.config.embedding_init == "released"
        nn.init.normal_(self.label.weight, std=0.02 if released else 1.0)
        for layer in (self.time.fc1, self.time.fc2) if released else ():
            nn.init.normal_(layer.weight, std=0.02)
        zero = [self.final.ada, self.final.proj, *(m for name, m in self.blocks.named_modules() if name.endswith(".ada"))]
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def prepare(self, *, y: Tensor) -> Prepared:  # type: ignore[override]
        """y (B,) class labels; ``num_classes`` stands for no label."""
        return Prepared({"label": self.label(self.label.check(y))[:, None]})

    def null(self, y: Tensor) -> dict[str, Tensor]:
        """The conditioning that stands for none, for a batch like y."""
        if not self.config.null_label:
            raise DitkitError("this model has no null label, so it cannot be guided", hint="guidance_scale=1, or train with null_label")
        return {"y": torch.full_like(y, self.config.num_classes)}

    def embed(self, x: Tensor, t: Tensor, prepared: Prepared) -> Streams:
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            raise DitkitError(f"x is {tuple(x.shape)}", allowed=f"(B, {self.config.in_channels}, H, W)")
        grid = self.patch_embed.grid(x)
        tokens = self.patch_embed(x) + sincos_table(self.config.dim, grid, x.device).to(x.dtype)
        return {"img": Stream(tokens, grid_layout(grid, x.device), self.time(t) + prepared.shared["label"])}

    def head(self, s: Streams) -> Tensor:
        img = s["img"]
        return self.final(img.x, img.c)

    def unembed(self, tokens: Tensor, x: Tensor) -> Tensor:
        return unpatchify(tokens, self.patch_embed.grid(x), self.config.patch_size)

    def table_parameters(self) -> int:
        """Numbers of the fixed position table at ``input_size``, which the published counts include."""
        h, w = (side // self.config.patch_size for side in self.config.input_size)
        return h * w * self.config.dim

    @classmethod
    def tiny(cls) -> DiT:
        torch.manual_seed(0)
        model = cls(input_size=(8, 12), in_channels=3, out_channels=6, dim=32, depth=4, num_heads=4, num_classes=5)
        return draw_parameters(model).eval()

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, self.config.in_channels, *self.config.input_size, generator=g)
        y = torch.randint(self.config.num_classes, (batch,), generator=g)
        return x, torch.rand(batch, generator=g) * 999, {"y": y}


def draw_parameters(model: Any, std: float = 0.5) -> Any:
    """Draw every parameter, so that no zero-initialised branch is silent: matrices N(0, std^2 / fan_in), vectors N(0, 0.2^2)."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.2 if p.dim() < 2 else std / p.shape[-1] ** 0.5)
    return model
