"""What every codec is: data x in [-1, 1] to a posterior over latents that the backbone sees, and back.

``encode`` and ``decode`` work in the space of the backbone: raw latents are normalised as (z - shift) * scale, so nobody
multiplies by a scaling factor by hand. B batch, C channels of the data, c channels of the latents.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import Config
from ..core.errors import DitkitError
from ..core.files import atomic_folder, read_tensors, write_json, write_tensors

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents; ``std`` is 0 where the codec is deterministic."""

    mean: Tensor  # (B, c, h, w)
    std: Tensor  # (B, c, h, w)

    def sample(self, eps: Tensor) -> Tensor:
        """mean + std * eps, with eps standard normal of the same shape."""
        return self.mean + self.std * eps


class Codec(nn.Module):
    """A subclass gives ``encode_raw``, ``decode_raw`` and these attributes.

    Attributes:
        in_channels, channels: of the data and of the latents.
        factor: pixels of a side that one latent stands for.
        scale, shift: of the normalisation, one number or one a channel.
        has_folder: its configuration names a folder that holds the weights.
    """

    name: ClassVar[str] = ""
    config_class: ClassVar[type[Config]] = Config
    config: Any
    in_channels: int
    channels: int
    factor: int = 1
    has_folder: ClassVar[bool] = False
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)

    def encode(self, x: Tensor) -> Posterior:
        """x (B, C, H, W) in [-1, 1] -> posterior over (B, c, H / factor, W / factor)."""
        self.latent_shape(tuple(x.shape[1:]))
        mean, std = self.encode_raw(x)
        scale = _per_channel(self.scale, mean)
        return Posterior((mean - _per_channel(self.shift, mean)) * scale, std * scale)

    def decode(self, z: Tensor) -> Tensor:
        """Latents z (B, c, h, w) -> x (B, C, h * factor, w * factor), about in [-1, 1] and not clipped."""
        if z.dim() != 4 or z.shape[1] != self.channels:
            raise DitkitError(f"latents are {tuple(z.shape)}", allowed=f"(B, {self.channels}, h, w) for the codec {self.name!r}")
        return self.decode_raw(z / _per_channel(self.scale, z) + _per_channel(self.shift, z))

    def encode_raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> mean and std before normalisation."""
        raise NotImplementedError

    def decode_raw(self, z: Tensor) -> Tensor:
        """Latents before normalisation -> x."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where its weights are; the CPU where it has none."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, H, W) of the data -> (c, h, w). Raises DitkitError where a side is no multiple of ``factor``."""
        if len(shape) != 3 or shape[0] != self.in_channels:
            raise DitkitError(f"pictures are {shape}", allowed=f"({self.in_channels}, H, W) for the codec {self.name!r}")
        for side in shape[1:]:
            if side < 1 or side % self.factor:
                below = side // self.factor * self.factor
                near = f"{below} or {below + self.factor}" if below else f"{self.factor}"
                raise DitkitError(f"a side has {side} pixels", allowed=f"a multiple of {self.factor}, such as {near}")
        return self.channels, shape[1] // self.factor, shape[2] // self.factor

    def picture_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(c, h, w) of latents -> (C, H, W) of the data."""
        return self.in_channels, shape[1] * self.factor, shape[2] * self.factor

    def identity(self) -> dict[str, Any]:
        """What the latents depend on beside the weights, as plain data."""
        return {"name": self.name, "config": self.config.to_dict()}

    def content_hash(self) -> str:
        """SHA-256 of ``identity`` and of all weights: equal hashes, equal latents."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def write(self, folder: Path) -> None:
        """Write weights into an existing folder; ``codecs.save`` writes the rest."""
        if state := self.state_dict():
            write_tensors(folder / WEIGHTS, state)

    def read(self, folder: Path) -> None:
        """Read what ``write`` wrote, strictly."""
        if state := self.state_dict():
            shapes = {name: tuple(value.shape) for name, value in state.items()}
            self.load_state_dict(read_tensors(folder / WEIGHTS, shapes))


def save_codec(codec: Codec, folder: str | Path) -> None:
    """Write ``codec.json`` and the weights to ``folder``, atomically, with a manifest."""
    with atomic_folder(folder) as temporary:
        codec.write(temporary)
        write_json(temporary / "codec.json", {"format": 1, "name": codec.name, "config": codec.config.to_dict()})


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor | float:
    if len(values) == 1:  # a Python number is not rounded to the dtype of the latents
        return values[0]
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
