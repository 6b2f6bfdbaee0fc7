"""FLUX.1: the released layout (``double_blocks``, ``single_blocks``) and diffusers' FluxTransformer2DModel, as tables.

What differs from ours: the released code and diffusers are given packed patches, so that their channels are ours times four;
diffusers splits qkv, and in single blocks the MLP's first half too; its final norm has scale before shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ditkit.core.config import Config
from ditkit.core.errors import DitkitError, WeightsError

from .hints import Hints, without_notes
from .tables import JOIN, SWAP, Pieces, Row, Table

if TYPE_CHECKING:
    from ditkit.backbones.flux import FluxConfig

Shape = tuple[int, ...]

EMBEDDERS = {"time": ("time_in", "timestep"), "pooled": ("vector_in", "text"), "guidance": ("guidance_in", "guidance")}


def official_table(config: FluxConfig) -> Table:
    """The released layout of FLUX.1 for this shape."""
    rows = [
        Row("patch_embed", "img_in"),
        Row("text", "txt_in"),
        Row("final.ada", "final_layer.adaLN_modulation.1"),
        Row("final.proj", "final_layer.linear"),
    ]
    for ours, (theirs, _) in EMBEDDERS.items():
        if ours != "guidance" or config.guidance:
            rows += [Row(f"{ours}.fc1", f"{theirs}.in_layer"), Row(f"{ours}.fc2", f"{theirs}.out_layer")]
    rows += [row for i in range(config.depth) for row in _official_double(i)]
    rows += [row for i in range(config.single_depth) for row in _official_single(f"blocks.{config.depth + i}", f"single_blocks.{i}")]
    return Table(rows, config.depth + config.single_depth, {})


def _official_double(i: int) -> Iterator[Row]:
    for stream, name in (("img", "img"), ("text", "txt")):
        ours, theirs = f"blocks.{i}.parts.{stream}", f"double_blocks.{i}.{name}"
        yield Row(f"{ours}.ada", f"{theirs}_mod.lin")
        yield Row(f"{ours}.qkv", f"{theirs}_attn.qkv")
        yield Row(f"{ours}.q_norm.weight", f"{theirs}_attn.norm.query_norm.scale", tensors=("",))
        yield Row(f"{ours}.k_norm.weight", f"{theirs}_attn.norm.key_norm.scale", tensors=("",))
        yield Row(f"{ours}.proj", f"{theirs}_attn.proj")
        yield Row(f"{ours}.mlp.fc1", f"{theirs}_mlp.0")
        yield Row(f"{ours}.mlp.fc2", f"{theirs}_mlp.2")


def _official_single(ours: str, theirs: str) -> Iterator[Row]:
    yield Row(f"{ours}.ada", f"{theirs}.modulation.lin")
    yield Row(f"{ours}.fc1", f"{theirs}.linear1")
    yield Row(f"{ours}.fc2", f"{theirs}.linear2")
    yield Row(f"{ours}.q_norm.weight", f"{theirs}.norm.query_norm.scale", tensors=("",))
    yield Row(f"{ours}.k_norm.weight", f"{theirs}.norm.key_norm.scale", tensors=("",))


def diffusers_table(config: FluxConfig) -> Table:
    """The layout of diffusers' FluxTransformer2DModel for this shape."""
    rows = [
        Row("patch_embed", "x_embedder"),
        Row("text", "context_embedder"),
        Row("final.ada", "norm_out.linear", SWAP),
        Row("final.proj", "proj_out"),
    ]
    for ours, (_, theirs) in EMBEDDERS.items():
        if ours != "guidance" or config.guidance:
            rows += [Row(f"{ours}.fc{n}", f"time_text_embed.{theirs}_embedder.linear_{n}") for n in (1, 2)]
    rows += [row for i in range(config.depth) for row in _diffusers_double(i)]
    d, hidden = config.dim, int(config.dim * config.mlp_ratio)
    for i in range(config.single_depth):
        rows += _diffusers_single(f"blocks.{config.depth + i}", f"single_transformer_blocks.{i}", Pieces(d, d, d, hidden))
    return Table(rows, config.depth + config.single_depth, {})


