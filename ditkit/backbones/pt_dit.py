"""PT-DiT (Qihoo-T2X, arXiv 2409.04005; ICLR 2025): neighbours attend alike, so few proxy tokens do for the global part of attention.

Each window of a picture or clip is represented by its mean; these proxies attend to each other, and every token asks them. Windows and
shifted windows see to the details. Text and time come in as in PixArt. Pictures, clips and views of an object are one network.

Differs from the released code: grids whose sides are no multiples of a window (windows at the borders are smaller); positions of grids
that are no squares, which are transposed there (``positions``); each sample of a batch is modulated by its own time; masks are made for
the grid at hand; the window means are the ICLR paper's, the random proxies of its first version are not built.
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
from ditkit.nn.adaln_single import AdaLNSingleHead, SharedModulation
from ditkit.nn.captions import CaptionProjection
from ditkit.nn.embeddings import TimeEmbed
from ditkit.nn.patches import PatchEmbed, unpatchify
from ditkit.nn.positions import Axis, sincos_table
from ditkit.nn.proxy import Proxies, ProxyBlock
from ditkit.nn.text import check_batch

from .dit import draw_parameters

Grid = tuple[int, ...]


class PTDiTConfig(Config):
    """Shape of a PT-DiT. Defaults: the released Qihoo-T2X for pictures of 1024 pixels."""

    input_size: tuple[int, ...] = Field(
        (128, 128), min_length=2, max_length=3, description="sides of the training data, in latent pixels: (h, w) or (frames, h, w)"
    )
    in_channels: int = Field(4, ge=1, description="channels of the data")
    out_channels: int = Field(8, ge=1, description="channels of the output; the released network has a second half that means nothing")
    patch_size: int = Field(2, ge=1, le=64, description="of rows and columns; frames are not patched")
    dim: int = Field(1152, ge=16)
    depth: int = Field(28, ge=1, le=200)
    num_heads: int = Field(16, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    text_dim: int = Field(4096, ge=1, description="width of the text encoder's states (T5-XXL: 4096)")
    window: tuple[int, ...] = Field((8, 8), description="sides of a window, in tokens; the paper's have 64 windows a frame at any size")
    proxies: tuple[int, ...] = Field((), description="proxies of a window along each axis; (): one")
    proxy_how: Literal["mean", "first"] = Field("mean", description="a proxy is the mean of its tokens, or the first of them")
    proxy_groups: Literal["strided", "contiguous"] = Field(
        "strided", description="which tokens of a window are one of several proxies', see nn/proxy.py"
    )
    shifted: bool = Field(True, description="has attention in shifted windows")
    position_scale: float = Field(2.0, gt=0, description="rows and columns are divided by it; released: input_size // 64, at least 1")
    positions: Literal["by axis", "released"] = Field(
        "by axis", description="released: on grids that are no squares, token n stands at row n // h, column n mod h, h the height"
    )

    @model_validator(mode="after")
    def _fits(self) -> PTDiTConfig:
        if self.dim % self.num_heads or self.dim % 16:
            raise ValueError(f"dim {self.dim} is no multiple of num_heads {self.num_heads} and of 16 (positions: three axes)")
        axes = len(self.input_size)
        if any(side < 1 or side % p for side, p in zip(self.input_size, self.patch)):
            raise ValueError(f"input_size {self.input_size} is no multiple of the patch {self.patch}")
        if len(self.window) != axes or len(self.proxies or self.window) != axes:
            raise ValueError(f"window {self.window}, proxies {self.proxies}: {axes} numbers are needed, as in input_size")
        try:
            self.pool()
        except DitkitError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def patch(self) -> Grid:
        """The sides of a patch."""
        return (1,) * (len(self.input_size) - 2) + (self.patch_size, self.patch_size)

    def pool(self) -> Proxies:
        """Which tokens stand for which."""
        return Proxies(self.window, self.proxies or (1,) * len(self.window), self.proxy_how, self.proxy_groups)


_TABLE = {"B": (12, 640, 10), "L": (28, 864, 12), "XL": (28, 1152, 16), "H": (30, 1440, 20)}  # depth, dim, num_heads


@registry.register("backbones", "pt_dit")
class PTDiT(Backbone):
    """x (B, C, H, W) or (B, C, F, H, W), network time t (B,) or (B, N), text (B, L, D_text) with its mask (B, L) -> (B, C_out, ...)."""

    config_class = PTDiTConfig
    traits = frozenset({"grid", "static tokens"})
    needs = frozenset({"grid"})
    sizes = {f"PT-DiT/{n}": dict(depth=depth, dim=dim, num_heads=heads) for n, (depth, dim, heads) in _TABLE.items()}

    def __init__(self, config: PTDiTConfig | None = None, **values: Any) -> None:
        super().__init__()
        self.config = cfg = PTDiTConfig(**values) if config is None else config
        self.patch_embed = PatchEmbed(cfg.in_channels, cfg.patch, cfg.dim)
        self.time, self.modulation = TimeEmbed(cfg.dim), SharedModulation(cfg.dim)
        self.caption = CaptionProjection(cfg.text_dim, cfg.dim)
        pool = cfg.pool()
        self.blocks = nn.ModuleList(ProxyBlock(cfg.dim, cfg.num_heads, pool, cfg.mlp_ratio, cfg.shifted) for _ in range(cfg.depth))
        self.final = AdaLNSingleHead(cfg.dim, cfg.patch_size**2 * cfg.out_channels)
        self.reset_parameters()

    def own_blocks(self) -> list[ProxyBlock]:
        """The blocks, by their type."""
        return list(self.blocks)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Z1 and Z2 zero as in the paper; the rest as in PixArt: Xavier, N(0, 0.02) for time and captions, text and output zero."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for part in (self.time, self.modulation, self.caption):
            for m in part.modules():
                if isinstance(m, nn.Linear):
                    nn.init.normal_(m.weight, std=0.02)
        for layer in (self.final.proj, *(b.cross.proj for b in self.own_blocks())):
            nn.init.zeros_(layer.weight)
        for block in self.own_blocks():
            block.silence()

    def prepare(self, *, text: Tensor, mask: Tensor | None = None) -> Prepared:  # type: ignore[override]
        """Captions, projected; of each block its keys and values of them.

        Args:
            text: (B, L, D_text) states of the text encoder.
            mask: (B, L) true where a token is; None: everywhere.
        """
        layout = self.caption.layout(text, mask)
        tokens = self.caption(text)
        blocks = tuple(b.cross.to_kv(tokens) for b in self.own_blocks()) if self.ahead() else ()
        return Prepared({"text": tokens, "layout": layout}, blocks)

    def null(self, *, text: Tensor, **rest: Tensor) -> dict[str, Tensor]:
        """A text of zeros with the same mask. Released weights were trained with the states of the empty prompt: give those instead."""
        return {"text": torch.zeros_like(text), **rest}

    def embed(self, x: Tensor, t: Tensor, prepared: Prepared) -> Streams:
        cfg, shared = self.config, prepared.shared
        if x.dim() != 2 + len(cfg.input_size) or x.shape[1] != cfg.in_channels:
            raise DitkitError(f"x is {tuple(x.shape)}", allowed=f"(B, {cfg.in_channels}, and {len(cfg.input_size)} sides)")
        check_batch(x, shared["text"])
        grid = self.patch_embed.grid(x)
        tokens = self.patch_embed(x) + self.table(grid, x.device).to(x.dtype)
        img = Stream(tokens, grid_layout(grid, x.device), self.modulation(self.time(t)))
        proxy = ProxyBlock.stream(tokens, grid, cfg.pool())
        return {"img": img, "proxy": proxy, "text": Stream(shared["text"], shared["layout"])}

    def table(self, grid: Grid, device: torch.device | None = None) -> Tensor:
        """(1, N, D) positions: frames a quarter of the channels, then columns and rows three eighths each. A picture is frame 0."""
        cfg, dim = self.config, self.config.dim
        frames, h, w = (1,) * (3 - len(grid)) + grid
        if cfg.positions == "released":
            h, w = w, h
        axes = (Axis(frames), *(Axis(n, 0.0, 1 / cfg.position_scale) for n in (h, w)))
        return sincos_table(dim, axes, device, order=(0, 2, 1), widths=(dim // 4, 3 * dim // 8, 3 * dim // 8))

    def head(self, s: Streams) -> Tensor:
        img = s["img"]
        return self.final(img.x, img.c)

    def unembed(self, tokens: Tensor, x: Tensor) -> Tensor:
        return unpatchify(tokens, self.patch_embed.grid(x), self.config.patch)

    @classmethod
    def tiny(cls) -> PTDiT:
        """Clips whose border fills no window, two proxies of a window along one axis."""
        torch.manual_seed(0)
        sizes = dict(in_channels=3, out_channels=3, patch_size=1, dim=16, depth=2, num_heads=2, mlp_ratio=2.0, text_dim=6)
        config = PTDiTConfig(**sizes, input_size=(3, 4, 8), window=(2, 2, 4), proxies=(1, 1, 2), position_scale=1.0)  # type: ignore[arg-type]
        return draw_parameters(cls(config)).eval()

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        cfg, g = self.config, torch.Generator().manual_seed(seed)
        x = torch.randn(batch, cfg.in_channels, *cfg.input_size, generator=g)
        length = torch.randint(1, 5, (batch, 1), generator=g)
        cond = {"text": torch.randn(batch, 4, cfg.text_dim, generator=g), "mask": torch.arange(4)[None] < length}
        return x, torch.rand(batch, generator=g) * 999, cond


@torch.no_grad()
def with_shifted(model: PTDiT) -> PTDiT:
    """The network with attention in shifted windows, which at first adds nothing: it computes what ``model`` computes (section 3.2).

    Raises:
        DitkitError: it has them already.
    """
    if model.config.shifted:
        raise DitkitError("the network has shifted windows already", allowed="a PTDiT of shifted=False")
    weight = model.patch_embed.weight
    new = PTDiT(model.config.model_copy(update={"shifted": True})).to(weight.device, weight.dtype)
    new.load_state_dict({**new.state_dict(), **model.state_dict()})
    return new.train(model.training)
