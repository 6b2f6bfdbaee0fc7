"""Flag-DiT (Lumina-T2X, arXiv 2405.05945) and Next-DiT (Lumina-Next, 2406.18583): LLaMA's blocks as a diffusion transformer.

RMSNorm, SwiGLU, rotary positions, normalised queries and keys, no biases; a text is asked through a gate that is closed at first. To
Flag-DiT a picture is one sequence, in which a learned [nextline] ends each row and, in clips, [nextframe] each frame. Next-DiT turns
queries and keys by row and column, has norms on both sides of each branch and fewer keys than queries. Both go beyond their
training's size by changing the rotary positions (``Extrapolation``). Network time is 0 for noise and 1 for data.

Differs from the released code: pictures of several sizes share one canvas (``sizes``), not a packed sequence; the extrapolation is
in the config, for each sample's own time, not in a call; the second half of the output, which means nothing, is returned; an
empty text has the mean zero, not 0 / 0; clips, which the paper describes, were not released.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.core.backbone import Backbone, Prepared
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.streams import Layout, Stream, Streams, grid_layout
from ditkit.core.view import shallow
from ditkit.nn.adaln import AdaLNHead
from ditkit.nn.embeddings import LabelEmbed, TimeEmbed
from ditkit.nn.extrapolation import Extrapolation, times_longer, turns
from ditkit.nn.flag import FlagBlock, PooledText, ScaleHead
from ditkit.nn.layers import swiglu_width
from ditkit.nn.patches import PatchEmbed, unpatchify
from ditkit.nn.positions import Rope, coordinates
from ditkit.nn.separators import LINE, Separators, insert, places, remove
from ditkit.nn.text import check_batch, text_layout

from .dit import draw_parameters

Grid = tuple[int, ...]
Sizes = tuple[Grid, ...] | None  # of each sample, in tokens


class LuminaConfig(Config):
    """Shape of a Flag-DiT or Next-DiT. Defaults: Lumina-Next-2B with grouped queries."""

    variant: Literal["flag", "next"] = Field("next", description="Flag-DiT, or Next-DiT")
    input_size: tuple[int, ...] = Field(
        (128, 128),
        min_length=1,
        max_length=3,
        description="sides of the training data, in latent pixels: (h, w), (frames, h, w), (length,)",
    )
    in_channels: int = Field(4, ge=1, description="channels of the data")
    out_channels: int = Field(8, ge=1, description="channels of the output; the released networks have a second half that means nothing")
    patch_size: int = Field(2, ge=1, le=64, description="of rows and columns; frames are not patched")
    dim: int = Field(2304, ge=4)
    depth: int = Field(24, ge=1, le=200)
    num_heads: int = Field(32, ge=1)
    num_kv_heads: int | None = Field(8, ge=1, description="heads of keys and values; None: num_heads")
    mlp_hidden: int | None = Field(None, ge=1, description="width of the SwiGLU; None: 8 / 3 dim, rounded up to a multiple of 256")
    text_dim: int | None = Field(2048, ge=1, description="width of the text encoder's states; None: class labels instead")
    num_classes: int = Field(1000, ge=1, description="of a network for classes, which has a further row for no label")
    qk_norm: bool = Field(True, description="LayerNorm of queries and keys over all heads")
    norm_eps: float = Field(1e-5, gt=0)
    rope_linear: float = Field(1.0, gt=0, description="positions are divided by it, at any size")
    rope_ntk: float = Field(1.0, gt=0, description="the rotary base is multiplied by it, at any size")
    extrapolation: Extrapolation = Field(Extrapolation(), description="what changes on grids larger than that of input_size")

    @property
    def patch(self) -> Grid:
        """The sides of a patch."""
        return {1: (self.patch_size,), 2: (self.patch_size,) * 2, 3: (1, self.patch_size, self.patch_size)}[len(self.input_size)]

    @property
    def grid(self) -> Grid:
        """The trained grid of patches."""
        return tuple(side // p for side, p in zip(self.input_size, self.patch))

    @property
    def separated(self) -> bool:
        """Learned tokens end rows and frames."""
        return self.variant == "flag" and self.text_dim is not None and len(self.input_size) > 1

    @property
    def hidden(self) -> int:
        """Width of the SwiGLU."""
        return self.mlp_hidden or swiglu_width(self.dim)

    @model_validator(mode="after")
    def _fits(self) -> LuminaConfig:
        if self.dim % self.num_heads or self.num_heads % (self.num_kv_heads or 1):
            raise ValueError(
                f"dim {self.dim}, num_heads {self.num_heads}, num_kv_heads {self.num_kv_heads}: each must divide the one before"
            )
        head, axes = self.dim // self.num_heads, len(self.input_size) if self.variant == "next" else 1
        if head % (2 * axes):
            raise ValueError(f"heads of width {head}: rotary positions on {axes} axes need a multiple of {2 * axes}")
        if any(side < 1 or side % p for side, p in zip(self.input_size, self.patch)):
            raise ValueError(f"input_size {self.input_size} is no multiple of the patch {self.patch}")
        return self


_CLASSES: dict[str, Any] = dict(input_size=(32, 32), num_kv_heads=None, text_dim=None)
_WIDTHS = {"600M": (16, 1536), "2B": (24, 2304), "3B": (32, 3072), "7B": (32, 4096)}


def _sizes() -> dict[str, dict[str, Any]]:
    found = {
        f"{name}-DiT-{size}": {**_CLASSES, "variant": name.lower(), "depth": depth, "dim": dim}
        for name in ("Flag", "Next")
        for size, (depth, dim) in _WIDTHS.items()
        if (name, size) != ("Flag", "2B")
    }
    found["Lumina-T2I-5B"] = dict(variant="flag", dim=3072, depth=32, num_kv_heads=None, text_dim=4096)
    return {**found, "Lumina-Next-2B": dict(num_kv_heads=None), "Lumina-Next-2B-GQA": dict()}


@registry.register("backbones", "lumina")
class Lumina(Backbone):
    """x (B, C, H, W), network time t (B,) or (B, N), text (B, L, D_text) with its mask, or labels y (B,) -> (B, C_out, H, W)."""

    config_class = LuminaConfig
    sizes = _sizes()

    def __init__(self, config: LuminaConfig | None = None, **values: Any) -> None:
        super().__init__()
        self.config = cfg = LuminaConfig(**values) if config is None else config
        self.traits = frozenset({"static tokens"} if cfg.separated else {"grid", "static tokens"})
        width = min(cfg.dim, 1024)  # of the conditioning
        self.patch_embed = PatchEmbed(cfg.in_channels, cfg.patch, cfg.dim)
        self.time = TimeEmbed(width)
        self.label = LabelEmbed(cfg.num_classes, width) if cfg.text_dim is None else None
        self.caption = PooledText(cfg.text_dim, width) if cfg.text_dim is not None else None
        self.separators = Separators(cfg.dim, len(cfg.input_size)) if cfg.separated else None
        self.pad_token = nn.Parameter(torch.empty(cfg.dim), requires_grad=False) if cfg.text_dim is not None else None
        self.blocks = nn.ModuleList(self._block(width) for _ in range(cfg.depth))
        out = cfg.out_channels * torch.Size(cfg.patch).numel()
        scale_only = cfg.variant == "next" and cfg.text_dim is not None
        self.final = ScaleHead(cfg.dim, out, width) if scale_only else AdaLNHead(cfg.dim, out, width)
        self.rope = _rope(cfg)
        self._sharpen()
        self.reset_parameters()

    def _block(self, width: int) -> FlagBlock:
        cfg = self.config
        return FlagBlock(
            cfg.dim,
            cfg.num_heads,
            width,
            cfg.hidden,
            cfg.num_kv_heads,
            cfg.text_dim,
            sandwich=cfg.variant == "next",
            norm_weights=cfg.variant == "flag" or cfg.text_dim is not None,
            qk_norm=cfg.qk_norm,
            eps=cfg.norm_eps,
        )

    def own_blocks(self) -> list[FlagBlock]:
        """The blocks, by their type."""
        return list(self.blocks)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """As released: Xavier; N(0, 0.02) for time, labels and single tokens; zeros in modulation, gates, pooled text and output."""
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
                if name.endswith(".ada") or name in ("final.proj", "caption.proj"):
                    nn.init.zeros_(m.weight)
        small = [self.time.fc1.weight, self.time.fc2.weight, *([] if self.label is None else [self.label.weight])]
        for p in small if self.pad_token is None else [*small, self.pad_token]:
            nn.init.normal_(p, std=0.02)
        for part in [] if self.separators is None else [self.separators]:
            part.reset_parameters()
        for block in self.own_blocks():
            if block.text is not None:
                nn.init.zeros_(block.text.gate)

    def extrapolating(self, **values: Any) -> Lumina:
        """A view over the same parameters with another ``Extrapolation``, e.g. rule="switch", proportional=True."""
        view = shallow(self)
        assert isinstance(view, Lumina)
        view.config = self.config.model_copy(update={"extrapolation": Extrapolation(**values)})
        view._sharpen()
        return view

    def _sharpen(self) -> None:
        how = self.config.extrapolation
        for block in self.own_blocks():
            block.base_tokens = (how.base_tokens or self._count(self.config.grid)) if how.proportional else 0

    def _count(self, grid: Grid) -> int:
        """Tokens of a grid, separators included."""
        return _layout(grid, None, self.config.separated).total

    def prepare(  # type: ignore[override]
        self,
        *,
        y: Tensor | None = None,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        sizes: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Prepared:
        """A text or class labels.

        Args:
            y: (B,) class labels; ``num_classes`` stands for no label.
            text: (B, L, D_text) states of the text encoder.
            mask: (B, L) true where a token is; None: everywhere.
            sizes: (B, 2) height and width of each picture in the upper left of x, in latent pixels; nobody sees the rest. None: all of x.
            rope: cos and sin (1, N, head width) of somebody else's rotary positions (diffusers' pipeline), instead of its own.
        """
        wanted = ["y"] if self.caption is None else ["text"]
        if (given := [name for name, value in (("y", y), ("text", text)) if value is not None]) != wanted:
            raise DitkitError(f"conditioning is {given}", allowed=f"{wanted}: this network is told by nothing else")
        shared: dict[str, Any] = {"sizes": self._in_tokens(sizes), "rope": rope}
        if self.label is not None and y is not None:
            return Prepared({**shared, "label": self.label(self.label.check(y))[:, None]})
        assert self.caption is not None
        assert text is not None
        layout = text_layout(text, mask, self.caption.proj.in_features)
        states = text.to(self.caption.norm.weight.dtype)
        blocks = tuple(b.text.to_kv(states) for b in self.own_blocks() if b.text is not None) if self.ahead() else ()
        return Prepared({**shared, "label": self.caption(states, layout.valid), "text": states, "layout": layout}, blocks)

    def _in_tokens(self, sizes: Tensor | None) -> Sizes:
        if sizes is None:
            return None
        how, p = self.config.extrapolation, self.config.patch_size
        if sizes.dim() != 2 or sizes.shape[1] != 2 or sizes.is_floating_point() or len(self.config.input_size) != 2:
            raise DitkitError(f"sizes is {tuple(sizes.shape)} of {sizes.dtype}", allowed="(B, 2) whole numbers, of pictures")
        if how.rule != "none" and how.scale is None:
            raise DitkitError(f"sizes with the rule {how.rule!r}, whose scale follows the picture", hint="give extrapolation.scale")
        if bad := [size for size in sizes.tolist() if any(n < p or n % p for n in size)]:
            raise DitkitError(f"a picture of {bad[0][0]} x {bad[0][1]}", allowed=f"multiples of {p}")
        return tuple((h // p, w // p) for h, w in sizes.tolist())

    def null(self, y: Tensor | None = None, *, text: Tensor | None = None, **rest: Tensor) -> dict[str, Tensor]:
        """The conditioning that stands for none: the label ``num_classes``, or a text of zeros.

        Released text models were trained with the states of the empty prompt: encode it, and give it to ``prepare``.
        """
        if y is not None:
            return {"y": torch.full_like(y, self.config.num_classes), **rest}
        return {**({} if text is None else {"text": torch.zeros_like(text)}), **rest}

    def embed(self, x: Tensor, t: Tensor, prepared: Prepared) -> Streams:
        cfg, shared = self.config, prepared.shared
        if x.dim() != 2 + len(cfg.input_size) or x.shape[1] != cfg.in_channels:
            raise DitkitError(f"x is {tuple(x.shape)}", allowed=f"(B, {cfg.in_channels}, and {len(cfg.input_size)} sides)")
        check_batch(x, shared["label"])
        grid, sizes = self.patch_embed.grid(x), shared["sizes"]
        layout = self._layout_of(x, grid, sizes)
        c = self.time(self._token_times(t, grid)) + shared["label"]
        rope = shared["rope"] or self._positions(t, grid, sizes, x.device)
        img = Stream(self._tokens(x, grid, layout), layout, c, rope)
        return {"img": img} if self.caption is None else {"img": img, "text": Stream(shared["text"], shared["layout"])}

    def _layout_of(self, x: Tensor, grid: Grid, sizes: Sizes) -> Layout:
        if sizes is None and not self.config.separated:
            return grid_layout(grid, x.device)
        if sizes is not None and (len(sizes) != len(x) or any(n > m for size in sizes for n, m in zip(size, grid))):
            raise DitkitError(f"{len(sizes)} sizes for x {tuple(x.shape)}", allowed="one for each sample, not larger than x")
        return _layout(grid, sizes, self.config.separated, x.device)

    def _tokens(self, x: Tensor, grid: Grid, layout: Layout) -> Tensor:
        tokens = self.patch_embed(x)
        if self.separators is not None:
            tokens = self.separators(tokens, grid)
        if layout.valid is not None and self.pad_token is not None:
            tokens = torch.where(layout.valid[..., None], tokens, self.pad_token)
        return tokens

    def _token_times(self, t: Tensor, grid: Grid) -> Tensor:
        """(B,), or (B, N) for all tokens: separators have the time of the noisiest patch."""
        if t.dim() == 1 or not self.config.separated:
            return t
        return insert(t[..., None], grid, t.amin(1, keepdim=True))[..., 0]

    def _positions(self, t: Tensor, grid: Grid, sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary tables (b, N, d); b is B where the rule depends on time."""
        cfg, how = self.config, self.config.extrapolation
        scale = times_longer(how, self._count(grid), self._count(cfg.grid), len(self.rope.widths))
        if not how.timed or scale == 1:
            return _table(self.rope, how, scale, self._lengths(), grid, sizes, cfg.separated, device)
        coords = _places(grid, sizes, cfg.separated, len(self.rope.widths) == 1, device)
        return self.rope.at(coords, turns(self.rope, how, scale, self._lengths(), t if t.dim() == 1 else t.amin(1)))

    def _lengths(self) -> Grid:
        """Trained tokens along each rotary axis."""
        return (self._count(self.config.grid),) if self.config.variant == "flag" else self.config.grid

    def conditioning(self, t: Tensor, prepared: Prepared) -> dict[str, Tensor]:
        return {"img": self.time(t) + prepared.shared["label"]}

    def head(self, s: Streams) -> Tensor:
        img = s["img"]
        out = self.final(img.x, img.c)
        return out if img.layout.valid is None else out.masked_fill(~img.layout.valid[..., None], 0)

    def unembed(self, tokens: Tensor, x: Tensor) -> Tensor:
        grid = self.patch_embed.grid(x)
        return unpatchify(remove(tokens, grid) if self.config.separated else tokens, grid, self.config.patch)

    @classmethod
    def tiny(cls) -> Lumina:
        """Next-DiT told by text, with grouped queries."""
        return cls._small(num_kv_heads=2)

    @classmethod
    def tinies(cls) -> dict[str, Backbone]:
        """Flag-DiT has separators and shifts, and no grid of tokens."""
        return {"": cls.tiny(), "flag": cls._small(variant="flag")}

    @classmethod
    def _small(cls, **more: Any) -> Lumina:
        torch.manual_seed(0)
        small: dict[str, Any] = dict(input_size=(8, 12), dim=32, depth=2, num_heads=4, num_kv_heads=None, mlp_hidden=48, text_dim=10)
        return draw_parameters(cls(LuminaConfig(**{**small, **more}))).eval()

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        cfg, g = self.config, torch.Generator().manual_seed(seed)
        x = torch.randn(batch, cfg.in_channels, *cfg.input_size, generator=g)
        if cfg.text_dim is None:
            cond = {"y": torch.randint(cfg.num_classes, (batch,), generator=g)}
        else:
            mask = torch.arange(5)[None] < torch.randint(2, 6, (batch, 1), generator=g)
            cond = {"text": torch.randn(batch, 5, cfg.text_dim, generator=g), "mask": mask}
        return x, torch.rand(batch, generator=g), cond


