"""PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (2403.04692): DiT told by captions, one modulation for all blocks, compressed keys.

Text comes in by one cross-attention in each block; time by adaLN-single, one projection for all blocks plus a small table in each, which
takes 26 % of DiT's parameters away and keeps its weights usable. Sigma compresses keys and values in deep blocks for 2K and 4K pictures.

Differs from the released code: any grid; the position table is computed, not stored; keys and values of the text are made once a run;
the time code is in fp32 in any dtype; Sigma's micro-conditions and both of its names are settings of one network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.core.backbone import Backbone, Prepared
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.streams import Stream, Streams, grid_layout
from ditkit.nn.adaln import AdaLNBlock, AdaLNHead, AdaLNPart
from ditkit.nn.adaln_single import AdaLNSingleBlock, AdaLNSingleHead, SharedModulation
from ditkit.nn.captions import CaptionProjection, MicroConditions
from ditkit.nn.embeddings import TimeEmbed
from ditkit.nn.kv_down import KVDown
from ditkit.nn.patches import PatchEmbed, unpatchify
from ditkit.nn.positions import sincos_table, stretched
from ditkit.nn.text import check_batch

from .dit import DiT, draw_parameters


class PixArtConfig(Config):
    """Shape of a PixArt. Defaults: PixArt-alpha XL/2 at 512 pixels."""

    input_size: tuple[int, int] = Field((64, 64), description="height and width of the training data, in latent pixels")
    in_channels: int = Field(4, ge=1, description="channels of the data")
    out_channels: int = Field(8, ge=1, description="channels of the output: twice in_channels where the variance is learned")
    patch_size: int = Field(2, ge=1, le=64)
    dim: int = Field(1152, ge=4)
    depth: int = Field(28, ge=1, le=200)
    num_heads: int = Field(16, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    text_dim: int = Field(4096, ge=1, description="width of the text encoder's states (T5-XXL: 4096)")
    text_length: int = Field(120, ge=1, description="tokens of a caption: 120 in alpha, 300 in Sigma")
    null_caption: bool = Field(True, description="the weights hold the states of the empty caption (diffusers' layout does not)")
    null_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of the null caption that are seen; None: as many as of the caption beside it, as released; 1: as in diffusers",
    )
    micro_conditions: bool = Field(False, description="is told size and aspect of the picture (alpha at 1024 pixels)")
    position_base: int = Field(32, ge=1, description="tokens a side of the square that is given whole positions at scale 1")
    position_scale: float = Field(1.0, gt=0, description="every grid gets positions from 0 to position_base / position_scale")
    embedding_init: Literal["released", "unit"] = Field(
        "released",
        description="captions start at N(0, 0.02), which is made for T5's 4096 states, or by Xavier: narrow encoders are heard sooner",
    )
    qk_norm: bool = Field(False, description="LayerNorm of queries and keys over all heads (an option of Sigma's code)")
    kv_ratio: int = Field(1, ge=1, description="keys and values are compressed over cells of kv_ratio x kv_ratio tokens")
    kv_blocks: tuple[int, ...] = Field((), description="the blocks that compress, from 0")
    kv_how: Literal["conv", "first", "every"] = Field("conv", description="how a cell becomes one key, see nn/kv_down.py")

    @model_validator(mode="after")
    def _fits(self) -> PixArtConfig:
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(
                f"dim {self.dim} is no multiple of num_heads {self.num_heads} and of 4 (positions: sine and cosine on two axes)"
            )
        if self.micro_conditions and self.dim % 3:
            raise ValueError(f"dim {self.dim} is no multiple of 3 (micro_conditions: height, width and aspect)")
        if any(side < 1 or side % self.patch_size for side in self.input_size):
            raise ValueError(f"input_size {self.input_size} is no multiple of patch_size {self.patch_size}")
        if bad := [i for i in self.kv_blocks if not 0 <= i < self.depth]:
            raise ValueError(f"kv_blocks has {bad[0]}, the blocks are 0 to {self.depth - 1}")
        if bool(self.kv_blocks) != (self.kv_ratio > 1):
            raise ValueError(f"kv_ratio {self.kv_ratio} with kv_blocks {self.kv_blocks}: a ratio above 1 and blocks belong together")
        if self.null_tokens is not None and self.null_tokens > self.text_length:
            raise ValueError(f"null_tokens {self.null_tokens} is more than text_length {self.text_length}")
        return self


def _sizes() -> dict[str, dict[str, Any]]:
    """The released checkpoints, and Sigma with the compression that its paper trains at 1K and 2K (never released)."""
    sides = {"256x256": 32, "512x512": 64, "512-MS": 64, "1024-MS": 128, "2K-MS": 256}

    def at(name: str, scale: float, **more: Any) -> dict[str, Any]:
        side = sides[name]
        return dict(input_size=(side, side), position_base=side // 2, position_scale=scale, **more)

    deep: dict[str, Any] = dict(kv_ratio=2, kv_blocks=tuple(range(14, 28)))
    alpha = {"256x256": at("256x256", 1.0), "512x512": at("512x512", 1.0), "1024-MS": at("1024-MS", 2.0, micro_conditions=True)}
    sigma = {name: at(name, sides[name] / 64, text_length=300) for name in ("256x256", "512-MS", "1024-MS", "2K-MS")}
    sigma |= {f"{name}-KV": {**sigma[name], **deep} for name in ("1024-MS", "2K-MS")}
    return {f"PixArt-XL-2-{n}": v for n, v in alpha.items()} | {f"PixArt-Sigma-XL-2-{n}": v for n, v in sigma.items()}


@registry.register("backbones", "pixart")
class PixArt(Backbone):
    """x (B, C, H, W), network time t (B,) or (B, N), text (B, L, D_text) with its mask (B, L) -> (B, C_out, H, W)."""

    config_class = PixArtConfig
    traits = frozenset({"grid", "static tokens"})
    null_text: Tensor | None
    sizes = _sizes()

    def __init__(self, config: PixArtConfig | None = None, **values: Any) -> None:
        super().__init__()
        self.config = cfg = PixArtConfig(**values) if config is None else config
        self.needs = frozenset({"grid"}) if cfg.kv_blocks else frozenset()
        self.patch_embed = PatchEmbed(cfg.in_channels, cfg.patch_size, cfg.dim)
        self.time, self.modulation = TimeEmbed(cfg.dim), SharedModulation(cfg.dim)
        self.micro = MicroConditions(cfg.dim) if cfg.micro_conditions else None
        self.caption = CaptionProjection(cfg.text_dim, cfg.dim)
        self.blocks = nn.ModuleList(self._block(i) for i in range(cfg.depth))
        self.final = AdaLNSingleHead(cfg.dim, cfg.patch_size**2 * cfg.out_channels)
        null = torch.randn(cfg.text_length, cfg.text_dim) / cfg.text_dim**0.5 if cfg.null_caption else None
        self.register_buffer("null_text", null)
        self.reset_parameters()

    def _block(self, i: int) -> AdaLNSingleBlock:
        cfg = self.config
        down = KVDown(cfg.dim, cfg.kv_ratio, cfg.kv_how) if i in cfg.kv_blocks else None
        return AdaLNSingleBlock(cfg.dim, cfg.num_heads, cfg.mlp_ratio, cfg.qk_norm, down)

    def own_blocks(self) -> list[AdaLNSingleBlock]:
        """The blocks, by their type."""
        return list(self.blocks)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """As released: Xavier; N(0, 0.02) for time, modulation, captions and sizes; zeros where text and output come out."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        captions = [self.caption] if self.config.embedding_init == "released" else []
        for part in (self.time, self.modulation, *captions, *([self.micro] if self.micro else [])):
            for m in part.modules():
                if isinstance(m, nn.Linear):
                    nn.init.normal_(m.weight, std=0.02)
        for layer in (self.final.proj, *(b.cross.proj for b in self.own_blocks())):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def shorter(self, keep: Sequence[int]) -> dict[str, Any]:
        return {"depth": len(keep), "kv_blocks": tuple(place for place, i in enumerate(keep) if i in self.config.kv_blocks)}

    def prepare(  # type: ignore[override]
        self, *, text: Tensor, mask: Tensor | None = None, size: Tensor | None = None, aspect: Tensor | None = None
    ) -> Prepared:
        """Captions, projected; of each block its keys and values of them.

        Args:
            text: (B, L, D_text) states of the text encoder.
            mask: (B, L) true where a token is; None: everywhere.
            size: (B, 2) height and width in pixels, for a model with micro-conditions.
            aspect: (B, 1) height / width; by default that of ``size``.
        """
        layout = self.caption.layout(text, mask)
        if (self.micro is None) != (size is None) or (size is None and aspect is not None):
            has = "no micro-conditions" if self.micro is None else "micro-conditions"
            raise DitkitError(
                f"the model has {has}, and size is {'not ' if size is None else ''}given", hint="see micro_conditions in its config"
            )
        micro = None if self.micro is None or size is None else self.micro(size, aspect)
        tokens = self.caption(text)
        blocks = tuple(b.cross.to_kv(tokens) for b in self.own_blocks()) if self.ahead() else ()
        return Prepared({"text": tokens, "layout": layout, "micro": micro}, blocks)

    def null(
        self, *, text: Tensor, mask: Tensor | None = None, size: Tensor | None = None, aspect: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The conditioning that stands for none, for a batch like these: the null caption, cut to L; size and aspect stay."""
        null, count = self.null_text, self.config.null_tokens
        if null is None:
            raise DitkitError("the model holds no null caption", hint="encode the empty prompt and give its states as the null text")
        batch, length = text.shape[:2]
        if length > len(null):
            raise DitkitError(f"text has {length} tokens", allowed=f"at most {len(null)}, as the null caption has")
        if count is not None:
            mask = (torch.arange(length, device=text.device) < count).expand(batch, -1)
        found = {"text": null[:length].to(text.dtype).expand(batch, -1, -1), "mask": mask, "size": size, "aspect": aspect}
        return {name: value for name, value in found.items() if value is not None}

    def embed(self, x: Tensor, t: Tensor, prepared: Prepared) -> Streams:
        cfg, shared = self.config, prepared.shared
        if x.dim() != 4 or x.shape[1] != cfg.in_channels:
            raise DitkitError(f"x is {tuple(x.shape)}", allowed=f"(B, {cfg.in_channels}, H, W)")
        check_batch(x, shared["text"])
        grid = self.patch_embed.grid(x)
        table = sincos_table(cfg.dim, stretched(grid, cfg.position_base, cfg.position_scale), x.device)
        time = self.time(t) if shared["micro"] is None else self.time(t) + shared["micro"]
        img = Stream(self.patch_embed(x) + table.to(x.dtype), grid_layout(grid, x.device), self.modulation(time))
        return {"img": img, "text": Stream(shared["text"], shared["layout"])}

    def head(self, s: Streams) -> Tensor:
        img = s["img"]
        return self.final(img.x, img.c)

    def unembed(self, tokens: Tensor, x: Tensor) -> Tensor:
        return unpatchify(tokens, self.patch_embed.grid(x), self.config.patch_size)

    @classmethod
    def tiny(cls) -> PixArt:
        """All of alpha and Sigma; ``tinies`` has the network without."""
        return cls._small(micro_conditions=True, kv_ratio=2, kv_blocks=(0, 1))

    @classmethod
    def tinies(cls) -> dict[str, Backbone]:
        return {"": cls.tiny(), "plain": cls._small()}

    @classmethod
    def _small(cls, **more: Any) -> PixArt:
        torch.manual_seed(0)
        sizes = dict(input_size=(8, 12), dim=24, depth=2, num_heads=3, mlp_ratio=2.0, text_dim=10, text_length=6, position_base=4)
        return draw_parameters(cls(PixArtConfig(**sizes, **more))).eval()  # type: ignore[arg-type]

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        cfg, g = self.config, torch.Generator().manual_seed(seed)
        x = torch.randn(batch, cfg.in_channels, *cfg.input_size, generator=g)
        length = torch.randint(1, cfg.text_length + 1, (batch, 1), generator=g)
        cond = {
            "text": torch.randn(batch, cfg.text_length, cfg.text_dim, generator=g),
            "mask": torch.arange(cfg.text_length)[None] < length,
        }
        if cfg.micro_conditions:
            cond["size"] = torch.randint(64, 512, (batch, 2), generator=g).float()
            cond["aspect"] = cond["size"][:, :1] / cond["size"][:, 1:]
        return x, torch.rand(batch, generator=g) * 999, cond


@torch.no_grad()
def from_dit(dit: DiT, config: PixArtConfig, t: float = 500.0) -> PixArt:
    """A PixArt that starts from a class-conditional DiT (alpha, section 2.3, "re-parameterization").

    Tables are set so that at time ``t`` every block, and the head, is modulated as in the DiT without a class: E_i = Ada_i(c) - T(t),
    c the DiT's code of t and its null label. Cross-attention adds nothing yet. So at ``t`` the new network computes what the DiT
    computes without a class, on grids where both have the same positions, unless keys are compressed.

    Raises:
        DitkitError: the two differ in a size, or the DiT is conditioned otherwise than by adaLN-Zero.
    """
    _check_start(dit, config)
    weight = dit.patch_embed.weight
    model = PixArt(config).to(weight.device, weight.dtype)
    _copy_weights(model, dit)
    if model.micro is not None:  # silent at first
        for embed in (model.micro.size, model.micro.aspect):
            nn.init.zeros_(embed.fc2.weight)
    time = torch.full((1,), t, device=weight.device)
    c = dit.time(time) if dit.label is None or not dit.config.null_label else dit.time(time) + dit.label.weight[-1]
    own, shared = model.modulation(model.time(time))[0, 0].split([config.dim, 6 * config.dim])
    for block, part in zip(model.own_blocks(), _parts(dit)):
        block.table.copy_(torch.cat(part.modulation(c), 1)[0] - shared.unflatten(0, (6, -1)))
    model.final.table.copy_(dit.final.ada(F.silu(c)).unflatten(-1, (2, -1))[0, 0] - own)  # type: ignore[operator]
    return model


def _check_start(dit: DiT, config: PixArtConfig) -> None:
    for name in ("in_channels", "out_channels", "patch_size", "dim", "depth", "num_heads", "mlp_ratio"):
        mine, theirs = getattr(config, name), getattr(dit.config, name)
        if mine != theirs:
            raise DitkitError(f"{name} is {mine}", allowed=f"{theirs}, which the DiT has")
    if not isinstance(dit.blocks[0], AdaLNBlock) or not isinstance(dit.final, AdaLNHead):
        raise DitkitError("the DiT is conditioned by other means", allowed="adaLN-Zero")


def _parts(dit: DiT) -> list[AdaLNPart]:
    return [b.parts["img"] for b in dit.blocks]  # type: ignore[index, misc]


def _copy_weights(model: PixArt, dit: DiT) -> None:
    """What the two have in common: patches, time, attention, MLP, output."""
    pairs: list[tuple[nn.Module, nn.Module]] = [(model.patch_embed, dit.patch_embed), (model.time, dit.time)]
    pairs.append((model.final.proj, dit.final.proj))
    for block, part in zip(model.own_blocks(), _parts(dit)):
        pairs += [(block.attn.qkv, part.qkv), (block.attn.proj, part.proj), (block.mlp, part.mlp)]  # type: ignore[list-item]
    for new, old in pairs:
        new.load_state_dict(old.state_dict())
