"""PixArt-alpha and -Sigma: the released layout and diffusers' PixArtTransformer2DModel, as tables.

What differs from ours: the released file stores the position table (not always) and the null caption; the patch projection is a
convolution; diffusers splits q, k and v, has no null caption, and no place for compressed keys, which get names of our own there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ditkit.bundle import Part, Sampling
from ditkit.core.config import Config, read_data
from ditkit.core.errors import DitkitError, WeightsError

from .hints import Hints, without_notes
from .schedulers import gaussian
from .tables import JOIN, Convolution, Derived, Row, Table

if TYPE_CHECKING:
    import torch

    from ditkit.backbones.pixart import PixArtConfig

Shape = tuple[int, ...]

CLASS = "PixArtTransformer2DModel"
PIPELINES = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
INDEX_KEYS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
SYSTEMS = ("pixart-alpha", "pixart-sigma")

_BLOCK, _THEIR_BLOCK = "blocks.{i}", "transformer_blocks.{i}"
OFFICIAL = (
    Row("time.fc1", "t_embedder.mlp.0"),
    Row("time.fc2", "t_embedder.mlp.2"),
    Row("modulation.proj", "t_block.1"),
    Row("caption.fc1", "y_embedder.y_proj.fc1"),
    Row("caption.fc2", "y_embedder.y_proj.fc2"),
    Row(f"{_BLOCK}.table", f"{_BLOCK}.scale_shift_table", tensors=("",)),
    Row(f"{_BLOCK}.attn.qkv", f"{_BLOCK}.attn.qkv"),
    Row(f"{_BLOCK}.attn.proj", f"{_BLOCK}.attn.proj"),
    Row(f"{_BLOCK}.cross.q", f"{_BLOCK}.cross_attn.q_linear"),
    Row(f"{_BLOCK}.cross.kv", f"{_BLOCK}.cross_attn.kv_linear"),
    Row(f"{_BLOCK}.cross.proj", f"{_BLOCK}.cross_attn.proj"),
    Row(f"{_BLOCK}.mlp.fc1", f"{_BLOCK}.mlp.fc1"),
    Row(f"{_BLOCK}.mlp.fc2", f"{_BLOCK}.mlp.fc2"),
    Row("final.table", "final_layer.scale_shift_table", tensors=("",)),
    Row("final.proj", "final_layer.linear"),
)
DIFFUSERS = (
    Row("time.fc1", "adaln_single.emb.timestep_embedder.linear_1"),
    Row("time.fc2", "adaln_single.emb.timestep_embedder.linear_2"),
    Row("modulation.proj", "adaln_single.linear"),
    Row("caption.fc1", "caption_projection.linear_1"),
    Row("caption.fc2", "caption_projection.linear_2"),
    Row(f"{_BLOCK}.table", f"{_THEIR_BLOCK}.scale_shift_table", tensors=("",)),
    Row(f"{_BLOCK}.attn.qkv", tuple(f"{_THEIR_BLOCK}.attn1.to_{x}" for x in "qkv"), JOIN),
    Row(f"{_BLOCK}.attn.proj", f"{_THEIR_BLOCK}.attn1.to_out.0"),
    Row(f"{_BLOCK}.cross.q", f"{_THEIR_BLOCK}.attn2.to_q"),
    Row(f"{_BLOCK}.cross.kv", tuple(f"{_THEIR_BLOCK}.attn2.to_{x}" for x in "kv"), JOIN),
    Row(f"{_BLOCK}.cross.proj", f"{_THEIR_BLOCK}.attn2.to_out.0"),
    Row(f"{_BLOCK}.mlp.fc1", f"{_THEIR_BLOCK}.ff.net.0.proj"),
    Row(f"{_BLOCK}.mlp.fc2", f"{_THEIR_BLOCK}.ff.net.2"),
    Row("final.table", "scale_shift_table", tensors=("",)),
    Row("final.proj", "proj_out"),
)
_OPTIONAL = {  # ours: official, diffusers (those of one block are ours there)
    "size": ("csize_embedder.mlp.{}", "adaln_single.emb.resolution_embedder.linear_{}"),
    "aspect": ("ar_embedder.mlp.{}", "adaln_single.emb.aspect_ratio_embedder.linear_{}"),
}
_HEADS = {(28, 1152): 16}  # (depth, dim) of the published size


def official_table(config: PixArtConfig) -> Table:
    """The released layout for this shape. Its position table may be absent, and is that of ``input_size``."""
    from ditkit.nn.positions import sincos_table, stretched

    h, w = (side // config.patch_size for side in config.input_size)
    axes = stretched((h, w), config.position_base, config.position_scale)
    positions = Derived(lambda: sincos_table(config.dim, axes), tolerance=2e-5, optional=True)  # theirs has float32 places
    null = [Row("null_text", "y_embedder.y_embedding", tensors=("",))] if config.null_caption else []
    return Table((_patch(config, "x_embedder.proj"), *OFFICIAL, *null, *_more(config, 0)), config.depth, {"pos_embed": positions})


def diffusers_table(config: PixArtConfig) -> Table:
    """The layout of diffusers' PixArtTransformer2DModel for this shape, which leaves the null caption out."""
    dropped = frozenset({"null_text"}) if config.null_caption else frozenset()
    return Table((_patch(config, "pos_embed.proj"), *DIFFUSERS, *_more(config, 1)), config.depth, {}, dropped)


