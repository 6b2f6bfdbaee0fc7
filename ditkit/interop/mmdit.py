"""SD3 and SD3.5: the released layout (2403.03206, ``joint_blocks``) and diffusers' SD3Transformer2DModel, as tables.

What differs from ours: the patch projection is a convolution; diffusers splits qkv, and has scale before shift where a norm has
no gate (the final one, and the text's in the last block).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ditkit.core.config import Config
from ditkit.core.errors import DitkitError, WeightsError

from .hints import Hints, without_notes
from .tables import JOIN, SAME, SWAP, Convolution, Row, Table

if TYPE_CHECKING:
    from ditkit.backbones.mmdit import MMDiTConfig

Shape = tuple[int, ...]

PREFIX = "model.diffusion_model."  # of the released files, which may hold a VAE and text encoders besides
OFFICIAL = (
    Row("time.fc1", "t_embedder.mlp.0"),
    Row("time.fc2", "t_embedder.mlp.2"),
    Row("pooled.fc1", "y_embedder.mlp.0"),
    Row("pooled.fc2", "y_embedder.mlp.2"),
    Row("text", "context_embedder"),
    Row("positions", "pos_embed", tensors=("",)),
    Row("final.ada", "final_layer.adaLN_modulation.1"),
    Row("final.proj", "final_layer.linear"),
)
DIFFUSERS = (
    Row("time.fc1", "time_text_embed.timestep_embedder.linear_1"),
    Row("time.fc2", "time_text_embed.timestep_embedder.linear_2"),
    Row("pooled.fc1", "time_text_embed.text_embedder.linear_1"),
    Row("pooled.fc2", "time_text_embed.text_embedder.linear_2"),
    Row("text", "context_embedder"),
    Row("positions", "pos_embed.pos_embed", tensors=("",)),
    Row("final.ada", "norm_out.linear", SWAP),
    Row("final.proj", "proj_out"),
)


def official_table(config: MMDiTConfig) -> Table:
    """The released layout of SD3 and SD3.5 for this shape, without ``PREFIX``."""
    patch = Row("patch_embed", "x_embedder.proj", Convolution(config.patch_size, config.patch_size))
    blocks = [row for i in range(config.depth) for row in _official_block(config, i)]
    return Table((patch, *OFFICIAL, *blocks), config.depth, {})


def _official_block(config: MMDiTConfig, i: int) -> Iterator[Row]:
    for stream, part in (("img", "x_block"), ("text", "context_block")):
        ours, theirs = f"blocks.{i}.parts.{stream}", f"joint_blocks.{i}.{part}"
        yield Row(f"{ours}.ada", f"{theirs}.adaLN_modulation.1")
        yield Row(f"{ours}.qkv", f"{theirs}.attn.qkv")
        if config.qk_norm:
            yield Row(f"{ours}.q_norm", f"{theirs}.attn.ln_q", tensors=("weight",))
            yield Row(f"{ours}.k_norm", f"{theirs}.attn.ln_k", tensors=("weight",))
        if stream == "img" or i < config.depth - 1:
            yield Row(f"{ours}.proj", f"{theirs}.attn.proj")
            yield Row(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1")
            yield Row(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2")
    if i in config.dual_attention:
        ours, theirs = f"blocks.{i}.parts.img", f"joint_blocks.{i}.x_block.attn2"
        yield Row(f"{ours}.qkv2", f"{theirs}.qkv")
        yield Row(f"{ours}.proj2", f"{theirs}.proj")
        if config.qk_norm:
            yield Row(f"{ours}.q_norm2", f"{theirs}.ln_q", tensors=("weight",))
            yield Row(f"{ours}.k_norm2", f"{theirs}.ln_k", tensors=("weight",))


def diffusers_table(config: MMDiTConfig) -> Table:
    """The layout of diffusers' SD3Transformer2DModel for this shape."""
    patch = Row("patch_embed", "pos_embed.proj", Convolution(config.patch_size, config.patch_size))
    blocks = [row for i in range(config.depth) for row in _diffusers_block(config, i)]
    return Table((patch, *DIFFUSERS, *blocks), config.depth, {})