def _rope(cfg: LuminaConfig) -> Rope:
    """Flag-DiT: one axis, the index in the sequence. Next-DiT: an axis each, pair after pair in turn."""
    head, axes = cfg.dim // cfg.num_heads, len(cfg.input_size) if cfg.variant == "next" else 1
    return Rope((head // axes,) * axes, mix="alternating", linear=cfg.rope_linear, ntk=cfg.rope_ntk)


@lru_cache(maxsize=64)
def _layout(grid: Grid, sizes: Sizes, separated: bool, device: torch.device | None = None) -> Layout:
    """Cached: equal grids and sizes share one object, and so its masks."""
    with torch.inference_mode(False):
        coords, role = places(grid) if separated else (coordinates(grid).float(), None)
        valid = None
        if sizes is not None:  # the columns of a row's separator are beyond all others
            ends = torch.tensor(sizes)[:, None]
            column = coords[..., 1] if role is None else torch.where(role == LINE, 0, coords[..., 1])
            valid = (coords[..., 0] < ends[..., 0]) & (column < ends[..., 1])
        moved = [None if u is None else u.to(device) for u in (role, valid)]
        return Layout(coords.to(device), coords.shape[1], None if separated else grid, role=moved[0], valid=moved[1])


@lru_cache(maxsize=64)
def _places(grid: Grid, sizes: Sizes, separated: bool, flat: bool, device: torch.device | None = None) -> Tensor:
    """(b, N, A) rotary positions: on the grid or, if ``flat``, the index in each sample's own sequence."""
    with torch.inference_mode(False):
        if not flat:
            return coordinates(grid).to(device)
        if sizes is None:
            return torch.arange(_layout(grid, None, separated).total, dtype=torch.float64, device=device)[None, :, None]
        coords, width = _layout(grid, None, separated).coords, torch.tensor(sizes)[:, 1:]
        return (coords[..., 0] * (width + separated) + coords[..., 1].minimum(width)).double()[..., None].to(device)


@lru_cache(maxsize=64)
def _table(
    rope: Rope, how: Extrapolation, scale: float, lengths: Grid, grid: Grid, sizes: Sizes, separated: bool, device: torch.device | None
) -> tuple[Tensor, Tensor]:
    """cos and sin (b, N, d), where they do not depend on time."""
    with torch.inference_mode(False):
        cos, sin = rope.at(_places(grid, sizes, separated, len(rope.widths) == 1), turns(rope, how, scale, lengths))
        return cos.to(device), sin.to(device)
