"""What sampling returns, and pictures that carry in their metadata what remakes exactly them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from ditkit.core.errors import DitkitError
from ditkit.core.files import atomic_file

KEY = "ditkit"  # of the PNG text chunk
PER_PICTURE = {"class_labels": "class_label", "prompts": "prompt", "negative_prompts": "negative_prompt", "seeds": "seed"}


@dataclass(frozen=True)
class Output:
    """Samples of one call.

    Attributes:
        x: (B, C, H, W) in [-1, 1], float32 on the CPU.
        images: one PIL image a sample. Data that are neither grey nor RGB are shown as their channels side by side.
        seeds: seed of each picture; with it and its label or prompt the picture is made again alone.
        record: what was asked, with ``class_labels`` or ``prompts``, and ``seeds``, of all pictures.
        report: what it cost (``seconds``, ``evaluations``) and each method's figures.
    """

    x: Tensor
    images: list[Image.Image]
    seeds: list[int]
    record: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)

    def picture_record(self, k: int) -> dict[str, Any]:
        """What remakes picture k alone."""
        return {PER_PICTURE.get(key, key): value[k] if key in PER_PICTURE else value for key, value in self.record.items()}

    def save(self, path: str | Path, zoom: int = 1) -> None:
        """One PNG with all pictures in a grid, row by row; ``zoom`` repeats each pixel."""
        record = self.record if len(self.images) > 1 else self.picture_record(0)
        save_png(path, enlarge(grid(self.images), zoom), record)

    def save_each(self, folder: str | Path, zoom: int = 1) -> list[Path]:
        """One PNG for each picture, named by its number and seed."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = [Path(folder) / f"{k:05d}-seed{seed}.png" for k, seed in enumerate(self.seeds)]
        for k, path in enumerate(paths):
            save_png(path, enlarge(self.images[k], zoom), self.picture_record(k))
        return paths


def to_images(x: Tensor) -> list[Image.Image]:
    """x (B, C, H, W) in [-1, 1] -> 8-bit images. Raises DitkitError if a value is not finite: it would become black, silently."""
    if not bool(torch.isfinite(x).all()):
        raise DitkitError("the pixels hold NaN or infinity", hint="no picture is made of them")
    levels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    if x.shape[1] == 3:
        return [Image.fromarray(u.permute(1, 2, 0).contiguous().numpy()) for u in levels]
    return [Image.fromarray(torch.cat(list(u), 1).contiguous().numpy()) for u in levels]


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size, row by row in a near-square grid, an eighth of their side apart on grey."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    gap = max(1, min(width, height) // 8) if len(images) > 1 else 0
    size = (columns * (width + gap) - gap, math.ceil(len(images) / columns) * (height + gap) - gap)
    sheet = Image.new(images[0].mode, size, {"RGB": (128,) * 3}.get(images[0].mode, 128))
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * (width + gap), k // columns * (height + gap)))
    return sheet


def enlarge(image: Image.Image, zoom: int) -> Image.Image:
    """Each pixel repeated ``zoom`` times in both directions."""
    if zoom < 1:
        raise DitkitError(f"zoom is {zoom}", allowed="1 or more")
    return image if zoom == 1 else image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def save_png(path: str | Path, image: Image.Image, record: dict[str, Any]) -> None:
    """A PNG with the record in its metadata, written atomically."""
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(record, allow_nan=False))
    if record.get("licence"):
        info.add_text("Copyright", f"{record.get('credit', '')}, {record['licence']}".lstrip(", "))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        image.save(file, "PNG", pnginfo=info)


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in a PNG that ditkit saved. Raises DitkitError for other files."""
    try:
        with Image.open(path) as image:
            record = json.loads(image.info[KEY])
    except (OSError, KeyError, ValueError, TypeError, AttributeError, SyntaxError) as error:
        raise DitkitError(f"{path} carries no record ({type(error).__name__})", allowed="a PNG saved by ditkit") from None
    if not isinstance(record, dict):
        raise DitkitError(f"{path} carries no record", allowed="a PNG saved by ditkit")
    return record
