"""PT-DiT (Qihoo-T2X): the released layout, as a table. It bears diffusers' names; diffusers itself has no such network.

What differs from ours: the patch projection is a convolution; q, k and v are apart. The file does not say how many heads, nor windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pydantic import Field

from ditkit.bundle import Part, Sampling
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError

from .hints import Hints
from .tables import JOIN, Convolution, Row, Table

if TYPE_CHECKING:
    from ditkit.backbones.pt_dit import PTDiTConfig

Shape = tuple[int, ...]

CLASS = ""
PIPELINES: tuple[str, ...] = ()
INDEX_KEYS: tuple[str, ...] = ()
SYSTEMS = ("qihoo-t2x",)
FLOW_TIME = "thousand"

_BLOCK, _THEIRS = "blocks.{i}", "transformer_blocks.{i}"


def _attention(ours: str, theirs: str) -> tuple[Row, ...]:
    qkv = tuple(f"{_THEIRS}.{theirs}.to_{x}" for x in "qkv")
    return Row(f"{_BLOCK}.{ours}.qkv", qkv, JOIN), Row(f"{_BLOCK}.{ours}.proj", f"{_THEIRS}.{theirs}.to_out.0")


def _cross(ours: str, theirs: str) -> tuple[Row, ...]:
    q, k, v = (f"{_THEIRS}.{theirs}.to_{x}" for x in "qkv")
    out = Row(f"{_BLOCK}.{ours}.proj", f"{_THEIRS}.{theirs}.to_out.0")
    return Row(f"{_BLOCK}.{ours}.q", q), Row(f"{_BLOCK}.{ours}.kv", (k, v), JOIN), out


_ROWS = (
    Row("time.fc1", "adaln_single.emb.timestep_embedder.linear_1"),
    Row("time.fc2", "adaln_single.emb.timestep_embedder.linear_2"),
    Row("modulation.proj", "adaln_single.linear"),
    Row("caption.fc1", "caption_projection.linear_1"),
    Row("caption.fc2", "caption_projection.linear_2"),
    Row("final.table", "scale_shift_table", tensors=("",)),
    Row("final.proj", "proj_out"),
    Row(f"{_BLOCK}.table", f"{_THEIRS}.scale_shift_table", tensors=("",)),
    *_attention("proxy", "proxy_attn1"),
    *_cross("visual", "pvisual_attn2"),
    Row(f"{_BLOCK}.visual_out", f"{_THEIRS}.linear_1_visual"),
    *_attention("attn", "attn1"),
    *_cross("cross", "attn2"),
    Row(f"{_BLOCK}.mlp.fc1", f"{_THEIRS}.ff.net.0.proj"),
    Row(f"{_BLOCK}.mlp.fc2", f"{_THEIRS}.ff.net.2"),
)
_SHIFTED = (
    Row(f"{_BLOCK}.shift_table", f"{_THEIRS}.proxy_scale_shift_table", tensors=("",)),
    *_attention("shift", "attn3"),
    Row(f"{_BLOCK}.shift_out", f"{_THEIRS}.linear_2"),
)
_HEADS = {dim: dim // heads for heads, dim in ((64, 640), (72, 864), (72, 1152), (72, 1440))}  # width: heads, of the paper's sizes


def official_table(config: PTDiTConfig) -> Table:
    """The released layout of this network. Its position table is not stored."""
    patch = Row("patch_embed", "pos_embed.proj", Convolution(config.patch_size, config.patch_size))
    return Table((patch, *_ROWS, *(_SHIFTED if config.shifted else ())), config.depth, {})


class Ours(Config):
    """What no other layout can say."""

    frames: int | None = Field(None, ge=1, description="latent frames of clips; None: pictures")
    width: int | None = Field(None, ge=1, description="of the training data, where it is no square")
    mlp_ratio: float = 4.0
    proxy_how: Literal["mean", "first"] = "mean"
    proxy_groups: Literal["strided", "contiguous"] = "strided"
    position_scale: float | None = None
    positions: Literal["by axis", "released"] = "by axis"


class Constructor(Config):
    """Arguments of the released ``PTDiTDiffuser``. Fields of one allowed value are those that our network computes in no other way."""

    num_heads: int = 16
    head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8
    num_layers: int = 28
    cross_attention_dim: int | None = None
    attention_bias: Literal[True] = True
    sample_size: int = 128
    patch_size: int = 2
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    num_embeds_ada_norm: int | None = 1000
    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    norm_elementwise_affine: Literal[False] = False
    norm_eps: float = Field(1e-6, ge=1e-6, le=1e-6)
    caption_channels: int = 4096
    use_additional_conditions: Literal[False] = False
    shift_window: bool = True
    frame: int = Field(1, description="latent frames; the network takes any number")
    compress_ratios: tuple[int, int, int] = Field((1, 8, 8), description="sides of a window: frames, rows, columns")
    proxy_compress_ratios: tuple[int, int, int] = Field((1, 8, 8), description="tokens a proxy stands for along each axis; frames: all")

    def to_ours(self, ours: Ours | None = None) -> PTDiTConfig:
        """The same shape in our words; without ``ours`` of pictures, as the released weights are."""
        from ditkit.backbones.pt_dit import PTDiTConfig

        more, dim = ours or Ours(), self.num_heads * self.head_dim
        if self.cross_attention_dim not in (None, dim):
            raise DitkitError(f"cross_attention_dim is {self.cross_attention_dim}", allowed=f"{dim}, the network's width")
        if any(side % part for side, part in zip(self.compress_ratios[1:], self.proxy_compress_ratios[1:])):
            raise DitkitError(
                f"compress_ratios {self.compress_ratios}, proxy_compress_ratios {self.proxy_compress_ratios}",
                allowed="windows that are multiples of what a proxy stands for",
            )
        proxies = (1, *(side // part for side, part in zip(self.compress_ratios[1:], self.proxy_compress_ratios[1:])))
        side = self.sample_size // self.patch_size * self.patch_size
        frames = () if more.frames is None else (more.frames,)
        if not frames and self.compress_ratios[0] > 1:
            raise DitkitError(f"compress_ratios {self.compress_ratios} of pictures", allowed="1 frame")
        first = 0 if frames else 1
        return PTDiTConfig(
            input_size=(*frames, side, more.width or side),
            in_channels=self.in_channels,
            out_channels=self.out_channels or self.in_channels,
            patch_size=self.patch_size,
            dim=dim,
            depth=self.num_layers,
            num_heads=self.num_heads,
            mlp_ratio=more.mlp_ratio,
            text_dim=self.caption_channels,
            window=self.compress_ratios[first:],
            proxies=proxies[first:],
            proxy_how=more.proxy_how,
            proxy_groups=more.proxy_groups,
            shifted=self.shift_window,
            position_scale=more.position_scale or max(self.sample_size // 64, 1),
            positions=more.positions,
        )


def constructor_of(config: PTDiTConfig) -> Constructor:
    """Our configuration as arguments of the released class."""
    pool, lead = config.pool(), (1,) * (3 - len(config.input_size))
    sides, counts = lead + pool.sides, lead + pool.counts
    if counts[0] > 1:
        raise DitkitError(f"{counts[0]} proxies of a window over frames", allowed="1: the released class has no other", hint="--to ditkit")
    return Constructor(
        num_heads=config.num_heads,
        head_dim=config.dim // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        cross_attention_dim=config.dim,
        sample_size=config.input_size[-2],
        patch_size=config.patch_size,
        caption_channels=config.text_dim,
        shift_window=config.shifted,
        frame=config.input_size[0] if len(config.input_size) == 3 else 1,
        compress_ratios=sides,  # type: ignore[arg-type]
        proxy_compress_ratios=tuple(side // n for side, n in zip(sides, counts)),  # type: ignore[arg-type]
    )


def ours_of(config: PTDiTConfig) -> Ours:
    """What no other layout can say."""
    *frames, h, w = config.input_size
    usual = config.position_scale == max(h // 64, 1)
    return Ours(
        frames=frames[0] if frames else None,
        width=None if h == w else w,
        position_scale=None if usual else config.position_scale,
        **{name: getattr(config, name) for name in ("mlp_ratio", "proxy_how", "proxy_groups", "positions")},
    )


def is_official(names: Mapping[str, Any]) -> bool:
    """Whether these are the keys of a released PT-DiT."""
    return {"pos_embed.proj.weight", "transformer_blocks.0.proxy_attn1.to_q.weight", "scale_shift_table"} <= set(names)


def config_from_official(shapes: Mapping[str, Shape], hints: Hints, where: str = "the file") -> PTDiTConfig:
    """The configuration that a released file has, from its shapes; what they do not show comes from ``hints``.

    Without an input size it is that of the released weights, 1024 pixels. Windows are such that a frame has 8 x 8 of them, as the
    paper's at every size.

    Raises:
        DitkitError: the number of heads is not that of a published size and not given.
    """
    from ditkit.backbones.pt_dit import PTDiTConfig

    dim, channels, patch, _ = shapes["pos_embed.proj.weight"]
    heads = hints.num_heads or _HEADS.get(dim)
    if heads is None:
        raise DitkitError(f"{where}: width {dim} is no published size", hint="give --num-heads")
    h, w = hints.input_size or (128, 128)
    return PTDiTConfig(
        input_size=(h, w),
        in_channels=channels,
        out_channels=shapes["proj_out.weight"][0] // patch**2,
        patch_size=patch,
        dim=dim,
        depth=len({name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}),
        num_heads=heads,
        mlp_ratio=shapes["transformer_blocks.0.ff.net.0.proj.weight"][0] / dim,
        text_dim=shapes["caption_projection.linear_1.weight"][1],
        window=tuple(max(1, side // patch // 8) for side in (h, w)),
        shifted="transformer_blocks.0.attn3.to_q.weight" in shapes,
        position_scale=hints.position_scale or max(h // 64, 1),
    )


def released_defaults(system: str, config: PTDiTConfig) -> tuple[Part, Sampling]:
    """Rectified flow, whose network says x0 - eps; times are shifted by the resolution; 30 Euler steps at scale 4, as released."""
    half = config.out_channels == 2 * config.in_channels
    flow: dict[str, Any] = {"network_time": FLOW_TIME, "backward": True, "discard_half": half, "time_sampling": "logit_normal"}
    flow |= {"resolution": "sqrt", "base_area": 4096}  # 512 pixels
    sampling = Sampling(solver="euler", num_inference_steps=30, guidance={"scale": 4.0})
    return Part(name="flow", config=flow), sampling


def system_of(process: str, config: PTDiTConfig) -> str:
    """Which of ``SYSTEMS`` a network is."""
    return SYSTEMS[0]


def is_diffusers(values: Mapping[str, Any]) -> bool:
    """Whether this is the config.json of a PT-DiT: diffusers has none."""
    return False


def _none() -> NoReturn:
    raise DitkitError("diffusers has no PT-DiT", allowed="ditkit, official", hint="--to official")


def config_from_diffusers(values: Mapping[str, Any], where: str = "config.json", as_released: bool = False) -> PTDiTConfig:
    """Raises DitkitError: diffusers has no PT-DiT."""
    _none()


def config_to_diffusers(config: PTDiTConfig) -> dict[str, Any]:
    """Raises DitkitError: diffusers has no PT-DiT."""
    _none()


def diffusers_table(config: PTDiTConfig) -> Table:
    """The released layout: its names are in diffusers' style (LoRA files bear them)."""
    return official_table(config)


def differences(config: PTDiTConfig, to: Literal["official", "diffusers"]) -> list[str]:
    """What the other layout's code computes otherwise."""
    found = []
    if config.positions != "released" and config.input_size[-1] != config.input_size[-2]:
        found.append("the released code transposes positions on grids that are no squares")
    if config.proxy_how != "mean" or config.pool().groups != "strided" and max(config.proxies or (1,)) > 1:
        found.append("the released class has means over strided tokens as proxies")
    if config.mlp_ratio != 4.0:
        found.append(f"the released class has mlp_ratio 4, not {config.mlp_ratio}: it will not load these weights")
    return found


def has_live(config: Mapping[str, Any]) -> bool:
    """Whether diffusers computes such a network."""
    return False


def live_inputs(config: PTDiTConfig, batch: int, normal: Any, length: int = 6) -> tuple[dict[str, Any], dict[str, Any]]:
    """Raises DitkitError: diffusers has no PT-DiT."""
    _none()
