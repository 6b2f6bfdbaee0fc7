"""Hunyuan-DiT: the released layout and diffusers' HunyuanDiT2DModel, as tables.

What differs from ours: the patch projection is a convolution; diffusers splits q, k and v and has scale before shift in the head; the
released file calls the norm before the text "norm3" and that before the MLP "norm2".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ditkit.bundle import Part, Sampling
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError, WeightsError

from .hints import Hints, without_notes
from .schedulers import gaussian
from .tables import JOIN, SWAP, Convolution, Row, Table

if TYPE_CHECKING:
    import torch

    from ditkit.backbones.hunyuan import HunyuanConfig

Shape = tuple[int, ...]

CLASS = "HunyuanDiT2DModel"
PIPELINES = ("HunyuanDiTPipeline", "HunyuanDiTPAGPipeline")
INDEX_KEYS = (
    *("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    *("safety_checker", "feature_extractor", "requires_safety_checker"),
)
SYSTEMS = ("hunyuan-dit",)
LIVE_TIMES = (1, 250, 500, 996)  # exact in bf16, to which diffusers casts them

_BLOCK = "blocks.{i}"
_OFFICIAL = (
    Row("time.fc1", "t_embedder.mlp.0"),
    Row("time.fc2", "t_embedder.mlp.2"),
    Row("pool.positions", "pooler.positional_embedding", tensors=("",)),
    Row("pool.q", "pooler.q_proj"),
    Row("pool.kv", ("pooler.k_proj", "pooler.v_proj"), JOIN),
    Row("pool.proj", "pooler.c_proj"),
    Row("extra.fc1", "extra_embedder.0"),
    Row("extra.fc2", "extra_embedder.2"),
    Row("t5.fc1", "mlp_t5.0"),
    Row("t5.fc2", "mlp_t5.2"),
    Row("padding", "text_embedding_padding", tensors=("",)),
    Row(f"{_BLOCK}.norm1", f"{_BLOCK}.norm1"),
    Row(f"{_BLOCK}.ada", f"{_BLOCK}.default_modulation.1"),
    Row(f"{_BLOCK}.qkv", f"{_BLOCK}.attn1.Wqkv"),
    Row(f"{_BLOCK}.q_norm", f"{_BLOCK}.attn1.q_norm"),
    Row(f"{_BLOCK}.k_norm", f"{_BLOCK}.attn1.k_norm"),
    Row(f"{_BLOCK}.proj", f"{_BLOCK}.attn1.out_proj"),
    Row(f"{_BLOCK}.norm2", f"{_BLOCK}.norm3"),
    Row(f"{_BLOCK}.cross.q", f"{_BLOCK}.attn2.q_proj"),
    Row(f"{_BLOCK}.cross.kv", f"{_BLOCK}.attn2.kv_proj"),
    Row(f"{_BLOCK}.cross.q_norm", f"{_BLOCK}.attn2.q_norm"),
    Row(f"{_BLOCK}.cross.k_norm", f"{_BLOCK}.attn2.k_norm"),
    Row(f"{_BLOCK}.cross.proj", f"{_BLOCK}.attn2.out_proj"),
    Row(f"{_BLOCK}.norm3", f"{_BLOCK}.norm2"),
    Row(f"{_BLOCK}.mlp.fc1", f"{_BLOCK}.mlp.fc1"),
    Row(f"{_BLOCK}.mlp.fc2", f"{_BLOCK}.mlp.fc2"),
    Row("final.ada", "final_layer.adaLN_modulation.1"),
    Row("final.proj", "final_layer.linear"),
)
_EXTRA = "time_extra_emb"
_DIFFUSERS = (
    Row("time.fc1", f"{_EXTRA}.timestep_embedder.linear_1"),
    Row("time.fc2", f"{_EXTRA}.timestep_embedder.linear_2"),
    Row("pool.positions", f"{_EXTRA}.pooler.positional_embedding", tensors=("",)),
    Row("pool.q", f"{_EXTRA}.pooler.q_proj"),
    Row("pool.kv", (f"{_EXTRA}.pooler.k_proj", f"{_EXTRA}.pooler.v_proj"), JOIN),
    Row("pool.proj", f"{_EXTRA}.pooler.c_proj"),
    Row("extra.fc1", f"{_EXTRA}.extra_embedder.linear_1"),
    Row("extra.fc2", f"{_EXTRA}.extra_embedder.linear_2"),
    Row("t5.fc1", "text_embedder.linear_1"),
    Row("t5.fc2", "text_embedder.linear_2"),
    Row("padding", "text_embedding_padding", tensors=("",)),
    Row(f"{_BLOCK}.norm1", f"{_BLOCK}.norm1.norm"),
    Row(f"{_BLOCK}.ada", f"{_BLOCK}.norm1.linear"),
    Row(f"{_BLOCK}.qkv", tuple(f"{_BLOCK}.attn1.to_{x}" for x in "qkv"), JOIN),
    Row(f"{_BLOCK}.q_norm", f"{_BLOCK}.attn1.norm_q"),
    Row(f"{_BLOCK}.k_norm", f"{_BLOCK}.attn1.norm_k"),
    Row(f"{_BLOCK}.proj", f"{_BLOCK}.attn1.to_out.0"),
    Row(f"{_BLOCK}.norm2", f"{_BLOCK}.norm2"),
    Row(f"{_BLOCK}.cross.q", f"{_BLOCK}.attn2.to_q"),
    Row(f"{_BLOCK}.cross.kv", tuple(f"{_BLOCK}.attn2.to_{x}" for x in "kv"), JOIN),
    Row(f"{_BLOCK}.cross.q_norm", f"{_BLOCK}.attn2.norm_q"),
    Row(f"{_BLOCK}.cross.k_norm", f"{_BLOCK}.attn2.norm_k"),
    Row(f"{_BLOCK}.cross.proj", f"{_BLOCK}.attn2.to_out.0"),
    Row(f"{_BLOCK}.norm3", f"{_BLOCK}.norm3"),
    Row(f"{_BLOCK}.mlp.fc1", f"{_BLOCK}.ff.net.0.proj"),
    Row(f"{_BLOCK}.mlp.fc2", f"{_BLOCK}.ff.net.2"),
    Row("final.ada", "norm_out.linear", SWAP),
    Row("final.proj", "proj_out"),
)
_STYLE = {"official": "style_embedder.weight", "diffusers": f"{_EXTRA}.style_embedder.weight"}


def official_table(config: HunyuanConfig) -> Table:
    """The released layout of this network."""
    return Table((_patch(config, "x_embedder.proj"), *_OFFICIAL, *_more(config, "official")), config.depth, {})


def diffusers_table(config: HunyuanConfig) -> Table:
    """The layout of diffusers' HunyuanDiT2DModel for this shape."""
    return Table((_patch(config, "pos_embed.proj"), *_DIFFUSERS, *_more(config, "diffusers")), config.depth, {})


