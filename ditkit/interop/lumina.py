"""Flag-DiT and Next-DiT: the released layouts (Lumina-T2X) and diffusers' LuminaNextDiT2DModel, as tables.

What differs from ours: keys and values, and both halves of the SwiGLU's first layer, are apart; diffusers, which has Next-DiT told by
text alone, stores queries and their norm twice, and is given the rotary table at every call. Norms bear other names in each network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ditkit.bundle import Part, Sampling
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError

from .hints import Hints, without_notes
from .tables import COPIES, JOIN, Row, Table

if TYPE_CHECKING:
    import torch

    from ditkit.backbones.lumina import LuminaConfig

Shape = tuple[int, ...]

CLASS = "LuminaNextDiT2DModel"
PIPELINES = ("LuminaPipeline", "LuminaText2ImgPipeline")
INDEX_KEYS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
SYSTEMS = ("flag-dit", "lumina-t2i", "next-dit", "lumina-next")
FLOW_TIME = "sit"
LIVE_TIMES = (0.02, 0.3, 0.55, 0.98)

_BLOCK, _THEIRS, _WEIGHT = "blocks.{i}", "layers.{i}", ("weight",)


def _weights(names: Mapping[str, str]) -> tuple[Row, ...]:
    """Modules of a block that have a weight alone."""
    return tuple(Row(f"{_BLOCK}.{ours}", f"{_THEIRS}.{theirs}", tensors=_WEIGHT) for ours, theirs in names.items())


OFFICIAL = (  # the projections of a block
    Row(f"{_BLOCK}.ada", f"{_THEIRS}.adaLN_modulation.1"),
    *_weights({"q": "attention.wq", "proj": "attention.wo", "mlp.fc2": "feed_forward.w2"}),
    Row(f"{_BLOCK}.kv", tuple(f"{_THEIRS}.attention.{n}" for n in ("wk", "wv")), JOIN, _WEIGHT),
    Row(f"{_BLOCK}.mlp.fc1", tuple(f"{_THEIRS}.feed_forward.{n}" for n in ("w1", "w3")), JOIN, _WEIGHT),
    Row(f"{_BLOCK}.text.kv", tuple(f"{_THEIRS}.attention.{n}" for n in ("wk_y", "wv_y")), JOIN, _WEIGHT),
)
_OFFICIAL_MORE = (
    Row("patch_embed", "x_embedder"),
    *(Row(f"time.fc{i}", f"t_embedder.mlp.{2 * i - 2}") for i in (1, 2)),
    Row("label", "y_embedder.embedding_table", tensors=_WEIGHT),
    Row("caption.norm", "cap_embedder.0"),
    Row("caption.proj", "cap_embedder.1"),
    Row("pad_token", "pad_token", tensors=("",)),
    Row("separators.line", "eol_token", tensors=("",)),
    Row(f"{_BLOCK}.text.gate", f"{_THEIRS}.attention.gate", tensors=("",)),
    *_weights({"text.norm": "attention_y_norm"}),
    Row(f"{_BLOCK}.q_norm", f"{_THEIRS}.attention.q_norm"),
    Row(f"{_BLOCK}.k_norm", f"{_THEIRS}.attention.k_norm"),
    Row(f"{_BLOCK}.text.k_norm", f"{_THEIRS}.attention.ky_norm"),
    Row("final.ada", "final_layer.adaLN_modulation.1"),
    Row("final.proj", "final_layer.linear"),
)
_NEXT_CLASSES = {"post1": "attention_norm", "post2": "ffn_norm"}
_NEXT = {"norm1": "attention_norm1", "post1": "attention_norm2", "norm2": "ffn_norm1", "post2": "ffn_norm2"}
_FLAG = {"norm1": "attention_norm", "norm2": "ffn_norm"}
DIFFUSERS = (  # the projections of a block
    Row(f"{_BLOCK}.ada", f"{_THEIRS}.norm1.linear"),
    Row(f"{_BLOCK}.q", tuple(f"{_THEIRS}.{n}.to_q" for n in ("attn1", "attn2")), COPIES, _WEIGHT),
    Row(f"{_BLOCK}.kv", tuple(f"{_THEIRS}.attn1.{n}" for n in ("to_k", "to_v")), JOIN, _WEIGHT),
    Row(f"{_BLOCK}.mlp.fc1", tuple(f"{_THEIRS}.feed_forward.{n}" for n in ("linear_1", "linear_3")), JOIN, _WEIGHT),
    *_weights({"proj": "attn2.to_out.0", "mlp.fc2": "feed_forward.linear_2"}),
    Row(f"{_BLOCK}.text.kv", tuple(f"{_THEIRS}.attn2.{n}" for n in ("to_k", "to_v")), JOIN, _WEIGHT),
)
_DIFFUSERS_MORE = (
    Row("patch_embed", "patch_embedder.proj"),
    *(Row(f"time.fc{i}", f"time_caption_embed.timestep_embedder.linear_{i}") for i in (1, 2)),
    Row("caption.norm", "time_caption_embed.caption_embedder.0"),
    Row("caption.proj", "time_caption_embed.caption_embedder.1"),
    Row("pad_token", "pad_token", tensors=("",)),
    Row(f"{_BLOCK}.text.gate", f"{_THEIRS}.gate", tensors=("",)),
    *_weights({"text.norm": "norm1_context", "norm1": "norm1.norm", "post1": "norm2", "norm2": "ffn_norm1", "post2": "ffn_norm2"}),
    Row(f"{_BLOCK}.q_norm", tuple(f"{_THEIRS}.{n}.norm_q" for n in ("attn1", "attn2")), COPIES),
    Row(f"{_BLOCK}.k_norm", f"{_THEIRS}.attn1.norm_k"),
    Row(f"{_BLOCK}.text.k_norm", f"{_THEIRS}.attn2.norm_k"),
    Row("final.ada", "norm_out.linear_1"),
    Row("final.proj", "norm_out.linear_2"),
)


def official_table(config: LuminaConfig) -> Table:
    """The released layout of this network."""
    _check_pictures(config)
    norms = _FLAG if config.variant == "flag" else _NEXT if config.text_dim is not None else _NEXT_CLASSES
    return Table([*_present(config, (*OFFICIAL, *_OFFICIAL_MORE)), *_weights(norms)], config.depth, {})


def diffusers_table(config: LuminaConfig) -> Table:
    """The layout of diffusers' LuminaNextDiT2DModel for this shape."""
    _check_diffusers(config)
    return Table([*_present(config, (*DIFFUSERS, *_DIFFUSERS_MORE))], config.depth, {})


