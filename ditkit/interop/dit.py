"""DiT and SiT: the released layout (2212.09748, 2401.08740; the same keys) and diffusers' DiTTransformer2DModel, as tables.

What differs from ours: the released file stores the fixed position table; the patch projection is a convolution; diffusers
splits qkv, and keeps a copy of the time and label embedders in every block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ditkit.bundle import Part, Sampling
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError, WeightsError

from .hints import Hints, without_notes
from .schedulers import gaussian
from .tables import COPIES, JOIN, Convolution, Derived, Row, Table

if TYPE_CHECKING:
    import torch

    from ditkit.backbones.dit import DiTConfig

Shape = tuple[int, ...]

CLASS = "DiTTransformer2DModel"
PIPELINES = ("DiTPipeline",)
INDEX_KEYS = ("transformer", "vae", "scheduler", "id2label")
SYSTEMS = ("dit", "sit")

_BLOCK = "blocks.{i}.parts.img"
_THEIR_BLOCK = "transformer_blocks.{i}"
_EMBEDDER = "transformer_blocks.{*}.norm1.emb"

OFFICIAL = (
    Row("time.fc1", "t_embedder.mlp.0"),
    Row("time.fc2", "t_embedder.mlp.2"),
    Row("label", "y_embedder.embedding_table", tensors=("weight",)),
    Row(f"{_BLOCK}.ada", "blocks.{i}.adaLN_modulation.1"),
    Row(f"{_BLOCK}.qkv", "blocks.{i}.attn.qkv"),
    Row(f"{_BLOCK}.proj", "blocks.{i}.attn.proj"),
    Row(f"{_BLOCK}.mlp.fc1", "blocks.{i}.mlp.fc1"),
    Row(f"{_BLOCK}.mlp.fc2", "blocks.{i}.mlp.fc2"),
    Row("final.ada", "final_layer.adaLN_modulation.1"),
    Row("final.proj", "final_layer.linear"),
)
DIFFUSERS = (
    Row("time.fc1", f"{_EMBEDDER}.timestep_embedder.linear_1", COPIES),
    Row("time.fc2", f"{_EMBEDDER}.timestep_embedder.linear_2", COPIES),
    Row("label", f"{_EMBEDDER}.class_embedder.embedding_table", COPIES, tensors=("weight",)),
    Row(f"{_BLOCK}.ada", f"{_THEIR_BLOCK}.norm1.linear"),
    Row(f"{_BLOCK}.qkv", (f"{_THEIR_BLOCK}.attn1.to_q", f"{_THEIR_BLOCK}.attn1.to_k", f"{_THEIR_BLOCK}.attn1.to_v"), JOIN),
    Row(f"{_BLOCK}.proj", f"{_THEIR_BLOCK}.attn1.to_out.0"),
    Row(f"{_BLOCK}.mlp.fc1", f"{_THEIR_BLOCK}.ff.net.0.proj"),
    Row(f"{_BLOCK}.mlp.fc2", f"{_THEIR_BLOCK}.ff.net.2"),
    Row("final.ada", "proj_out_1"),  # (shift, scale) here too; diffusers' newer heads have (scale, shift)
    Row("final.proj", "proj_out_2"),
)
_HEADS = {(12, 384): 6, (12, 768): 12, (24, 1024): 16, (28, 1152): 16}  # (depth, dim) of the published sizes


def official_table(config: DiTConfig) -> Table:
    """The released layout of DiT and SiT for this shape."""
    from ditkit.nn.positions import sincos_table

    check_released(config)
    h, w = (side // config.patch_size for side in config.input_size)
    patch = Row("patch_embed", "x_embedder.proj", Convolution(config.patch_size, config.patch_size))
    positions = Derived(lambda: sincos_table(config.dim, (h, w)), tolerance=1e-6)
    return Table((patch, *OFFICIAL), config.depth, {"pos_embed": positions})


def is_released(config: Mapping[str, Any]) -> bool:
    """Whether other layouts have such a network: only adaLN-Zero with the fixed position code was published."""
    return config.get("conditioning", "adaln_zero") == "adaln_zero" and config.get("positions", "sincos") == "sincos"


def check_released(config: DiTConfig) -> None:
    """Raise DitkitError for the networks that no other layout has."""
    if not is_released(config.to_dict()):
        raise DitkitError(
            f"conditioning {config.conditioning}, positions {config.positions}",
            allowed="adaln_zero, sincos: the only one with a released or diffusers layout",
            hint="--to ditkit",
        )


def diffusers_table(config: DiTConfig) -> Table:
    """The layout of diffusers' DiTTransformer2DModel for this shape."""
    check_released(config)
    if not config.null_label:
        raise WeightsError("the model has no null label", allowed="models with one: diffusers' DiT always has it", hint="--to official")
    patch = Row("patch_embed", "pos_embed.proj", Convolution(config.patch_size, config.patch_size))
    return Table((patch, *DIFFUSERS), config.depth, {})