def _patch(config: PixArtConfig, theirs: str) -> Row:
    return Row("patch_embed", theirs, Convolution(config.patch_size, config.patch_size))


def _more(config: PixArtConfig, layout: int) -> Iterator[Row]:
    """What only some of the networks have; ``layout``: 0 official, 1 diffusers."""
    for name, theirs in _OPTIONAL.items() if config.micro_conditions else ():
        for i, number in enumerate(((0, 2), (1, 2))[layout], 1):
            yield Row(f"micro.{name}.fc{i}", theirs[layout].format(number))
    attention = (f"{_BLOCK}.attn", f"{_THEIR_BLOCK}.attn1")[layout]
    for norm in ("q_norm", "k_norm") if config.qk_norm else ():
        yield Row(f"{_BLOCK}.attn.{norm}", f"{attention}.{norm}")
    for i in config.kv_blocks if config.kv_how == "conv" else ():
        for ours, theirs in (("conv", ("sr", "kv_down.conv")), ("norm", ("norm", "kv_down.norm"))):
            yield Row(f"blocks.{i}.attn.down.{ours}", f"{attention}.{theirs[layout]}".replace("{i}", str(i)))


class Compression(Config):
    """``kv_compress_config`` of the released Sigma class."""

    sampling: Literal["conv", "ave", "uniform", "uniform_every"] | None = None
    scale_factor: int = Field(1, ge=1)
    kv_compress_layer: tuple[int, ...] = ()


_SAME = ("in_channels", "patch_size", "depth", "num_heads", "mlp_ratio", "qk_norm")  # the same names there and here
_HOW: dict[str | None, Literal["conv", "first", "every"]] = {"ave": "first", "uniform": "first", "uniform_every": "every"}


class Ours(Config):
    """What no other layout can say; our exports leave it in a place that others ignore (``_ditkit`` in diffusers' config.json)."""

    text_length: int = 120
    null_caption: bool = False
    null_tokens: int | None = None
    qk_norm: bool = False
    kv_ratio: int = 1
    kv_blocks: tuple[int, ...] = ()
    kv_how: Literal["conv", "first", "every"] = "conv"


class Constructor(Config):
    """Arguments of the released ``PixArt`` and ``PixArtMS`` classes of both repositories, with their defaults."""

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    pred_sigma: Literal[True] = True
    drop_path: float = 0.0
    caption_channels: int = 4096
    model_max_length: int = 120
    lewei_scale: float | None = Field(None, description="alpha's name of the position scale")
    pe_interpolation: float | None = Field(None, description="Sigma's name of it")
    micro_condition: bool = Field(False, description="Sigma's flag; alpha's PixArtMS always has them")
    qk_norm: bool = False
    kv_compress_config: Compression | None = None

    def to_ours(self, ours: Ours | None = None) -> PixArtConfig:
        """The same shape in our words."""
        from ditkit.backbones.pixart import PixArtConfig

        told, kv = ours or Ours(null_caption=True), self.kv_compress_config or Compression()
        compressed = kv.sampling is not None and kv.scale_factor > 1 and bool(kv.kv_compress_layer)
        return PixArtConfig(
            input_size=(self.input_size, self.input_size),
            out_channels=2 * self.in_channels,
            dim=self.hidden_size,
            text_dim=self.caption_channels,
            text_length=self.model_max_length,
            null_caption=told.null_caption,
            null_tokens=told.null_tokens,
            micro_conditions=self.micro_condition,
            position_base=self.input_size // self.patch_size,
            position_scale=self.lewei_scale or self.pe_interpolation or 1.0,
            kv_ratio=kv.scale_factor if compressed else 1,
            kv_blocks=kv.kv_compress_layer if compressed else (),
            kv_how=_HOW.get(kv.sampling, "conv"),
            **{name: getattr(self, name) for name in _SAME},
        )