def _present(config: LuminaConfig, rows: tuple[Row, ...]) -> Iterator[Row]:
    """Those whose module the network has."""
    absent: tuple[str, ...] = ("label",) if config.text_dim is not None else ("caption", "pad_token", f"{_BLOCK}.text")
    absent += () if config.separated else ("separators",)
    for row in rows:
        if not row.ours.startswith(absent) and (config.qk_norm or not row.ours.endswith(("q_norm", "k_norm"))):
            yield row


def _check_pictures(config: LuminaConfig) -> None:
    if len(config.input_size) != 2:
        raise DitkitError(f"input_size {config.input_size}", allowed="height and width: no clip or sound was released", hint="--to ditkit")


def _check_diffusers(config: LuminaConfig) -> None:
    _check_pictures(config)
    if config.variant != "next" or config.text_dim is None:
        told = "class labels" if config.text_dim is None else "text"
        raise DitkitError(
            f"diffusers has no {config.variant.title()}-DiT told by {told}", allowed="Next-DiT told by text", hint="--to official"
        )


class Ours(Config):
    """What no other layout can say; our exports leave it in a place that others ignore (``_ditkit`` in diffusers' config.json)."""

    variant: Literal["flag", "next"] = "next"
    input_size: tuple[int, int] = Field((128, 128), description="height and width of the training data, in latent pixels")
    rope_linear: float = 1.0
    rope_ntk: float = 1.0
    extrapolation: dict[str, Any] = Field({}, description="what differs from no extrapolation")

    def scaling(self) -> dict[str, Any]:
        """Of rotary positions, as our configuration has it."""
        return self.model_dump(include={"rope_linear", "rope_ntk", "extrapolation"})