class Constructor(Config):
    """Arguments of the released ``DiT`` and ``SiT`` classes, with their defaults."""

    input_size: int | tuple[int, int] = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = Field(0.1, description="above 0 the label table has a row for no label")
    num_classes: int = 1000
    learn_sigma: bool = True

    def to_ours(self, ours: Ours | None = None) -> DiTConfig:
        """The same shape in our words."""
        from ditkit.backbones.dit import DiTConfig

        size = (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size
        return DiTConfig(
            input_size=size,
            in_channels=self.in_channels,
            out_channels=self.in_channels * (2 if self.learn_sigma else 1),
            patch_size=self.patch_size,
            dim=self.hidden_size,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            num_classes=self.num_classes,
            null_label=self.class_dropout_prob > 0,
            **(ours.to_dict() if ours else {}),
        )


def is_official(names: Mapping[str, Any]) -> bool:
    """Whether these are the keys of a released DiT or SiT."""
    return {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight", "pos_embed"} <= set(names)


def config_from_official(shapes: Mapping[str, Shape], hints: Hints, where: str = "the file") -> DiTConfig:
    """The configuration that a released file has, from its shapes; what they do not show comes from ``hints``.

    Raises:
        DitkitError: the number of heads is not that of a published size and not given, or the position table is no square.
    """
    from ditkit.backbones.dit import DiTConfig

    dim, channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    heads = hints.num_heads or _HEADS.get((depth, dim))
    if heads is None:
        raise DitkitError(f"{where}: {depth} blocks of width {dim} are no published size", hint="give --num-heads")
    side = round(shapes["pos_embed"][1] ** 0.5)
    size = hints.input_size or (side * patch, side * patch)
    rows = shapes["y_embedder.embedding_table.weight"][0]
    return DiTConfig(
        input_size=size,
        in_channels=channels,
        out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        patch_size=patch,
        dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / dim if depth else 4.0,
        num_classes=rows - hints.null_label,
        null_label=hints.null_label,
    )


def released_defaults(system: str, config: DiTConfig) -> tuple[Part, Sampling]:
    """Process and sampler of the released ``sample.py``: 250 steps (of DDPM; SiT: dopri5, at most), scale 4 on the first three channels.

    Twice the channels are DiT's variance, or a half that SiT discards; SiT's default is the linear path and velocity, and its time runs
    from noise at 0 to data at 1.
    """
    guidance: dict[str, Any] = {"scale": 4.0, "channels": 3}
    learned = config.out_channels == 2 * config.in_channels
    if system == "dit":
        return gaussian(learned), Sampling(solver="ddpm", num_inference_steps=250, guidance=guidance)
    process = Part(name="interpolant", config={"path": "linear", "prediction": "velocity", "discard_half": learned})
    return process, Sampling(solver="dopri5", num_inference_steps=250, guidance=guidance)


def system_of(process: str, config: DiTConfig) -> str:
    """Which of ``SYSTEMS`` a model with this process is."""
    return "dit" if process == "gaussian" else "sit"


class DiffusersDiT(Config):
    """``config.json`` of DiTTransformer2DModel, and of Transformer2DModel as DiT's first conversions have it.

    Fields of one allowed value are those that our network computes in no other way.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32
    attention_bias: Literal[True] = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    upcast_attention: Literal[False] = False
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    norm_elementwise_affine: Literal[False] = False
    norm_eps: float = 1e-5
    # only in Transformer2DModel
    cross_attention_dim: None = None
    num_vector_embeds: None = None
    caption_channels: None = None
    interpolation_scale: None = None
    use_additional_conditions: None = None
    only_cross_attention: Literal[False] = False
    double_self_attention: Literal[False] = False
    use_linear_projection: Literal[False] = False
    attention_type: Literal["default"] = "default"


class Ours(Config):
    """What no other layout can say; our exports leave it in a place that others ignore (``_ditkit`` in diffusers' config.json)."""

    time_freq_shift: Literal[0, 1] = 1
    mlp_norm_eps: float = 1e-5


def is_diffusers(values: Mapping[str, Any]) -> bool:
    """Whether this is the config.json of a DiT."""
    name = values.get("_class_name")
    return name == CLASS or (name == "Transformer2DModel" and values.get("norm_type", "ada_norm_zero") == "ada_norm_zero")


def config_from_diffusers(values: Mapping[str, Any], where: str = "config.json", as_released: bool = False) -> DiTConfig:
    """diffusers' configuration in our words, computing what diffusers computes. Raises ConfigError for keys and values that we do not know.

    diffusers divides by 127 where the released code divides by 128 in the exponents of the time code, and has another epsilon in
    one norm. Weights that were converted from released ones were trained without: ``as_released``, or our export's note in the file.
    """
    from ditkit.backbones.dit import DiTConfig

    cfg = DiffusersDiT.parse(without_notes(values, "_ditkit"), where)
    ours = Ours(time_freq_shift=0, mlp_norm_eps=1e-6) if as_released else Ours(mlp_norm_eps=cfg.norm_eps)
    if "_ditkit" in values and not as_released:
        ours = Ours.parse(values["_ditkit"], f"{where}: _ditkit")
    return DiTConfig(
        input_size=(cfg.sample_size, cfg.sample_size),
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels or cfg.in_channels,
        patch_size=cfg.patch_size,
        dim=cfg.num_attention_heads * cfg.attention_head_dim,
        depth=cfg.num_layers,
        num_heads=cfg.num_attention_heads,
        num_classes=cfg.num_embeds_ada_norm,
        **ours.to_dict(),
    )


def config_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """Our configuration as diffusers' config.json. Raises DitkitError for networks that diffusers' DiT cannot be."""
    check_released(config)
    h, w = config.input_size
    if h != w or config.mlp_ratio != 4.0:
        raise DitkitError(
            f"input_size {config.input_size}, mlp_ratio {config.mlp_ratio}",
            allowed="a square and 4.0: diffusers' DiT has no other",
            hint="--to official",
        )
    return dict(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=h,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=config.mlp_norm_eps,
        _class_name="DiTTransformer2DModel",
        **({} if config.time_freq_shift else {"_ditkit": ours_of(config).to_dict()}),
    )


def ours_of(config: DiTConfig) -> Ours:
    """What no other layout can say."""
    return Ours(time_freq_shift=config.time_freq_shift, mlp_norm_eps=config.mlp_norm_eps)


def constructor_of(config: DiTConfig) -> Constructor:
    """Our configuration as arguments of the released classes. Raises DitkitError for networks that they cannot be."""
    check_released(config)
    h, w = config.input_size
    if h != w or config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise DitkitError(
            f"input_size {config.input_size}, out_channels {config.out_channels}",
            allowed=f"a square, and {config.in_channels} or {2 * config.in_channels}: the released code has no other",
        )
    return Constructor(
        input_size=h,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        class_dropout_prob=0.1 if config.null_label else 0.0,
        num_classes=config.num_classes,
        learn_sigma=config.out_channels != config.in_channels,
    )


def differences(config: DiTConfig, to: Literal["official", "diffusers"]) -> list[str]:
    """What the other layout's code computes otherwise."""
    if to == "diffusers" and not config.time_freq_shift:
        return ["diffusers computes DiT's time code with other frequencies (exponents of i / 127, not i / 128) and will differ"]
    if to == "official" and (config.time_freq_shift or config.mlp_norm_eps != 1e-6):
        return ["the released code computes the time code and one norm otherwise than this model and will differ"]
    return []


def has_live(config: Mapping[str, Any]) -> bool:
    """Whether diffusers computes such a network."""
    square = len(set(config["input_size"])) == 1
    return is_released(config) and config.get("null_label", True) and square and config.get("mlp_ratio", 4.0) == 4.0


def live_inputs(config: DiTConfig, batch: int, normal: Any, length: int = 6) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Conditioning for our network, and the same for diffusers' call."""
    import torch

    y = torch.linspace(0, config.num_classes, batch).round().long()
    return {"y": y}, {"class_labels": y}