def _patch(config: HunyuanConfig, theirs: str) -> Row:
    return Row("patch_embed", theirs, Convolution(config.patch_size, config.patch_size))


def _more(config: HunyuanConfig, layout: str) -> Iterator[Row]:
    """What only some networks and blocks have."""
    if config.size_and_style:
        yield Row("style", _STYLE[layout], tensors=("",))
    for _, i in config.long_skips():
        yield Row(f"blocks.{i}.skip", f"blocks.{i}.skip_linear")
        yield Row(f"blocks.{i}.skip_norm", f"blocks.{i}.skip_norm")


class Ours(Config):
    """What no other layout can say."""

    input_size: tuple[int, int] | None = Field(None, description="where it is no square")
    skips: tuple[tuple[int, int], ...] | None = None
    position_base: int | None = None


class Constructor(Config):
    """Arguments of the released ``HunYuanDiT`` class, those that its ``args`` hold included."""

    input_size: tuple[int, int] = (128, 128)
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1408
    depth: int = 40
    num_heads: int = 16
    mlp_ratio: float = 4.3637
    learn_sigma: bool = True
    text_states_dim: int = 1024
    text_states_dim_t5: int = 2048
    text_len: int = 77
    text_len_t5: int = 256
    pooled_dim: int = Field(1024, description="fixed in the released class")
    use_style_cond: bool = Field(False, description="and sizes: up to version 1.1")

    def to_ours(self, ours: Ours | None = None) -> HunyuanConfig:
        """The same shape in our words."""
        from ditkit.backbones.hunyuan import HunyuanConfig

        more = ours or Ours()
        return HunyuanConfig(
            input_size=more.input_size or self.input_size,
            in_channels=self.in_channels,
            out_channels=self.in_channels * (1 + self.learn_sigma),
            patch_size=self.patch_size,
            dim=self.hidden_size,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            skips=more.skips,
            text_dim=self.text_states_dim,
            text_length=self.text_len,
            t5_dim=self.text_states_dim_t5,
            t5_length=self.text_len_t5,
            pooled_dim=self.pooled_dim,
            size_and_style=self.use_style_cond,
            position_base=more.position_base or _base(self.patch_size),
        )