def ours_of(config: LuminaConfig) -> Ours:
    """What no other layout can say."""
    _check_pictures(config)
    return Ours(
        variant=config.variant,
        input_size=config.input_size,  # type: ignore[arg-type]
        rope_linear=config.rope_linear,
        rope_ntk=config.rope_ntk,
        extrapolation=config.extrapolation.model_dump(mode="json", exclude_defaults=True),
    )


class Constructor(Config):
    """Arguments of the four released classes, with their defaults: a text has ``cap_feat_dim``, classes have ``num_classes``."""

    patch_size: int = 2
    in_channels: int = 4
    input_size: int = Field(32, description="only of classes")
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    learn_sigma: bool = True
    qk_norm: bool = False
    cap_feat_dim: int | None = None
    num_classes: int | None = None
    class_dropout_prob: float = 0.1
    rope_scaling_factor: float = 1.0
    ntk_factor: float = 1.0
    scale_factor: float = Field(1.0, ge=1, le=1, description="Next-DiT's, which its sampler overrides at every call")

    def to_ours(self, ours: Ours | None = None) -> LuminaConfig:
        """The same shape in our words; without ``ours``, as Next-DiT."""
        from ditkit.backbones.lumina import LuminaConfig

        if (self.cap_feat_dim is None) == (self.num_classes is None):
            raise DitkitError(
                f"cap_feat_dim {self.cap_feat_dim}, num_classes {self.num_classes}", allowed="one of them: a text, or classes"
            )
        more = ours or Ours(rope_linear=self.rope_scaling_factor, rope_ntk=self.ntk_factor)
        side = (128 if self.num_classes is None else self.input_size) // self.patch_size * self.patch_size
        return LuminaConfig(
            variant=more.variant,
            input_size=more.input_size if ours else (side, side),
            in_channels=self.in_channels,
            out_channels=self.in_channels * (1 + self.learn_sigma),
            patch_size=self.patch_size,
            dim=self.dim,
            depth=self.n_layers,
            num_heads=self.n_heads,
            num_kv_heads=self.n_kv_heads,
            mlp_hidden=_hidden(self.dim, self.multiple_of, self.ffn_dim_multiplier),
            text_dim=self.cap_feat_dim,
            num_classes=self.num_classes or 1000,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            **more.scaling(),
        )


def _hidden(dim: int, multiple: int, factor: float | None) -> int | None:
    """The SwiGLU's width in our words: None for the usual one."""
    from ditkit.nn.layers import swiglu_width

    width = swiglu_width(dim, multiple, 1.0 if factor is None else factor)
    return None if width == swiglu_width(dim) else width


def _multiple(config: LuminaConfig) -> tuple[int, float | None]:
    """``multiple_of`` and ``ffn_dim_multiplier`` that give the SwiGLU's width."""
    usual = 8 * config.dim // 3
    if config.mlp_hidden is None:
        return 256, None
    return (config.hidden, None) if config.hidden >= usual else (1, (config.hidden + 0.5) / usual)


def _learn_sigma(config: LuminaConfig) -> bool:
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise DitkitError(f"out_channels is {config.out_channels}", allowed=f"{config.in_channels} or {2 * config.in_channels}")
    return config.out_channels == 2 * config.in_channels