def _diffusers_block(config: MMDiTConfig, i: int) -> Iterator[Row]:
    theirs, last = f"transformer_blocks.{i}", i == config.depth - 1
    names = {  # norm, q k v, norms of q and k, output projection, MLP
        "img": ("norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
        "text": ("norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out", "ff_context"),
    }
    for stream, (norm, qkv, norms, out, mlp) in names.items():
        ours, reads = f"blocks.{i}.parts.{stream}", last and stream == "text"
        yield Row(f"{ours}.ada", f"{theirs}.{norm}.linear", SWAP if reads else SAME)
        yield Row(f"{ours}.qkv", tuple(f"{theirs}.attn.{n}" for n in qkv), JOIN)
        if config.qk_norm:
            yield Row(f"{ours}.q_norm", f"{theirs}.attn.{norms[0]}", tensors=("weight",))
            yield Row(f"{ours}.k_norm", f"{theirs}.attn.{norms[1]}", tensors=("weight",))
        if not reads:
            yield Row(f"{ours}.proj", f"{theirs}.attn.{out}")
            yield Row(f"{ours}.mlp.fc1", f"{theirs}.{mlp}.net.0.proj")
            yield Row(f"{ours}.mlp.fc2", f"{theirs}.{mlp}.net.2")
    if i in config.dual_attention:
        ours = f"blocks.{i}.parts.img"
        yield Row(f"{ours}.qkv2", tuple(f"{theirs}.attn2.{n}" for n in ("to_q", "to_k", "to_v")), JOIN)
        yield Row(f"{ours}.proj2", f"{theirs}.attn2.to_out.0")
        if config.qk_norm:
            yield Row(f"{ours}.q_norm2", f"{theirs}.attn2.norm_q", tensors=("weight",))
            yield Row(f"{ours}.k_norm2", f"{theirs}.attn2.norm_k", tensors=("weight",))


def is_official(names: Mapping[str, Any]) -> bool:
    """Whether these are the keys of a released SD3, with or without ``PREFIX``."""
    found = {n.removeprefix(PREFIX) for n in names}
    return {"x_embedder.proj.weight", "joint_blocks.0.context_block.attn.qkv.weight", "final_layer.linear.weight"} <= found


def config_from_official(shapes: Mapping[str, Shape], hints: Hints, where: str = "the file") -> MMDiTConfig:
    """The configuration that a released file has, from its shapes (names without ``PREFIX``).

    Heads are 64 wide unless ``hints`` say otherwise or norms of queries show it; the trained grid is 64 patches a side, as released.
    """
    from ditkit.backbones.mmdit import MMDiTConfig

    dim, channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = len({name.split(".")[1] for name in shapes if name.startswith("joint_blocks.")})
    head = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", (64,))[0]
    side = round(shapes["pos_embed"][1] ** 0.5)
    if side**2 != shapes["pos_embed"][1] or dim % head and hints.num_heads is None:
        raise DitkitError(f"{where}: a position table of {shapes['pos_embed'][1]} rows, width {dim}", hint="give --num-heads")
    return MMDiTConfig(
        input_size=hints.input_size or (min(64, side) * patch,) * 2,
        in_channels=channels,
        out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        patch_size=patch,
        dim=dim,
        depth=depth,
        num_heads=hints.num_heads or dim // head,
        mlp_ratio=shapes["joint_blocks.0.x_block.mlp.fc1.weight"][0] / dim,
        text_dim=shapes["context_embedder.weight"][1],
        pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
        position_size=side,
        qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in shapes,
        dual_attention=tuple(i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes),
    )


class DiffusersSD3(Config):
    """``config.json`` of SD3Transformer2DModel. Fields of one allowed value are those that our network computes in no other way."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: Literal["rms_norm"] | None = None


def config_from_diffusers(values: Mapping[str, Any], where: str = "config.json", as_released: bool = False) -> MMDiTConfig:
    """diffusers' configuration in our words. Raises ConfigError for keys and values that we do not know.

    ``as_released`` changes nothing: diffusers computes SD3 as released.
    """
    from ditkit.backbones.mmdit import MMDiTConfig

    cfg = DiffusersSD3.parse(without_notes(values), where)
    dim = cfg.num_attention_heads * cfg.attention_head_dim
    if cfg.caption_projection_dim != dim:
        raise WeightsError(f"{where}: caption_projection_dim is {cfg.caption_projection_dim}", allowed=f"{dim}, the network's width")
    return MMDiTConfig(
        input_size=(cfg.sample_size, cfg.sample_size),
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels or cfg.in_channels,
        patch_size=cfg.patch_size,
        dim=dim,
        depth=cfg.num_layers,
        num_heads=cfg.num_attention_heads,
        text_dim=cfg.joint_attention_dim,
        pooled_dim=cfg.pooled_projection_dim,
        position_size=cfg.pos_embed_max_size,
        qk_norm=cfg.qk_norm is not None,
        dual_attention=cfg.dual_attention_layers,
    )


def config_to_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    """Our configuration as diffusers' config.json. Raises DitkitError for shapes that diffusers' SD3 cannot have."""
    h, w = config.input_size
    if h != w or config.mlp_ratio != 4.0:
        raise DitkitError(
            f"input_size {config.input_size}, mlp_ratio {config.mlp_ratio}",
            allowed="a square and 4.0: diffusers' SD3 has no other",
            hint="--to official",
        )
    return dict(
        sample_size=h,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=config.dim // config.num_heads,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.text_dim,
        caption_projection_dim=config.dim,
        pooled_projection_dim=config.pooled_dim,
        out_channels=config.out_channels,
        pos_embed_max_size=config.position_size,
        dual_attention_layers=list(config.dual_attention),
        qk_norm="rms_norm" if config.qk_norm else None,
        _class_name="SD3Transformer2DModel",
    )
