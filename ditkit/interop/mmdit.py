"""SD3 and SD3.5: the released layout (2403.03206, ``joint_blocks``) and diffusers' SD3Transformer2DModel, as tables.

What differs from ours: the patch projection is a convolution; diffusers splits qkv, and has scale before shift where a norm has
no gate (the final one, and the text's in the last block).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ditkit.bundle import Part, Sampling
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError, WeightsError

from .hints import Hints, without_notes
from .tables import JOIN, SAME, SWAP, Convolution, Row, Table

if TYPE_CHECKING:
    import torch

    from ditkit.backbones.mmdit import MMDiTConfig

Shape = tuple[int, ...]

CLASS = "SD3Transformer2DModel"
PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
INDEX_KEYS = (
    *("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("tokenizer", "tokenizer_2", "tokenizer_3", "image_encoder", "feature_extractor"),
)
SYSTEMS = ("sd3",)
FLOW_TIME = "thousand"

_OFFICIAL = (
    Row("time.fc1", "t_embedder.mlp.0"),
    Row("time.fc2", "t_embedder.mlp.2"),
    Row("pooled.fc1", "y_embedder.mlp.0"),
    Row("pooled.fc2", "y_embedder.mlp.2"),
    Row("text", "context_embedder"),
    Row("positions", "pos_embed", tensors=("",)),
    Row("final.ada", "final_layer.adaLN_modulation.1"),
    Row("final.proj", "final_layer.linear"),
)
_DIFFUSERS = (
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
    """The released layout of SD3 and SD3.5 for this shape; the files put "model.diffusion_model." before each name."""
    patch = Row("patch_embed", "x_embedder.proj", Convolution(config.patch_size, config.patch_size))
    blocks = [row for i in range(config.depth) for row in _official_block(config, i)]
    return Table((patch, *_OFFICIAL, *blocks), config.depth, {})


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
    return Table((patch, *_DIFFUSERS, *blocks), config.depth, {})


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
    """Whether these are the keys of a released SD3."""
    return {"x_embedder.proj.weight", "joint_blocks.0.context_block.attn.qkv.weight", "final_layer.linear.weight"} <= set(names)


class Ours(Config):
    """What no other layout can say."""

    dim: int = 1536
    num_heads: int = 24


class Constructor(Config):
    """Arguments of the released ``MMDiT`` class, with their defaults; its ``context_embedder_config`` as ``context_dim``.

    It has heads of 64, and as many as blocks.
    """

    input_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int | None = None
    depth: int = 24
    mlp_ratio: float = 4.0
    adm_in_channels: int = 2048
    context_dim: int = 4096
    pos_embed_max_size: int = 192
    qk_norm: Literal["rms"] | None = None
    x_block_self_attn_layers: tuple[int, ...] = ()

    def to_ours(self, ours: Ours | None = None) -> MMDiTConfig:
        """The same shape in our words."""
        from ditkit.backbones.mmdit import MMDiTConfig

        return MMDiTConfig(
            input_size=(self.input_size, self.input_size),
            in_channels=self.in_channels,
            out_channels=self.out_channels or self.in_channels,
            patch_size=self.patch_size,
            dim=ours.dim if ours else 64 * self.depth,
            depth=self.depth,
            num_heads=ours.num_heads if ours else self.depth,
            mlp_ratio=self.mlp_ratio,
            text_dim=self.context_dim,
            pooled_dim=self.adm_in_channels,
            position_size=self.pos_embed_max_size,
            qk_norm=self.qk_norm is not None,
            dual_attention=self.x_block_self_attn_layers,
        )


def constructor_of(config: MMDiTConfig) -> Constructor:
    """Our configuration as arguments of the released class. Raises DitkitError for networks that it cannot be."""
    h, w = config.input_size
    if h != w:
        raise DitkitError(f"input_size {config.input_size}", allowed="a square: the released code has no other", hint="--to ditkit")
    return Constructor(
        input_size=h,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        depth=config.depth,
        mlp_ratio=config.mlp_ratio,
        adm_in_channels=config.pooled_dim,
        context_dim=config.text_dim,
        pos_embed_max_size=config.position_size,
        qk_norm="rms" if config.qk_norm else None,
        x_block_self_attn_layers=config.dual_attention,
    )


def ours_of(config: MMDiTConfig) -> Ours:
    """What no other layout can say."""
    return Ours(dim=config.dim, num_heads=config.num_heads)


def released_defaults(system: str, config: MMDiTConfig) -> tuple[Part, Sampling]:
    """Rectified flow, times shifted by 3 (SD3, section 5.3.3); 28 Euler steps at guidance 7, as diffusers' pipeline."""
    process = Part(name="flow", config={"network_time": FLOW_TIME, "shift": 3.0, "time_sampling": "logit_normal"})
    return process, Sampling(solver="euler", num_inference_steps=28, guidance={"scale": 7.0})


def system_of(process: str, config: MMDiTConfig) -> str:
    """There is one."""
    return SYSTEMS[0]


def config_from_official(shapes: Mapping[str, Shape], hints: Hints, where: str = "the file") -> MMDiTConfig:
    """The configuration that a released file has, from its shapes.

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


def is_diffusers(values: Mapping[str, Any]) -> bool:
    """Whether this is the config.json of an SD3."""
    return values.get("_class_name") == CLASS


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
        _class_name=CLASS,
    )


def text_encoder(folder: Path, config: MMDiTConfig) -> Part:
    """Two CLIPs and T5, as StableDiffusion3Pipeline asks them. A folder without T5, which is large, is read without."""
    t5 = "text_encoder_3" if (folder / "text_encoder_3" / "config.json").is_file() else None
    return Part(name="sd3", config={"path": str(folder), "t5": t5, "dim": config.text_dim})


def differences(config: MMDiTConfig, to: Literal["official", "diffusers"]) -> list[str]:
    """What the other layout's code computes otherwise: nothing, but for heads that the released class cannot have."""
    if to == "official" and (config.dim, config.num_heads) != (64 * config.depth, config.depth):
        return ["the released class has heads of 64, as many as blocks: it will not load these weights"]
    return []


def has_live(config: Mapping[str, Any]) -> bool:
    """Whether diffusers computes such a network."""
    return len(set(config["input_size"])) == 1 and config.get("mlp_ratio", 4.0) == 4.0


def live_inputs(config: MMDiTConfig, batch: int, normal: Any, length: int = 6) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Conditioning for our network, and the same for diffusers' call. ``normal(purpose, shape)`` draws; ``length``: tokens of text."""
    text, pooled = normal("text", (length, config.text_dim)), normal("pooled", (config.pooled_dim,))
    return {"text": text, "pooled": pooled}, {"encoder_hidden_states": text, "pooled_projections": pooled}