def constructor_of(config: LuminaConfig) -> Constructor:
    """Our configuration as arguments of the released classes. Raises DitkitError for networks that they cannot be."""
    _check_pictures(config)
    multiple, factor = _multiple(config)
    classes = config.text_dim is None
    return Constructor(
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        input_size=config.input_size[0] if classes else 32,
        dim=config.dim,
        n_layers=config.depth,
        n_heads=config.num_heads,
        n_kv_heads=config.num_kv_heads,
        multiple_of=multiple,
        ffn_dim_multiplier=factor,
        norm_eps=config.norm_eps,
        learn_sigma=_learn_sigma(config),
        qk_norm=config.qk_norm,
        cap_feat_dim=config.text_dim,
        num_classes=config.num_classes if classes else None,
        rope_scaling_factor=config.rope_linear,
        ntk_factor=config.rope_ntk,
    )


def is_official(names: Mapping[str, Any]) -> bool:
    """Whether these are the keys of a released Flag-DiT or Next-DiT."""
    return {"x_embedder.weight", "layers.0.attention.wq.weight", "layers.0.adaLN_modulation.1.weight"} <= set(names)


def config_from_official(shapes: Mapping[str, Shape], hints: Hints, where: str = "the file") -> LuminaConfig:
    """The configuration that a released file has, from its shapes. Patches are 2 x 2, as released.

    Raises:
        DitkitError: nothing says how many heads there are (a network for classes whose width is not published).
    """
    from ditkit.backbones.lumina import LuminaConfig
    from ditkit.nn.layers import swiglu_width

    dim, packed = shapes["x_embedder.weight"]
    text = shapes.get("cap_embedder.1.weight")
    heads = hints.num_heads or shapes.get("layers.0.attention.gate", (32 if dim in (1536, 2304, 3072, 4096) else None,))[0]
    if heads is None or dim % heads or packed % 4:
        raise DitkitError(f"{where}: width {dim}, {packed} numbers a patch", allowed="patches of 2 x 2", hint="give --num-heads")
    hidden = shapes["layers.0.feed_forward.w1.weight"][0]
    kv_heads = shapes["layers.0.attention.wk.weight"][0] * heads // dim
    return LuminaConfig(
        variant="next" if shapes["layers.0.adaLN_modulation.1.weight"][0] == 4 * dim else "flag",
        input_size=hints.input_size or ((32, 32) if text is None else (128, 128)),
        in_channels=packed // 4,
        out_channels=shapes["final_layer.linear.weight"][0] // 4,
        dim=dim,
        depth=len({name.split(".")[1] for name in shapes if name.startswith("layers.")}),
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        mlp_hidden=None if hidden == swiglu_width(dim) else hidden,
        text_dim=None if text is None else text[1],
        num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1 if text is None else 1000,
        qk_norm="layers.0.attention.q_norm.weight" in shapes,
    )


def released_defaults(system: str, config: LuminaConfig) -> tuple[Part, Sampling]:
    """Rectified flow, whose network is told 1 - t; times of text models are shifted by 4. Guidance acts on three channels, as released."""
    classes = config.text_dim is None
    process: dict[str, Any] = {"network_time": FLOW_TIME, "discard_half": _learn_sigma(config)}
    process |= {"time_sampling": "logit_normal"} if classes else {"shift": 4.0}
    guidance = {"scale": 4.0, "channels": min(3, config.in_channels)}
    solver, steps = ("dopri5", 100) if classes else ("euler", 30)
    return Part(name="flow", config=process), Sampling(solver=solver, num_inference_steps=steps, guidance=guidance)


def system_of(process: str, config: LuminaConfig) -> str:
    """Which of ``SYSTEMS`` a network is."""
    return SYSTEMS[2 * (config.variant == "next") + (config.text_dim is not None)]


