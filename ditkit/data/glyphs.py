"""The 80 pictures of the ``scenes`` world: characters of the typefaces that matplotlib ships, named for captions.

A glyph is one Unicode character. Its name in captions is its Unicode name made human ("BLACK CHESS KNIGHT" becomes "chess knight"),
its picture is its outline in one of five faces ("styles") drawn by Pillow. ``coverage`` gives that picture at four times the
resolution of the canvas, so that a scene can place it at quarter pixels with exact area antialiasing.
"""

from __future__ import annotations

import math
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ditkit.core.errors import DitkitError, nearest
from ditkit.core.lazy import require

SUPERSAMPLE = 4
"""Samples a pixel along each axis, and the number of positions inside a pixel that an object can take."""

STYLES = {
    "sans": "DejaVuSans-Bold.ttf",
    "serif": "DejaVuSerif-Bold.ttf",
    "mono": "DejaVuSansMono-Bold.ttf",
    "italic": "DejaVuSerif-BoldItalic.ttf",
    "stix": "STIXGeneralBol.ttf",
}
"""Font style -> file under matplotlib's ``fonts/ttf``."""

# The order is part of the held-out rule (scenes.held_out): append only. I and O are missing because they look like 1 and 0.
_GROUPS = {
    "letters": "ABCDEFGHJKLMNPQRSTUVWXYZ",
    "digits": "0123456789",
    "chess": "♚♛♜♝♞♟",
    "suits": "♠♥♦♣",
    "faces": "☻☹🐱🐵",
    "weather": "☀☁☂❄☾⚡",
    "arrows": "⬅➡⬆⬇",
    "shapes": "■●▲",
    "things": "★☎⚙⚓✈✉☛⚑⚒✔✘✿♬☯☮☢♻⚄⌂",
}
_GROUP_STYLES = {"letters": tuple(STYLES), "digits": tuple(STYLES), "arrows": ("sans", "serif")}

# Where the Unicode name, shortened by the rules of _human_name, is not what a person would say.
_SPOKEN = {
    "☾": "moon",
    "⚡": "lightning bolt",
    "▲": "triangle",
    "☛": "pointing hand",
    "✘": "cross mark",
    "✿": "flower",
    "♬": "music note",
    "☮": "peace sign",
    "☢": "radiation sign",
    "♻": "recycling sign",
    "⚄": "die",
}
_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Hairline drawings get a stroke, as a share of the font size; outlines that should read as solid shapes are filled.
_STROKE = {"⚡": 0.035, "☮": 0.015, "☹": 0.015, "❄": 0.01, "🐱": 0.015}
_FILLED = "☾⌂"


@dataclass(frozen=True)
class Glyph:
    """One kind of object: ``name`` in captions, the Unicode character, its group, the font styles that hold it."""

    name: str
    char: str
    group: str
    styles: tuple[str, ...]


def _human_name(char: str) -> str:
    """ "BLACK CHESS KNIGHT" -> "chess knight", "LATIN CAPITAL LETTER A" -> "letter A", "DIGIT SEVEN" -> "digit 7"."""
    if char in _SPOKEN:
        return _SPOKEN[char]
    words = unicodedata.name(char).lower().split(" with ")[0].split()
    words = [w for w in words if w not in ("latin", "capital", "black", "white", "heavy", "suit")]
    if words[0] in ("letter", "digit"):
        return f"{words[0]} {char}"
    if words[-1] == "arrow":
        return f"{words[0].removesuffix('wards')} arrow"
    return " ".join(words)


GLYPHS: tuple[Glyph, ...] = tuple(
    Glyph(_human_name(char), char, group, _GROUP_STYLES.get(group, ("sans",))) for group, chars in _GROUPS.items() for char in chars
)
GROUPS: tuple[str, ...] = tuple(_GROUPS)
GLYPH_INDEX: dict[str, int] = {glyph.name: i for i, glyph in enumerate(GLYPHS)}


def glyph(name: str) -> Glyph:
    """The glyph of that name; raises DitkitError naming the nearest one."""
    if name not in GLYPH_INDEX:
        raise DitkitError(f"glyph {name!r} is unknown", allowed="a name in ditkit.data.glyphs.GLYPHS", hint=nearest(name, GLYPH_INDEX))
    return GLYPHS[GLYPH_INDEX[name]]


class BoundedCache:
    """The most recently used arrays, at most ``max_bytes`` of them (the newest is always kept)."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._items: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of ``key``, made read-only by ``make()`` when it is not at hand."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
        made = make()
        made.setflags(write=False)
        with self._lock:
            kept = self._items.setdefault(key, made)
            self.bytes += made.nbytes if kept is made else 0
            while self.bytes > self.max_bytes and len(self._items) > 1:
                self.bytes -= self._items.popitem(last=False)[1].nbytes
        return kept


_drawings = BoundedCache(max_bytes=64 * 1024**2)


def coverage(name: str, style: str, length: int, rotation: int) -> np.ndarray:
    """The glyph's ink at ``SUPERSAMPLE`` times the canvas's resolution, cropped to the ink.

    Args:
        name: the glyph's name.
        style: a key of ``STYLES`` among the glyph's own.
        length: the longer side of the unrotated ink, in samples.
        rotation: whole degrees, counter-clockwise.

    Returns:
        uint8 (rows, columns), 255 where ink covers the whole sample. Read-only: it is shared.
    """
    return _drawings.get((name, style, length, rotation), lambda: _draw(glyph(name).char, style, length, rotation))


def _draw(char: str, style: str, length: int, rotation: int) -> np.ndarray:
    """An area average of a larger drawing, which is exact in size where a font's own sizes are whole and hinted."""
    em = 256
    while max((large := _ink(char, style, em)).shape) < length:
        em *= 2
    rows, columns = (max(1, round(n * length / max(large.shape))) for n in large.shape)
    picture = Image.fromarray(large).resize((columns, rows), Image.Resampling.BOX)
    if rotation:
        picture = picture.rotate(rotation, resample=Image.Resampling.BILINEAR, expand=True)
        picture = picture.crop(picture.getbbox())
    return np.array(picture)


def _ink(char: str, style: str, em: int) -> np.ndarray:
    """The character at ``em`` pixels a font unit, cropped to its ink, uint8."""
    return _drawings.get((char, style, em), lambda: np.array(_outline(char, style, em)))


def _outline(char: str, style: str, em: int) -> Image.Image:
    font = ImageFont.truetype(font_path(style), em, layout_engine=ImageFont.Layout.BASIC)
    stroke = round(_STROKE.get(char, 0.0) * em)
    left, top, right, bottom = font.getbbox(char, stroke_width=stroke)
    pad = 2
    picture = Image.new("L", (math.ceil(right - left) + 2 * pad, math.ceil(bottom - top) + 2 * pad))
    ImageDraw.Draw(picture).text((pad - left, pad - top), char, fill=255, font=font, stroke_width=stroke)
    if char in _FILLED:
        picture = _filled(picture)
    return picture.crop(picture.getbbox())


def _filled(outline: Image.Image) -> Image.Image:
    """Each row filled from its first to its last ink."""
    ink = np.asarray(outline)
    from_left = np.maximum.accumulate(ink, axis=1)
    from_right = np.maximum.accumulate(ink[:, ::-1], axis=1)[:, ::-1]
    return Image.fromarray(np.minimum(from_left, from_right))


@cache
def font_path(style: str) -> str:
    """The file of a font style inside the installed matplotlib; raises MissingDependency without matplotlib."""
    matplotlib: Any = require("matplotlib", "train")
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", STYLES[style]))
