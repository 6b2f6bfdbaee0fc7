"""FLUX.1: the released layout (``double_blocks``, ``single_blocks``) and diffusers' FluxTransformer2DModel, as tables.

What differs from ours: the released code and diffusers are given packed patches, so that their channels are ours times four;
diffusers splits qkv, and in single blocks the MLP's first half too; its final norm has scale before shift.
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
from .tables import JOIN, SWAP, Pieces, Row, Table

if TYPE_CHECKING:
    import torch

    from ditkit.backbones.flux import FluxConfig

Shape = tuple[int, ...]

CLASS = "FluxTransformer2DModel"
PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
INDEX_KEYS = (
    *("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2"),
    *("tokenizer", "tokenizer_2", "image_encoder", "feature_extractor"),
)
SYSTEMS = ("flux",)
FLOW_TIME = "unit"
LIVE_TIMES = (0.125, 0.25, 0.5, 1.0)  # a thousandfold they are exact in bf16, to which diffusers rounds them

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
        if ours != "guidance" or config.guidance is not None:
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
        if ours != "guidance" or config.guidance is not None:
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


class Ours(Config):
    """What no other layout can say; our exports leave it in a place that others ignore (``_ditkit`` in diffusers' config.json)."""

    input_size: tuple[int, int] = Field((128, 128), description="height and width of the training data, in latent pixels")
    patch_size: int = Field(2, ge=1)
    guidance: float = Field(3.5, ge=0, description="scale that a network with an input for it is told")


class Constructor(Config):
    """``FluxParams`` of the released code, with the values of FLUX.1-dev; channels are those of packed patches."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, int, int] = (16, 56, 56)
    theta: Literal[10_000] = 10_000
    qkv_bias: Literal[True] = True
    guidance_embed: bool = True

    def to_ours(self, ours: Ours | None = None) -> FluxConfig:
        """The same shape in our words."""
        from ditkit.backbones.flux import FluxConfig

        ours = ours or Ours()
        return FluxConfig(
            input_size=ours.input_size,
            in_channels=_unpacked(self.in_channels, ours.patch_size, "FluxParams"),
            out_channels=_unpacked(self.out_channels, ours.patch_size, "FluxParams"),
            patch_size=ours.patch_size,
            dim=self.hidden_size,
            depth=self.depth,
            single_depth=self.depth_single_blocks,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            text_dim=self.context_in_dim,
            pooled_dim=self.vec_in_dim,
            rope_widths=self.axes_dim,
            guidance=ours.guidance if self.guidance_embed else None,
        )


def constructor_of(config: FluxConfig) -> Constructor:
    """Our configuration as the released code's."""
    return Constructor(
        in_channels=config.in_channels * config.patch_size**2,
        out_channels=config.out_channels * config.patch_size**2,
        vec_in_dim=config.pooled_dim,
        context_in_dim=config.text_dim,
        hidden_size=config.dim,
        mlp_ratio=config.mlp_ratio,
        num_heads=config.num_heads,
        depth=config.depth,
        depth_single_blocks=config.single_depth,
        axes_dim=config.rope_widths,
        guidance_embed=config.guidance is not None,
    )


def ours_of(config: FluxConfig) -> Ours:
    """What no other layout can say."""
    return Ours(input_size=config.input_size, patch_size=config.patch_size, guidance=3.5 if config.guidance is None else config.guidance)


def released_defaults(system: str, config: FluxConfig) -> tuple[Part, Sampling]:
    """dev: 28 Euler steps, shifted by the number of tokens; schnell: 4 steps without a shift. Guidance is told, not computed."""
    dev = config.guidance is not None
    process = {"network_time": FLOW_TIME, **({"resolution": "exponential"} if dev else {})}
    steps: dict[str, Any] = {"num_inference_steps": 28 if dev else 4, "options": {"spacing": "uniform"}}
    return Part(name="flow", config=process), Sampling(solver="euler", guidance={"scale": 1.0}, **steps)


def system_of(process: str, config: FluxConfig) -> str:
    """There is one."""
    return SYSTEMS[0]


def config_from_official(shapes: Mapping[str, Shape], hints: Hints, where: str = "the file") -> FluxConfig:
    """The configuration that a released file has, from its shapes.

    Patches are 2 x 2, rows and columns turn 7/16 of a head each (rounded down to pairs): as released. Nothing in the file says so.
    """
    from ditkit.backbones.flux import FluxConfig

    dim, packed = shapes["img_in.weight"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    side = 7 * head // 32
    return FluxConfig(
        input_size=hints.input_size or (128, 128),
        in_channels=_unpacked(packed, 2, where),
        out_channels=_unpacked(shapes["final_layer.linear.weight"][0], 2, where),
        dim=dim,
        depth=_count(shapes, "double_blocks."),
        single_depth=_count(shapes, "single_blocks."),
        num_heads=dim // head,
        mlp_ratio=shapes["double_blocks.0.img_mlp.0.weight"][0] / dim,
        text_dim=shapes["txt_in.weight"][1],
        pooled_dim=shapes["vector_in.in_layer.weight"][1],
        rope_widths=(head - 4 * side, 2 * side, 2 * side),
        guidance=3.5 if "guidance_in.in_layer.weight" in shapes else None,
    )


def _count(shapes: Mapping[str, Shape], prefix: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(prefix)})


def _unpacked(channels: int, patch: int, where: str) -> int:
    if channels % patch**2:
        raise DitkitError(
            f"{where}: {channels} channels of packed patches", allowed=f"multiples of {patch**2}: patches are {patch} x {patch}"
        )
    return channels // patch**2


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


def is_diffusers(values: Mapping[str, Any]) -> bool:
    """Whether this is the config.json of a FLUX."""
    return values.get("_class_name") == CLASS


def config_from_diffusers(values: Mapping[str, Any], where: str = "config.json", as_released: bool = False) -> FluxConfig:
    """diffusers' configuration in our words. Raises ConfigError for keys and values that we do not know.

    ``as_released`` changes nothing: diffusers computes FLUX as released.
    """
    from ditkit.backbones.flux import FluxConfig

    cfg = DiffusersFlux.parse(without_notes(values, "_ditkit"), where)
    ours = Ours.parse(values.get("_ditkit", {}), f"{where}: _ditkit")
    return FluxConfig(
        input_size=ours.input_size,
        patch_size=ours.patch_size,
        in_channels=_unpacked(cfg.in_channels, ours.patch_size, where),
        out_channels=_unpacked(cfg.out_channels or cfg.in_channels, ours.patch_size, where),
        dim=cfg.num_attention_heads * cfg.attention_head_dim,
        depth=cfg.num_layers,
        single_depth=cfg.num_single_layers,
        num_heads=cfg.num_attention_heads,
        text_dim=cfg.joint_attention_dim,
        pooled_dim=cfg.pooled_projection_dim,
        rope_widths=cfg.axes_dims_rope,
        guidance=ours.guidance if cfg.guidance_embeds else None,
    )


def config_to_diffusers(config: FluxConfig) -> dict[str, Any]:
    """Our configuration as diffusers' config.json. Raises WeightsError for shapes that diffusers' FLUX cannot have."""
    if config.mlp_ratio != 4.0:
        raise WeightsError(f"mlp_ratio is {config.mlp_ratio}", allowed="4.0: diffusers' FLUX has no other", hint="--to official")
    return dict(
        patch_size=1,
        in_channels=config.in_channels * config.patch_size**2,
        out_channels=config.out_channels * config.patch_size**2,
        num_layers=config.depth,
        num_single_layers=config.single_depth,
        attention_head_dim=config.dim // config.num_heads,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.text_dim,
        pooled_projection_dim=config.pooled_dim,
        guidance_embeds=config.guidance is not None,
        axes_dims_rope=list(config.rope_widths),
        _class_name=CLASS,
        **({} if ours_of(config) == Ours() else {"_ditkit": ours_of(config).to_dict()}),
    )


def text_encoder(folder: Path, config: FluxConfig) -> Part:
    """CLIP and T5, as FluxPipeline asks them; T5 with as many tokens as the released code gives it: 512 of dev, 256 of schnell."""
    return Part(name="flux", config={"path": str(folder), "max_length": 256 if config.guidance is None else 512})


def differences(config: FluxConfig, to: Literal["official", "diffusers"]) -> list[str]:
    """What the other layout's code computes otherwise: nothing."""
    return []


def has_live(config: Mapping[str, Any]) -> bool:
    """Whether diffusers computes such a network."""
    return config.get("mlp_ratio", 4.0) == 4.0


def live_inputs(config: FluxConfig, batch: int, normal: Any, length: int = 6) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Conditioning for our network, and the same for ``live_call``. ``normal(purpose, shape)`` draws; ``length``: tokens of text."""
    import torch

    text, pooled = normal("text", (length, config.text_dim)), normal("pooled", (config.pooled_dim,))
    told = {"guidance": 2.0 ** torch.arange(batch)} if config.guidance is not None else {}
    theirs = {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": torch.zeros(length, 3), "patch": config.patch_size}
    return {"text": text, "pooled": pooled, **told}, {**theirs, **told}


def live_call(theirs: Any, x: torch.Tensor, t: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
    """diffusers' model on pictures: packed before, unpacked after."""
    import torch

    from ditkit.nn.patches import patchify, unpatchify
    from ditkit.nn.positions import coordinates

    patch = call["patch"]
    grid = (x.shape[2] // patch, x.shape[3] // patch)
    ids = coordinates((1, *grid))[0].to(x.device, torch.float32)
    more = {name: value for name, value in call.items() if name != "patch"}
    return unpatchify(theirs(patchify(x, patch), timestep=t, img_ids=ids, **more).sample, grid, patch, "channels first")
