"""Image VAE: diffusers' AutoencoderKL, read strictly from a diffusers folder.

"High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752, section 3.1. The configuration is read at
once and without diffusers; weights are loaded when the first picture is encoded or decoded, so that training on cached
latents never loads them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..core.config import Config, read_data
from ..core.errors import DitkitError, WeightsError
from ..core.files import TensorFile, write_json, write_tensors
from ..core.lazy import require
from .base import Codec

WEIGHTS = "diffusion_pytorch_model.safetensors"
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # attention before diffusers 0.17
_PRIVATE = ("_class_name", "_diffusers_version", "_name_or_path")


class VAEConfig(Config):
    """Where the VAE is and how it runs."""

    path: str = Field(description="folder of a diffusers AutoencoderKL, or of a pipeline that holds it in vae/")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of weights and computation")
    tiling: bool = Field(False, description="work in overlapping tiles: bounded memory for large pictures, slightly different values")
    allow: tuple[str, ...] = Field((), description="unknown keys of the VAE's config.json to ignore, by name")


class AutoencoderConfig(Config):
    """The ``config.json`` of a diffusers AutoencoderKL, with diffusers' defaults."""

    in_channels: int = Field(3, ge=1)
    out_channels: int = Field(3, ge=1)
    down_block_types: tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = Field((64,), min_length=1, max_length=8)
    layers_per_block: int = Field(1, ge=1, le=64)
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    latent_channels: int = Field(4, ge=1, le=1024)
    norm_num_groups: int = Field(32, ge=1)
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = Field(0.18215, gt=0)
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> AutoencoderConfig:
        levels = len(self.block_out_channels)
        if len(self.down_block_types) != levels or len(self.up_block_types) != levels:
            raise ValueError(f"{levels} block_out_channels need as many down_block_types and up_block_types")
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_num_groups:
                raise ValueError(f"block_out_channels {width} is no multiple of norm_num_groups {self.norm_num_groups}")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std are given together or not at all")
        for values in (self.latents_mean, self.latents_std):
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(f"latents_mean and latents_std have one number for each of {self.latent_channels} channels")
        return self


class VAE(Codec):
    """AutoencoderKL behind the interface of codecs; its parameters are frozen.

    Raises:
        ConfigError: config.json is of another class, or has a key that is unknown and not in ``allow``.
        WeightsError: a tensor is missing, unknown, misshapen or not finite (when the weights are loaded).
    """

    name = "vae"
    config_class = VAEConfig
    has_folder = True

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.folder = _find(Path(config.path))
        self.autoencoder_config = c = _read_config(self.folder / "config.json", config.allow)
        if config.dtype == "float16" and c.force_upcast:
            raise DitkitError("this VAE overflows in float16 (force_upcast in its config.json)", allowed="float32 or bfloat16")
        self.in_channels, self.channels, self.factor = c.in_channels, c.latent_channels, 2 ** (len(c.block_out_channels) - 1)
        self.scale, self.shift = _normalisation(c)
        self._model: nn.Module | None = None
        self._device = torch.device("cpu")

    @property
    def model(self) -> Any:
        """The AutoencoderKL, loaded when first asked for."""
        if self._model is None:
            model = _load(self.folder / WEIGHTS, self.autoencoder_config, getattr(torch, self.config.dtype))
            if self.config.tiling:
                model.enable_tiling()
            self._model = model.to(self._device)
        return self._model

    @property
    def device(self) -> torch.device:
        """Where its weights are, or will be."""
        return self._device

    def encode_raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of diffusers' posterior, in the dtype of x."""
        posterior = self.model.encode(x.to(self.model.dtype)).latent_dist
        return posterior.mean.to(x.dtype), posterior.std.to(x.dtype)

    def decode_raw(self, z: Tensor) -> Tensor:
        """diffusers' decoder, in the dtype of z."""
        x: Tensor = self.model.decode(z.to(self.model.dtype)).sample
        return x.to(z.dtype)

    def identity(self) -> dict[str, Any]:
        """The autoencoder's own configuration and how it runs; not the path."""
        run = {"dtype": self.config.dtype, "tiling": self.config.tiling}
        return {"name": self.name, "config": self.autoencoder_config.to_dict(), **run}

    def content_hash(self) -> str:
        """As ``Codec.content_hash``; loads the weights."""
        _ = self.model
        return super().content_hash()

    def write(self, folder: Path) -> None:
        """In diffusers' own layout, so that diffusers opens the folder too."""
        write_tensors(folder / WEIGHTS, self.model.state_dict(), {"format": "pt"})
        write_json(folder / "config.json", {"_class_name": "AutoencoderKL", **self.autoencoder_config.to_dict()})

    def read(self, folder: Path) -> None:
        """Nothing: the weights are loaded when they are needed."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = fn(torch.empty(0, device=self._device))  # only the device: the dtype is the configuration's
        self._device = moved.device
        return super()._apply(lambda t: t.to(moved.device), recurse)


def _find(path: Path) -> Path:
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file():
            return folder
    raise DitkitError(f"{path} holds no VAE", allowed="a folder with config.json, or with vae/config.json", hint="download the model first")


def _read_config(path: Path, allow: tuple[str, ...]) -> AutoencoderConfig:
    values = read_data(path)
    found = values.get("_class_name") if isinstance(values, dict) else None
    if found != "AutoencoderKL":
        raise DitkitError(f"{path} describes {found or 'no model'}", allowed="AutoencoderKL", hint="give the folder of an image VAE")
    return AutoencoderConfig.parse({k: v for k, v in values.items() if k not in (*_PRIVATE, *allow)}, str(path))


def _normalisation(c: AutoencoderConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """scale and shift of (z - shift) * scale; per channel where the VAE has latents_mean and latents_std."""
    if c.latents_mean is not None and c.latents_std is not None:
        return tuple(c.scaling_factor / s for s in c.latents_std), c.latents_mean
    return (c.scaling_factor,), (c.shift_factor or 0.0,)


def _load(path: Path, config: AutoencoderConfig, dtype: torch.dtype) -> Any:
    if not path.is_file():
        other = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".safetensors"))
        there = f"; there is {', '.join(other)}" if other else ""
        raise WeightsError(f"{path} does not exist{there}", allowed=WEIGHTS, hint="save the VAE as one safetensors file under this name")
    diffusers = require("diffusers", "vae")
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**config.model_dump())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with TensorFile(path) as file:
        names = {_new_name(old): old for old in file.entries}
        file.check({names.get(new, new): shape for new, shape in shapes.items()})
        weights = {new: file.read(names[new]).to(dtype) for new in shapes}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _new_name(name: str) -> str:
    """Today's name of an attention tensor stored under the name it had before diffusers 0.17."""
    if ".attentions." not in name:
        return name
    head, part, tail = name.rsplit(".", 2)
    return f"{head}.{_OLD_NAMES.get(part, part)}.{tail}"
