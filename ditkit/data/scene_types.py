"""What a scene is: plain, strict, frozen data from which picture, caption, boxes, masks and video all follow.

Coordinates are those of the unit square, x to the right and y down, so that one scene renders at any size.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ditkit.core.config import Config
from ditkit.core.errors import nearest

from .glyphs import GLYPH_INDEX, GLYPHS, GROUPS, STYLES

ColorName = Literal["red", "orange", "yellow", "green", "blue", "purple", "white", "black"]
Texture = Literal["plain", "striped", "checkered", "shaded", "mottled"]
TEXTURES: tuple[Texture, ...] = ("plain", "striped", "checkered", "shaded", "mottled")

COLORS: dict[ColorName, tuple[int, int, int]] = {
    "red": (214, 32, 40),
    "orange": (247, 128, 20),
    "yellow": (255, 220, 40),
    "green": (28, 145, 60),
    "blue": (30, 90, 225),
    "purple": (165, 48, 186),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
"""Colour name -> RGB of an object."""

BACKGROUNDS: dict[ColorName, tuple[int, int, int]] = {
    "red": (224, 102, 98),
    "orange": (240, 160, 88),
    "yellow": (250, 228, 130),
    "green": (112, 188, 124),
    "blue": (120, 174, 244),
    "purple": (196, 158, 230),
    "white": (244, 244, 240),
    "black": (34, 35, 42),
}
"""Colour name -> RGB of a background: softer than an object of that name, so that objects stand out."""

PLAIN_CONTRAST, MIN_CONTRAST, MIN_LIGHTNESS = 60.0, 40.0, 10.0
"""An object is readable on a tone at a CIE 1976 colour difference of 60, or of 40 if L* differs by 10."""

Point = tuple[float, float]
MAX_OBJECTS = 9


class SceneObject(Config):
    """One glyph in the scene."""

    glyph: str = Field(description="name of the glyph, as in ditkit.data.glyphs.GLYPHS")
    color: ColorName = Field(description="colour name")
    size: float = Field(0.36, gt=0, le=1, description="longer side of the unrotated ink, as a share of the picture's side")
    style: str = Field("sans", description="font style, one of the glyph's own")
    rotation: int = Field(0, ge=-180, le=180, description="whole degrees, counter-clockwise")
    position: Point = Field((0.5, 0.5), description="centre of the rotated ink's bounding box at frame 0: x, y in the unit square")
    velocity: Point = Field((0.0, 0.0), description="change of position a frame")
    depth: int = Field(0, ge=0, description="0 is nearest; a nearer object hides a farther one")

    @model_validator(mode="after")
    def _known_glyph_and_style(self) -> Self:
        if self.glyph not in GLYPH_INDEX:
            raise ValueError(f"glyph {self.glyph!r} is unknown; {nearest(self.glyph, GLYPH_INDEX) or 'see ditkit.data.glyphs.GLYPHS'}")
        styles = GLYPHS[GLYPH_INDEX[self.glyph]].styles
        if self.style not in styles:
            raise ValueError(f"style {self.style!r} does not draw {self.glyph!r}: use {' or '.join(styles)}")
        return self

    def position_at(self, frame: float) -> Point:
        """Position ``frame`` frames after the start: position + velocity * frame."""
        return self.position[0] + self.velocity[0] * frame, self.position[1] + self.velocity[1] * frame

    @property
    def reach(self) -> float:
        """Half the side of an upright square around ``position`` that holds the ink, whatever the glyph."""
        return reach(self.size, self.rotation)


@lru_cache(maxsize=1024)
def reach(size: float, rotation: float) -> float:
    """Half the bounding square of a square of that side, rotated: size / 2 (abs cos + abs sin)."""
    angle = math.radians(rotation)
    return size / 2 * (abs(math.cos(angle)) + abs(math.sin(angle)))


class Background(Config):
    """A two-tone texture of one colour name."""

    color: ColorName = Field(description="colour name")
    texture: Texture = Field("plain", description="pattern")
    scale: int = Field(4, ge=1, le=32, description="stripes, checks or blotches along a side")
    angle: int = Field(0, ge=0, lt=360, description="direction of stripes, checks and shading, degrees")
    seed: int = Field(0, ge=0, lt=2**32, description="phase of the pattern and the blotches")


class Scene(Config):
    """Objects in caption order, before a background."""

    objects: tuple[SceneObject, ...] = Field(max_length=MAX_OBJECTS, description="objects, in the order that captions name them")
    background: Background = Field(description="background")

    @model_validator(mode="after")
    def _one_object_a_depth(self) -> Self:
        depths = [o.depth for o in self.objects]
        if len(set(depths)) != len(depths):
            raise ValueError(f"two objects share a depth: {depths}")
        return self

    @property
    def front_to_back(self) -> list[int]:
        """Indices of the objects, nearest first."""
        return sorted(range(len(self.objects)), key=lambda k: self.objects[k].depth)

    def without(self, k: int) -> Scene:
        """The same scene with object ``k`` taken away."""
        return self.model_copy(update={"objects": self.objects[:k] + self.objects[k + 1 :]})


class SceneConfig(Config):
    """What ``sample_scene`` draws from."""

    num_objects: tuple[int, int] = Field((1, 2), description="fewest and most objects")
    groups: tuple[str, ...] = Field(GROUPS, min_length=1, description="glyph groups")
    colors: tuple[ColorName, ...] = Field(tuple(COLORS), min_length=1, description="colour names of objects")
    backgrounds: tuple[ColorName, ...] = Field(tuple(BACKGROUNDS), min_length=1, description="colour names of backgrounds")
    textures: tuple[Texture, ...] = Field(TEXTURES, min_length=1, description="background patterns")
    styles: tuple[str, ...] = Field(tuple(STYLES), min_length=1, description="font styles; a glyph that has none of them keeps its own")
    sizes: tuple[float, ...] = Field((0.3, 0.36, 0.42), min_length=1, description="sizes of objects")
    max_rotation: int = Field(15, ge=0, le=180, description="largest rotation either way, degrees, drawn in steps of 5")
    places: int = Field(0, ge=0, le=64, description="centres are the middles of places x places equal cells; 0: anywhere")
    centred: bool = Field(False, description="the objects are moved together until the box around them has its middle in the picture's")
    overlap: float = Field(0.0, ge=0, le=1, description="largest share of an object's square that a nearer square may hide")
    num_frames: int = Field(1, ge=1, description="frames during which every object stays inside the picture")
    speed: float = Field(0.0, ge=0, le=1, description="largest change of x and of y a frame")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        low, high = self.num_objects
        if not 1 <= low <= high <= MAX_OBJECTS:
            raise ValueError(f"num_objects is {self.num_objects}: wants 1 <= fewest <= most <= {MAX_OBJECTS}")
        for what, names, known in (("group", self.groups, GROUPS), ("style", self.styles, tuple(STYLES))):
            for name in names:
                if name not in known:
                    raise ValueError(f"{what} {name!r} is unknown: one of {', '.join(known)}")
        if not all(0 < size <= 0.8 for size in self.sizes):
            raise ValueError(f"sizes are {self.sizes}: each above 0 and at most 0.8")
        fits = 0.9 / math.ceil(math.sqrt(high))
        if min(self.sizes) > fits:
            raise ValueError(f"{high} objects need a size of at most {fits:.2f} among sizes, got {self.sizes}")
        return self


def tones(color: ColorName) -> tuple[np.ndarray, np.ndarray]:
    """The lighter and the darker RGB of a textured background, float64 (3,)."""
    base = np.array(BACKGROUNDS[color], dtype=np.float64)
    return base + 0.12 * (255 - base), base * 0.9


@cache
def readable(color: ColorName, background: ColorName) -> bool:
    """Whether an object of that colour stands out from that background: it has another name and differs from both tones."""
    if color == background:
        return False
    ink = _lab(np.array(COLORS[color], dtype=np.float64))
    for step in (ink - _lab(tone) for tone in tones(background)):
        needed = MIN_CONTRAST if abs(step[0]) >= MIN_LIGHTNESS else PLAIN_CONTRAST
        if np.linalg.norm(step) < needed:
            return False
    return True


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of an sRGB colour in 0..255 (IEC 61966-2-1; CIE 15)."""
    c = rgb / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    xyz = to_xyz @ linear / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
