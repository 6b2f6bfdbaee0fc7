"""Pictures for a page: previews, sheets, where two differ; and as data URIs, which need no second request and no file."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ditkit.codecs.base import Codec
from ditkit.output import enlarge, grid, save_png, to_images

SMALL = 384  # a sheet below this many pixels is enlarged, pixel by pixel
PREVIEW = 640  # a preview above this many is reduced
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 200))  # black, violet, red, orange, pale yellow


def preview(codec: Codec, latents: Tensor) -> Image.Image:
    """Foreseen data (B, c, h, w) as a sheet, small enough to be sent many times a second; what is not finite is grey."""
    x = codec.to(latents.device).decode(latents)
    image = sheet(to_images(torch.nan_to_num(x, 0.0, 1.0, -1.0)))
    image.thumbnail((PREVIEW, PREVIEW))
    return image


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """A grid of pictures; small ones are enlarged by a whole number."""
    image = grid(images)
    return enlarge(image, max(1, -(-SMALL // max(image.size))))


def heat(output: Tensor, reference: Tensor) -> tuple[Image.Image, float]:
    """Where two (B, C, H, W) differ, as a sheet: the largest difference over channels, from black (none) to pale yellow (the largest)."""
    difference = (output - reference).abs().amax(1)
    top = float(difference.max())
    place = difference / (top or 1.0) * (len(HEAT) - 1)
    low = place.floor().clamp(max=len(HEAT) - 2).long()
    colours = torch.tensor(HEAT, dtype=torch.float32)
    mixed = torch.lerp(colours[low], colours[low + 1], (place - low).unsqueeze(-1))
    return sheet([Image.fromarray(u.numpy()) for u in mixed.round().to(torch.uint8)]), top


def png_uri(image: Image.Image, record: Mapping[str, Any] | None = None) -> str:
    """``data:image/png``; with a record, as ``ditkit sample`` saves it: ``--remake`` reads it."""
    if record is None:
        file = io.BytesIO()
        image.save(file, "PNG")
        return _uri("png", file.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        save_png(path, image, dict(record))
        return _uri("png", path.read_bytes())


def jpeg_uri(image: Image.Image) -> str:
    """``data:image/jpeg``."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return _uri("jpeg", file.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
