"""From the bytes of a picture file to numbers: orientation, colour, resize-to-cover, crop, flip.

Random choices are pure functions of (seed, step, index of the sample), so they never depend on the batch or on a resume.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field, model_validator

from ditkit.core.config import Config
from ditkit.core.errors import DitkitError

from .buckets import Buckets, Size

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # no others: some parsers of Pillow start other programs
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class Transform(Config):
    """What is done to every picture of a set."""

    resolution: int | None = Field(None, ge=1, le=16384, description="side of the square pictures; absent: as they are, all of one size")
    buckets: Buckets | None = Field(None, description="sizes of about equal area, for pictures of many shapes, in place of a resolution")
    channels: Literal[1, 3] = Field(3, description="3: colour, 1: grey")
    crop: Literal["centre", "random"] = Field("centre", description="which part of a picture that is longer or wider than its size")
    flip: bool = Field(False, description="mirror half of the pictures, drawn anew at every step")

    @model_validator(mode="after")
    def _one_rule(self) -> Transform:
        if self.resolution is not None and self.buckets is not None:
            raise ValueError("resolution and buckets are both given: one of them says the sizes")
        return self


class Refused(ValueError):
    """A whole picture that is not taken; the message is the reason."""


class _Quiet:
    """Pillow's warnings (large pictures, odd metadata) off, while any thread is inside: our scan says what matters.

    ``warnings.catch_warnings`` alone would leave them off for ever when two threads leave in the order they came.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._saved = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.__exit__(None, None, None)


quiet = _Quiet()


def open_header(raw: bytes) -> Image.Image:
    """The picture with nothing but its header read. Raises what Pillow raises."""
    return Image.open(io.BytesIO(raw), formats=FORMATS)


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation swaps width and height. A PNG is decoded by this: its EXIF data may stand at the end."""
    return image.getexif().get(0x0112) in _TURNED


def decode(raw: bytes, channels: int = 3) -> Image.Image:
    """The upright picture as RGB (``channels`` 3) or grey (1); transparency is laid over white. Raises what Pillow raises."""
    image = open_header(raw)
    check_mode(image)
    return _as_mode(ImageOps.exif_transpose(image), "RGB" if channels == 3 else "L")


def check_mode(image: Image.Image) -> None:
    """Raise Refused for pixels that have no agreed brightness."""
    if image.mode == "F":
        raise Refused("has floating-point pixels of unknown range")


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips to white
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def scalings(size: tuple[int, int], wanted: Size) -> list[tuple[int, int]]:
    """The sizes (width, height) that a picture goes through until it just covers ``wanted`` (height, width): halves, then the last one."""
    (width, height), (h, w), found = size, wanted, []
    while height >= 2 * h and width >= 2 * w:
        width, height = width // 2, height // 2
        found.append((width, height))
    scale = max(h / height, w / width)
    return [*found, (round(width * scale), round(height * scale))]


def cover(image: Image.Image, size: Size) -> Image.Image:
    """Scale so that the picture just covers ``size`` (height, width): halved by box averages while it is at least twice that, then bicubic.

    The rule of "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233, which DiT and its evaluation sets use for squares.
    """
    *halves, last = scalings(image.size, size)
    for half in halves:
        image = image.resize(half, Image.Resampling.BOX)
    return image.resize(last, Image.Resampling.BICUBIC)


def corner(covering: tuple[int, int], size: Size, where: tuple[float, float] | None = None) -> tuple[int, int]:
    """(left, top) of the part of ``size`` in a picture (width, height): the centre, or ``where`` (x, y in [0, 1) of the room there is)."""
    room = (covering[0] - size[1], covering[1] - size[0])
    left, top = (r // 2 for r in room) if where is None else (int(w * (r + 1)) for w, r in zip(where, room))
    return left, top


def cut(image: Image.Image, size: Size, where: tuple[float, float] | None = None) -> Image.Image:
    """The part of ``size`` (height, width) at ``corner``."""
    left, top = corner(image.size, size, where)
    return image.crop((left, top, left + size[1], top + size[0]))


def to_numbers(image: Image.Image) -> np.ndarray:
    """(C, H, W) float32: byte 0 is -1, byte 255 is 1."""
    values = np.asarray(image, np.float32) / np.float32(127.5) - np.float32(1)
    return values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))


def apply(transform: Transform, raw: bytes, where: tuple[float, float] | None = None, size: Size | None = None) -> np.ndarray:
    """The bytes of a file -> (C, H, W) float32 in [-1, 1], not mirrored. ``where``: see ``corner``; ``size``: by default the resolution."""
    image = decode(raw, transform.channels)
    if size is None and transform.resolution is not None:
        size = (transform.resolution, transform.resolution)
    return to_numbers(image if size is None else cut(cover(image, size), size, where))


def mirrored(indices: Sequence[int] | np.ndarray, seed: int, step: int) -> Tensor:
    """Which of these samples are mirrored at this step, (B,) bool: a fair coin for each (seed, step, index)."""
    from ditkit.diffusion.noise import uniform

    return uniform(sample_seeds(indices, seed), step, "flip") < 0.5


def crop_places(indices: Sequence[int] | np.ndarray, seed: int, step: int) -> Tensor:
    """(B, 2) places for ``cut``, uniform in [0, 1)."""
    from ditkit.diffusion.noise import uniform

    return uniform(sample_seeds(indices, seed), step, "crop", (2,))


def sample_seeds(indices: Sequence[int] | np.ndarray, seed: int) -> list[int]:
    """The seed of each sample: that of sample k is seed + k."""
    return [seed + int(i) for i in indices]


def check_indices(indices: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """As an int64 array; raises DitkitError where one is outside the set."""
    found = np.asarray(indices, np.int64).reshape(-1)
    if len(found) and not 0 <= found.min() <= found.max() < length:
        bad = int(found.min() if found.min() < 0 else found.max())
        raise DitkitError(f"there is no sample {bad}", allowed=f"0 to {length - 1}")
    return found