def constructor_of(config: PixArtConfig) -> Constructor:
    """Our configuration as arguments of the released classes. Raises DitkitError for networks that they cannot be."""
    side = _square(config)
    if config.out_channels != 2 * config.in_channels:
        raise DitkitError(f"out_channels is {config.out_channels}", allowed=f"{2 * config.in_channels}: the released code has no other")
    sampling: Any = {"conv": "conv", "first": "uniform", "every": "uniform_every"}[config.kv_how]
    compression = Compression(sampling=sampling, scale_factor=config.kv_ratio, kv_compress_layer=config.kv_blocks)
    return Constructor(
        input_size=side,
        hidden_size=config.dim,
        caption_channels=config.text_dim,
        model_max_length=config.text_length,
        pe_interpolation=config.position_scale,
        micro_condition=config.micro_conditions,
        kv_compress_config=compression if config.kv_blocks else None,
        **{name: getattr(config, name) for name in _SAME},
    )


def _square(config: PixArtConfig) -> int:
    h, w = config.input_size
    if h != w or config.position_base != h // config.patch_size:
        raise DitkitError(
            f"input_size {config.input_size}, position_base {config.position_base}",
            allowed="a square, and its side in tokens: other layouts have no other",
            hint="--to ditkit",
        )
    return h


def ours_of(config: PixArtConfig) -> Ours:
    """What no other layout can say."""
    return Ours(**{name: getattr(config, name) for name in Ours.model_fields})


def is_official(names: Mapping[str, Any]) -> bool:
    """Whether these are the keys of a released PixArt."""
    return {"x_embedder.proj.weight", "t_block.1.weight", "y_embedder.y_proj.fc1.weight", "final_layer.scale_shift_table"} <= set(names)


def config_from_official(shapes: Mapping[str, Shape], hints: Hints, where: str = "the file") -> PixArtConfig:
    """The configuration that a released file has, from its shapes; what they do not show comes from ``hints``.

    The position scale is that of the released checkpoint of this size: side / 64, but 1 for alpha (whose captions have 120 tokens) at
    256 pixels. A stored position table is checked against it.

    Raises:
        DitkitError: the number of heads is not that of a published size and not given, or nothing says the input size.
    """
    from ditkit.backbones.pixart import PixArtConfig

    dim, channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    heads = hints.num_heads or _HEADS.get((depth, dim))
    if heads is None:
        raise DitkitError(f"{where}: {depth} blocks of width {dim} are no published size", hint="give --num-heads")
    side = round(shapes["pos_embed"][1] ** 0.5) * patch if "pos_embed" in shapes else None
    size = hints.input_size or (side and (side, side))
    if size is None:
        raise DitkitError(f"{where} holds no position table that would say the input size", hint="give --input-size, in latent pixels")
    null = shapes.get("y_embedder.y_embedding")
    length = null[0] if null else 300 if hints.system == "pixart-sigma" else 120
    usual = 1.0 if length <= 120 and size[0] <= 32 else size[0] / 64
    conv = {int(n.split(".")[1]): s[-1] for n, s in shapes.items() if n.endswith(".attn.sr.weight")}
    return PixArtConfig(
        input_size=size,
        in_channels=channels,
        out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        patch_size=patch,
        dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / dim if depth else 4.0,
        text_dim=shapes["y_embedder.y_proj.fc1.weight"][1],
        text_length=length,
        null_caption=null is not None,
        micro_conditions="csize_embedder.mlp.0.weight" in shapes,
        position_base=size[0] // patch,
        position_scale=hints.position_scale or usual,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        kv_ratio=max(conv.values(), default=1),
        kv_blocks=tuple(sorted(conv)),
    )


def released_defaults(system: str, config: PixArtConfig) -> tuple[Part, Sampling]:
    """Process and sampler of the released demo: 20 steps of DPM-Solver++ 2M over evenly spaced times, scale 4.5 on all channels."""
    options = {"spacing": "uniform", "lower_order_below": 10}
    sampling = Sampling(solver="dpm++2m", num_inference_steps=20, guidance={"scale": 4.5}, options=options)
    return gaussian(config.out_channels == 2 * config.in_channels), sampling


def system_of(process: str, config: PixArtConfig) -> str:
    """Which of ``SYSTEMS`` a model is: Sigma reads more than 120 tokens."""
    return SYSTEMS[config.text_length > 120]