class DiffusersLumina(Config):
    """``config.json`` of LuminaNextDiT2DModel. Fields of one allowed value are those that our network computes in no other way."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 2304
    num_layers: int = 32
    num_attention_heads: int = 32
    num_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    learn_sigma: bool = True
    qk_norm: bool = True
    cross_attention_dim: int = 2048
    scaling_factor: float = Field(1.0, ge=1, le=1)


def is_diffusers(values: Mapping[str, Any]) -> bool:
    """Whether this is the config.json of a Next-DiT."""
    return values.get("_class_name") == CLASS


def config_from_diffusers(values: Mapping[str, Any], where: str = "config.json", as_released: bool = False) -> LuminaConfig:
    """diffusers' configuration in our words. Raises ConfigError for keys and values that we do not know.

    ``as_released`` changes nothing: diffusers computes Next-DiT as released.
    """
    from ditkit.backbones.lumina import LuminaConfig

    cfg = DiffusersLumina.parse(without_notes(values, "_ditkit"), where)
    ours = Ours.parse(values.get("_ditkit", {"input_size": [cfg.sample_size] * 2}), f"{where}: _ditkit")
    return LuminaConfig(
        variant="next",
        input_size=ours.input_size,
        in_channels=cfg.in_channels,
        out_channels=cfg.in_channels * (1 + cfg.learn_sigma),
        patch_size=cfg.patch_size,
        dim=cfg.hidden_size,
        depth=cfg.num_layers,
        num_heads=cfg.num_attention_heads,
        num_kv_heads=None if cfg.num_kv_heads == cfg.num_attention_heads else cfg.num_kv_heads,
        mlp_hidden=_hidden(cfg.hidden_size, cfg.multiple_of, cfg.ffn_dim_multiplier),
        text_dim=cfg.cross_attention_dim,
        qk_norm=cfg.qk_norm,
        norm_eps=cfg.norm_eps,
        **ours.scaling(),
    )


def text_encoder(folder: Path, config: LuminaConfig) -> Part:
    """Gemma, as LuminaPipeline asks it: the states before its last layer."""
    return Part(name="transformers", config={"path": str(folder), "max_length": 256, "layer": -2, "lower_case": True})


def config_to_diffusers(config: LuminaConfig) -> dict[str, Any]:
    """Our configuration as diffusers' config.json. Raises DitkitError for networks that diffusers' class cannot be."""
    _check_diffusers(config)
    multiple, factor = _multiple(config)
    side, ours = max(config.input_size), ours_of(config)
    return dict(
        sample_size=side,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.dim,
        num_layers=config.depth,
        num_attention_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads or config.num_heads,  # it cannot make norms for None
        multiple_of=multiple,
        ffn_dim_multiplier=factor,
        norm_eps=config.norm_eps,
        learn_sigma=_learn_sigma(config),
        qk_norm=config.qk_norm,
        cross_attention_dim=config.text_dim,
        scaling_factor=1.0,
        _class_name=CLASS,
        **({} if ours == Ours(input_size=(side, side)) else {"_ditkit": ours.to_dict()}),
    )


def differences(config: LuminaConfig, to: Literal["official", "diffusers"]) -> list[str]:
    """What the other layout's code computes otherwise, or cannot hold."""
    if config.extrapolation.rule == "none" and not config.extrapolation.proportional and config.rope_linear == config.rope_ntk == 1:
        return []
    return [f"{to} holds no scaling of rotary positions: give it at every call there"]


def has_live(config: Mapping[str, Any]) -> bool:
    """Whether diffusers computes such a network."""
    told_by_text = config.get("variant", "next") == "next" and config.get("text_dim", 2048) is not None
    return told_by_text and len(config.get("input_size", (128, 128))) == 2


def live_inputs(config: LuminaConfig, batch: int, normal: Any, length: int = 6) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Conditioning for our network, and the same for diffusers' call. ``normal(purpose, shape)`` draws; ``length``: tokens of text."""
    import torch
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    text, mask = normal("text", (length, config.text_dim)), torch.arange(length)[None] < torch.arange(2, 2 + batch)[:, None]
    (h, w), how = config.grid, config.extrapolation
    table = get_2d_rotary_pos_embed_lumina(config.dim // config.num_heads, h, w, config.rope_linear, config.rope_ntk)
    base = {"base_sequence_length": how.base_tokens or h * w} if how.proportional else {}
    theirs = {"encoder_hidden_states": text, "encoder_mask": mask, "image_rotary_emb": table, "cross_attention_kwargs": base}
    return {"text": text, "mask": mask}, theirs
