"""Inputs of a call of the pipeline that attached methods take, such as a control picture: read, checked, encoded as data are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditkit.codecs.base import Codec
from ditkit.core.backbone import Backbone
from ditkit.core.errors import DitkitError


@dataclass(frozen=True)
class Inputs:
    """Latents (1 or all pictures, c, h, w) by name, and the record's entry: SHA-256 of the pictures that they were."""

    latents: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def rows(self, part: slice) -> dict[str, Tensor]:
        """Those of some of the pictures."""
        return {name: u if len(u) == 1 else u[part] for name, u in self.latents.items()}


def read_inputs(given: Mapping[str, Any] | None, model: Backbone, codec: Codec, size: tuple[int, int], count: int) -> Inputs:
    """What is given, for ``count`` pictures of ``size`` (height, width).

    Args:
        given: by name, a picture or one for each that is made: paths, PIL images, or a tensor (C, H, W) or (B, C, H, W) in [-1, 1].

    Raises:
        DitkitError: no attached method takes it, or number or size do not fit.
    """
    latents, hashes = {}, {}
    for name, value in (given or {}).items():
        if name not in model.inputs:
            raise DitkitError(f"no method takes the input {name!r}", allowed=f"{sorted(model.inputs)}, which those attached take")
        x = _pictures(name, value, codec.in_channels)
        if len(x) not in (1, count) or tuple(x.shape[1:]) != (codec.in_channels, *size):
            raise DitkitError(
                f"{name} is {tuple(x.shape)}", allowed=f"{(count, codec.in_channels, *size)}, or one picture", hint="resize it"
            )
        device = next(model.parameters()).device
        latents[name] = codec.to(device).encode(x.to(device)).mean
        hashes[name] = hashlib.sha256(x.numpy().tobytes()).hexdigest()
    return Inputs(latents, {"inputs": hashes} if hashes else {})


def check_remade(record: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> None:
    """Raise DitkitError where a picture is made again without the inputs that it was made with, or with others."""
    if (had := set(record.get("inputs", ()))) != set(inputs or ()):
        raise DitkitError(f"the picture was made with inputs {sorted(had)}", hint="remake(picture, inputs={...}) with the same pictures")


def _pictures(name: str, value: Any, channels: int) -> Tensor:
    """(B, C, H, W) float32 on the CPU in [-1, 1]."""
    if isinstance(value, Tensor):
        x = (value if value.dim() == 4 else value[None]).detach().float().cpu()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise DitkitError(f"{name} holds no picture", allowed="one, or one for each that is made")
        return torch.cat([_pictures(name, one, channels) for one in value])
    else:
        x = torch.from_numpy(_numbers(name, value, channels))[None]
    if not (x.isfinite().all() and x.abs().max() <= 1):
        raise DitkitError(f"{name} has values outside of [-1, 1]", hint="x / 127.5 - 1 of bytes")
    return x.contiguous()


def _numbers(name: str, value: Any, channels: int) -> np.ndarray:
    from PIL import Image

    from ditkit.data.transforms import decode

    if isinstance(value, str | Path):
        if not Path(value).is_file():
            raise DitkitError(f"{name}: {value} does not exist", hint="check the path")
        value = decode(Path(value).read_bytes(), channels)
    if not isinstance(value, Image.Image):
        raise DitkitError(f"{name} is a {type(value).__name__}", allowed="a path, a PIL image, a tensor, or a list of them")
    pixels = np.asarray(value.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 127.5 - 1
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))