def _diffusers_double(i: int) -> Iterator[Row]:
    names = {  # norm, q k v, norms of q and k, output projection, MLP
        "img": ("norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
        "text": ("norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out", "ff_context"),
    }
    for stream, (norm, qkv, norms, out, mlp) in names.items():
        ours, theirs = f"blocks.{i}.parts.{stream}", f"transformer_blocks.{i}"
        yield Row(f"{ours}.ada", f"{theirs}.{norm}.linear")
        yield Row(f"{ours}.qkv", tuple(f"{theirs}.attn.{n}" for n in qkv), JOIN)
        yield Row(f"{ours}.q_norm", f"{theirs}.attn.{norms[0]}", tensors=("weight",))
        yield Row(f"{ours}.k_norm", f"{theirs}.attn.{norms[1]}", tensors=("weight",))
        yield Row(f"{ours}.proj", f"{theirs}.attn.{out}")
        yield Row(f"{ours}.mlp.fc1", f"{theirs}.{mlp}.net.0.proj")
        yield Row(f"{ours}.mlp.fc2", f"{theirs}.{mlp}.net.2")


def _diffusers_single(ours: str, theirs: str, pieces: Pieces) -> Iterator[Row]:
    yield Row(f"{ours}.ada", f"{theirs}.norm.linear")
    yield Row(f"{ours}.fc1", (*(f"{theirs}.attn.{n}" for n in ("to_q", "to_k", "to_v")), f"{theirs}.proj_mlp"), pieces)
    yield Row(f"{ours}.fc2", f"{theirs}.proj_out")
    yield Row(f"{ours}.q_norm", f"{theirs}.attn.norm_q", tensors=("weight",))
    yield Row(f"{ours}.k_norm", f"{theirs}.attn.norm_k", tensors=("weight",))


def is_official(names: Mapping[str, Any]) -> bool:
    """Whether these are the keys of a released FLUX.1."""
    return {"img_in.weight", "double_blocks.0.img_attn.qkv.weight", "final_layer.linear.weight"} <= set(names)


def config_from_official(shapes: Mapping[str, Shape], hints: Hints, where: str = "the file") -> FluxConfig:
    """The configuration that a released file has, from its shapes. Rotary widths are 1/8, 7/16 and 7/16 of a head, patches 2 x 2."""
    from ditkit.backbones.flux import FluxConfig

    dim, packed = shapes["img_in.weight"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    return FluxConfig(
        input_size=hints.input_size or (128, 128),
        in_channels=_unpacked(packed, where),
        out_channels=_unpacked(shapes["final_layer.linear.weight"][0], where),
        dim=dim,
        depth=_count(shapes, "double_blocks."),
        single_depth=_count(shapes, "single_blocks."),
        num_heads=dim // head,
        mlp_ratio=shapes["double_blocks.0.img_mlp.0.weight"][0] / dim,
        text_dim=shapes["txt_in.weight"][1],
        pooled_dim=shapes["vector_in.in_layer.weight"][1],
        rope_widths=(head // 8, (head - head // 8) // 2, (head - head // 8) // 2),
        guidance="guidance_in.in_layer.weight" in shapes,
    )


def _count(shapes: Mapping[str, Shape], prefix: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(prefix)})


def _unpacked(channels: int, where: str) -> int:
    if channels % 4:
        raise DitkitError(f"{where}: {channels} channels of packed patches", allowed="multiples of 4: FLUX packs patches of 2 x 2")
    return channels // 4


class DiffusersFlux(Config):
    """``config.json`` of FluxTransformer2DModel. Fields of one allowed value are those that our network computes in no other way."""

    patch_size: Literal[1] = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)


class Ours(Config):
    """What no other layout can say; our exports leave it in a place that others ignore (``_ditkit`` in diffusers' config.json)."""

    input_size: tuple[int, int] = Field((128, 128), description="height and width of the training data, in latent pixels")


def config_from_diffusers(values: Mapping[str, Any], where: str = "config.json", as_released: bool = False) -> FluxConfig:
    """diffusers' configuration in our words. Raises ConfigError for keys and values that we do not know.

    ``as_released`` changes nothing: diffusers computes FLUX as released.
    """
    from ditkit.backbones.flux import FluxConfig

    cfg = DiffusersFlux.parse(without_notes(values, "_ditkit"), where)
    ours = Ours.parse(values.get("_ditkit", {}), f"{where}: _ditkit")
    return FluxConfig(
        input_size=ours.input_size,
        in_channels=_unpacked(cfg.in_channels, where),
        out_channels=_unpacked(cfg.out_channels or cfg.in_channels, where),
        dim=cfg.num_attention_heads * cfg.attention_head_dim,
        depth=cfg.num_layers,
        single_depth=cfg.num_single_layers,
        num_heads=cfg.num_attention_heads,
        text_dim=cfg.joint_attention_dim,
        pooled_dim=cfg.pooled_projection_dim,
        rope_widths=cfg.axes_dims_rope,
        guidance=cfg.guidance_embeds,
    )


def config_to_diffusers(config: FluxConfig) -> dict[str, Any]:
    """Our configuration as diffusers' config.json. Raises WeightsError for shapes that diffusers' FLUX cannot have."""
    if config.patch_size != 2 or config.mlp_ratio != 4.0:
        raise WeightsError(
            f"patch_size {config.patch_size}, mlp_ratio {config.mlp_ratio}",
            allowed="2 and 4.0: diffusers' FLUX has no other",
            hint="--to ditkit",
        )
    return dict(
        patch_size=1,
        in_channels=4 * config.in_channels,
        out_channels=4 * config.out_channels,
        num_layers=config.depth,
        num_single_layers=config.single_depth,
        attention_head_dim=config.dim // config.num_heads,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.text_dim,
        pooled_projection_dim=config.pooled_dim,
        guidance_embeds=config.guidance,
        axes_dims_rope=list(config.rope_widths),
        _class_name="FluxTransformer2DModel",
        **({} if config.input_size == (128, 128) else {"_ditkit": ours_of(config).to_dict()}),
    )


def ours_of(config: FluxConfig) -> Ours:
    """What no other layout can say."""
    return Ours(input_size=config.input_size)