def _base(patch: int) -> int:
    """512 pixels in tokens, the square that diffusers' and the released samplers fit positions into."""
    return max(1, 64 // patch)


def constructor_of(config: HunyuanConfig) -> Constructor:
    """Our configuration as arguments of the released class."""
    return Constructor(
        input_size=config.input_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        learn_sigma=_learn_sigma(config),
        text_states_dim=config.text_dim,
        text_states_dim_t5=config.t5_dim,
        text_len=config.text_length,
        text_len_t5=config.t5_length,
        pooled_dim=config.pooled_dim,
        use_style_cond=config.size_and_style,
    )


def _learn_sigma(config: HunyuanConfig) -> bool:
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise DitkitError(f"out_channels is {config.out_channels}", allowed=f"{config.in_channels} or {2 * config.in_channels}")
    return config.out_channels == 2 * config.in_channels


def ours_of(config: HunyuanConfig) -> Ours:
    """What no other layout can say."""
    h, w = config.input_size
    base = None if config.position_base == _base(config.patch_size) else config.position_base
    return Ours(input_size=None if h == w else (h, w), skips=config.skips, position_base=base)


def is_official(names: Mapping[str, Any]) -> bool:
    """Whether these are the keys of a released Hunyuan-DiT."""
    return {"x_embedder.proj.weight", "mlp_t5.0.weight", "pooler.positional_embedding", "blocks.0.attn1.Wqkv.weight"} <= set(names)


def config_from_official(shapes: Mapping[str, Shape], hints: Hints, where: str = "the file") -> HunyuanConfig:
    """The configuration that a released file has, from its shapes; without an input size, that of 1024 pixels."""
    from ditkit.backbones.hunyuan import HunyuanConfig

    dim, channels, patch, _ = shapes["x_embedder.proj.weight"]
    hidden, t5_length = shapes["blocks.0.mlp.fc1.weight"][0], shapes["pooler.positional_embedding"][0] - 1
    return HunyuanConfig(
        input_size=hints.input_size or (128, 128),
        in_channels=channels,
        out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        patch_size=patch,
        dim=dim,
        depth=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        num_heads=dim // shapes["blocks.0.attn1.q_norm.weight"][0],
        mlp_ratio=4.3637 if int(dim * 4.3637) == hidden else (hidden + 0.5) / dim,
        text_dim=shapes["text_embedding_padding"][1],
        text_length=shapes["text_embedding_padding"][0] - t5_length,
        t5_dim=shapes["mlp_t5.0.weight"][1],
        t5_length=t5_length,
        pooled_dim=shapes["pooler.c_proj.weight"][0],
        size_and_style="style_embedder.weight" in shapes,
        position_base=_base(patch),
    )


def released_defaults(system: str, config: HunyuanConfig) -> tuple[Part, Sampling]:
    """v-prediction on a table of betas that ends at 0.03, from version 1.2 at 0.018; 50 steps of DDPM at scale 5."""
    end = 0.03 if config.size_and_style else 0.018
    process = gaussian(_learn_sigma(config), schedule="scaled_linear", beta_range=[0.00085, end], prediction="v")
    return process, Sampling(solver="ddpm", num_inference_steps=50, guidance={"scale": 5.0})


def system_of(process: str, config: HunyuanConfig) -> str:
    """Which of ``SYSTEMS`` a network is."""
    return SYSTEMS[0]


class DiffusersHunyuan(Config):
    """``config.json`` of HunyuanDiT2DModel. Fields of one allowed value are those that our network computes in no other way."""

    num_attention_heads: int = 16
    attention_head_dim: int = 88
    in_channels: int
    patch_size: int
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    sample_size: int = 32
    hidden_size: int = 1152
    num_layers: int = 28
    mlp_ratio: float = 4.0
    learn_sigma: bool = True
    cross_attention_dim: int = 1024
    norm_type: Literal["layer_norm"] = "layer_norm"
    cross_attention_dim_t5: int = 2048
    pooled_projection_dim: int = 1024
    text_len: int = 77
    text_len_t5: int = 256
    use_style_cond_and_image_meta_size: bool = True


def is_diffusers(values: Mapping[str, Any]) -> bool:
    """Whether this is the config.json of a Hunyuan-DiT."""
    return values.get("_class_name") == CLASS


def config_from_diffusers(values: Mapping[str, Any], where: str = "config.json", as_released: bool = False) -> HunyuanConfig:
    """diffusers' configuration in our words. Raises ConfigError for keys and values that we do not know.

    ``as_released`` changes nothing: diffusers computes Hunyuan-DiT as released.
    """
    from ditkit.backbones.hunyuan import HunyuanConfig

    cfg = DiffusersHunyuan.parse(without_notes(values), where)
    dim = cfg.num_attention_heads * cfg.attention_head_dim
    if cfg.hidden_size != dim:
        raise WeightsError(f"{where}: hidden_size is {cfg.hidden_size}", allowed=f"{dim}, the network's width")
    return HunyuanConfig(
        input_size=(cfg.sample_size, cfg.sample_size),
        in_channels=cfg.in_channels,
        out_channels=cfg.in_channels * (1 + cfg.learn_sigma),
        patch_size=cfg.patch_size,
        dim=dim,
        depth=cfg.num_layers,
        num_heads=cfg.num_attention_heads,
        mlp_ratio=cfg.mlp_ratio,
        text_dim=cfg.cross_attention_dim,
        text_length=cfg.text_len,
        t5_dim=cfg.cross_attention_dim_t5,
        t5_length=cfg.text_len_t5,
        pooled_dim=cfg.pooled_projection_dim,
        size_and_style=cfg.use_style_cond_and_image_meta_size,
        position_base=_base(cfg.patch_size),
    )


def config_to_diffusers(config: HunyuanConfig) -> dict[str, Any]:
    """Our configuration as diffusers' config.json. Raises DitkitError for networks that diffusers' Hunyuan-DiT cannot be."""
    if not has_live(config.to_dict()):
        raise DitkitError(
            f"input_size {config.input_size}, position_base {config.position_base}, skips {config.skips}",
            allowed=f"a square, {_base(config.patch_size)} and None: diffusers has no other",
            hint="--to official",
        )
    return dict(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_channels,
        patch_size=config.patch_size,
        sample_size=config.input_size[0],
        hidden_size=config.dim,
        num_layers=config.depth,
        mlp_ratio=config.mlp_ratio,
        learn_sigma=_learn_sigma(config),
        cross_attention_dim=config.text_dim,
        cross_attention_dim_t5=config.t5_dim,
        pooled_projection_dim=config.pooled_dim,
        text_len=config.text_length,
        text_len_t5=config.t5_length,
        use_style_cond_and_image_meta_size=config.size_and_style,
        activation_fn="gelu-approximate",
        _class_name=CLASS,
    )


def text_encoder(folder: Path, config: HunyuanConfig) -> Part:
    """CLIP and T5, as HunyuanDiTPipeline asks them."""
    return Part(name="hunyuan", config={"path": str(folder), "clip_length": config.text_length, "max_length": config.t5_length})


def differences(config: HunyuanConfig, to: Literal["official", "diffusers"]) -> list[str]:
    """What the other layout's code computes otherwise."""
    return [] if config.skips is None else ["the released class has other long skips: it will not load these weights"]


def has_live(config: Mapping[str, Any]) -> bool:
    """Whether diffusers computes such a network."""
    h, w = config["input_size"]
    return h == w and config.get("skips") is None and config.get("position_base", 32) == _base(config.get("patch_size", 2))


def live_inputs(config: HunyuanConfig, batch: int, normal: Any, length: int = 6) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Conditioning for our network, and the same for diffusers' call. ``normal(purpose, shape)`` draws; texts have the config's lengths."""
    import torch

    text, t5 = normal("text", (config.text_length, config.text_dim)), normal("t5", (config.t5_length, config.t5_dim))
    few = torch.arange(1, 1 + batch)[:, None]
    mask, t5_mask = (torch.arange(u.shape[1])[None] < few for u in (text, t5))
    ours = {"text": text, "mask": mask, "t5": t5, "t5_mask": t5_mask}
    theirs = {"encoder_hidden_states": text, "text_embedding_mask": mask, "encoder_hidden_states_t5": t5}
    theirs |= {"text_embedding_mask_t5": t5_mask, "image_rotary_emb": _rotary(config)}
    if config.size_and_style:
        ours["size"] = torch.tensor([[512, 384 + 8 * i, 256, 256, 8 * i, 0] for i in range(batch)]).float()
        theirs |= {"image_meta_size": ours["size"], "style": torch.zeros(batch, dtype=torch.int64)}
    return ours, theirs


def _rotary(config: HunyuanConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """As the pipeline makes it, of ``input_size``."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    grid = tuple(side // config.patch_size for side in config.input_size)
    region = get_resize_crop_region_for_grid(grid, config.position_base)
    return get_2d_rotary_pos_embed(config.dim // config.num_heads, region, grid)


def live_call(theirs: Any, x: torch.Tensor, t: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
    """diffusers computes the time code in the dtype of the time."""
    return theirs(x, timestep=t.to(x.dtype), **call).sample
