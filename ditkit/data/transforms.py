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
from pydantic import Field

from ditkit.core.config import Config
from ditkit.core.errors import DitkitError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # no others: some parsers of Pillow start other programs
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class Transform(Config):
    """What is done to every picture of a set."""

    resolution: int | None = Field(None, ge=1, le=16384, description="side of the square pictures; absent: as they are, all of one size")
    channels: Literal[1, 3] = Field(3, description="3: colour, 1: grey")
    crop: Literal["centre", "random"] = Field(
        "centre", description="which square of a picture that is longer than wide, or wider than long"
    )
    flip: bool = Field(False, description="mirror half of the pictures, drawn anew at every step")


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


def cover(image: Image.Image, side: int) -> Image.Image:
    """Scale so that the shorter side is ``side``: halved by box averages while it is at least twice that, then bicubic.

    The rule of "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233, which DiT and its evaluation sets use.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def square(image: Image.Image, side: int, where: tuple[float, float] | None = None) -> Image.Image:
    """A square of ``side`` pixels: the centre, or the one at ``where`` (x, y in [0, 1) of the room there is)."""
    room = (image.width - side, image.height - side)
    left, top = (r // 2 for r in room) if where is None else (int(w * (r + 1)) for w, r in zip(where, room))
    return image.crop((left, top, left + side, top + side))


def to_numbers(image: Image.Image) -> np.ndarray:
    """(C, H, W) float32: byte 0 is -1, byte 255 is 1."""
    values = np.asarray(image, np.float32) / np.float32(127.5) - np.float32(1)
    return values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))


def apply(transform: Transform, raw: bytes, where: tuple[float, float] | None = None) -> np.ndarray:
    """The bytes of a file -> (C, H, W) float32 in [-1, 1], not mirrored. ``where``: see ``square``."""
    image = decode(raw, transform.channels)
    if transform.resolution is not None:
        image = square(cover(image, transform.resolution), transform.resolution, where)
    return to_numbers(image)


def mirrored(indices: Sequence[int] | np.ndarray, seed: int, step: int) -> Tensor:
    """Which of these samples are mirrored at this step, (B,) bool: a fair coin for each (seed, step, index)."""
    from ditkit.diffusion.noise import uniform

    return uniform(sample_seeds(indices, seed), step, "flip") < 0.5


def crop_places(indices: Sequence[int] | np.ndarray, seed: int, step: int) -> Tensor:
    """(B, 2) places for ``square``, uniform in [0, 1)."""
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