class DiffusersPixArt(Config):
    """``config.json`` of PixArtTransformer2DModel, and of Transformer2DModel as older files have it.

    Fields of one allowed value are those that our network computes in no other way.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32
    cross_attention_dim: int | None = 1152
    attention_bias: Literal[True] = True
    sample_size: int = 128
    patch_size: int = 2
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    num_embeds_ada_norm: int | None = 1000
    upcast_attention: Literal[False] = False
    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    norm_elementwise_affine: Literal[False] = False
    norm_eps: float = Field(1e-6, ge=1e-6, le=1e-6)
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None
    attention_type: Literal["default"] | None = "default"
    # only in Transformer2DModel
    num_vector_embeds: None = None
    only_cross_attention: Literal[False] = False
    double_self_attention: Literal[False] = False
    use_linear_projection: Literal[False] = False


def is_diffusers(values: Mapping[str, Any]) -> bool:
    """Whether this is the config.json of a PixArt."""
    name = values.get("_class_name")
    return name == CLASS or (name == "Transformer2DModel" and values.get("norm_type") == "ada_norm_single")


def config_from_diffusers(values: Mapping[str, Any], where: str = "config.json", as_released: bool = False) -> PixArtConfig:
    """diffusers' configuration in our words. Raises ConfigError for keys and values that we do not know.

    ``as_released`` changes nothing: diffusers computes PixArt as released.
    """
    from ditkit.backbones.pixart import PixArtConfig

    cfg = DiffusersPixArt.parse(without_notes(values, "_ditkit"), where)
    ours = Ours.parse(values.get("_ditkit", {}), f"{where}: _ditkit")
    dim = cfg.num_attention_heads * cfg.attention_head_dim
    if cfg.caption_channels is None or cfg.cross_attention_dim != dim:
        raise WeightsError(
            f"{where}: caption_channels {cfg.caption_channels}, cross_attention_dim {cfg.cross_attention_dim}",
            allowed=f"the text encoder's width, and {dim}, the network's",
        )
    extra = cfg.use_additional_conditions
    return PixArtConfig(
        input_size=(cfg.sample_size, cfg.sample_size),
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels or cfg.in_channels,
        patch_size=cfg.patch_size,
        dim=dim,
        depth=cfg.num_layers,
        num_heads=cfg.num_attention_heads,
        text_dim=cfg.caption_channels,
        micro_conditions=cfg.sample_size == 128 if extra is None else extra,
        position_base=cfg.sample_size // cfg.patch_size,
        position_scale=max(cfg.sample_size // 64, 1) if cfg.interpolation_scale is None else cfg.interpolation_scale,
        **{**ours.to_dict(), "null_caption": False},
    )


def text_encoder(folder: Path, config: PixArtConfig) -> Part:
    """T5, as the pipelines ask it: with 120 tokens, Sigma's with 300."""
    sigma = "Sigma" in str(read_data(folder / "model_index.json").get("_class_name"))
    return Part(name="transformers", config={"path": str(folder), "max_length": 300 if sigma else 120, "lower_case": True})


def config_to_diffusers(config: PixArtConfig) -> dict[str, Any]:
    """Our configuration as diffusers' config.json. Raises DitkitError for networks that diffusers' PixArt cannot be."""
    side, scale = _square(config), config.position_scale
    if config.mlp_ratio != 4.0:
        raise DitkitError(f"mlp_ratio is {config.mlp_ratio}", allowed="4.0: diffusers' PixArt has no other", hint="--to official")
    ours = ours_of(config).model_copy(update={"null_caption": False})
    return dict(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        cross_attention_dim=config.dim,
        sample_size=side,
        patch_size=config.patch_size,
        interpolation_scale=int(scale) if scale == int(scale) else scale,
        use_additional_conditions=config.micro_conditions,
        caption_channels=config.text_dim,
        _class_name=CLASS,
        **({"_ditkit": ours.to_dict()} if ours != Ours() else {}),
    )


def differences(config: PixArtConfig, to: Literal["official", "diffusers"]) -> list[str]:
    """What the other layout's code computes otherwise, or cannot hold."""
    found = []
    if to == "diffusers" and (config.kv_blocks or config.qk_norm):
        found.append("diffusers' PixArt has neither compressed keys nor norms of them: it will not load these weights")
    if to == "diffusers" and config.null_caption:
        found.append("diffusers has no place for the null caption: it encodes the empty prompt instead")
    return found


def has_live(config: Mapping[str, Any]) -> bool:
    """Whether diffusers computes such a network."""
    plain = not config.get("kv_blocks") and not config.get("qk_norm") and config.get("mlp_ratio", 4.0) == 4.0
    h, w = config["input_size"]
    return plain and h == w and config["position_base"] == h // config.get("patch_size", 2)


def live_inputs(config: PixArtConfig, batch: int, normal: Any, length: int = 6) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Conditioning for our network, and the same for diffusers' call. ``normal(purpose, shape)`` draws; ``length``: tokens of text."""
    import torch

    text, mask = normal("text", (length, config.text_dim)), torch.arange(length)[None] < torch.arange(2, 2 + batch)[:, None]
    ours, theirs = {"text": text, "mask": mask}, {"encoder_hidden_states": text, "encoder_attention_mask": mask.to(text.dtype)}
    more: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if config.micro_conditions:
        size = torch.tensor([[512.0, 256.0 + 64 * i] for i in range(batch)])
        ours |= {"size": size, "aspect": size[:, :1] / size[:, 1:]}
        more = {"resolution": size, "aspect_ratio": ours["aspect"]}
    return ours, {**theirs, "added_cond_kwargs": more}
