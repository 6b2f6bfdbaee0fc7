"""From a scene to pixels: the picture, and exact masks and boxes of what is visible.

With alpha_k the share of a pixel that the ink of object k covers, its visible share is
v_k = alpha_k * prod(1 - alpha_j for each nearer j), the picture is sum_k v_k color_k + (1 - sum_k v_k) background, and a pixel belongs
to object k where v_k > 1/2. So a pixel has one owner at most. (Painting back to front gives the same picture.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ditkit.core.errors import DitkitError

from .glyphs import SUPERSAMPLE, coverage
from .scene_random import Draws
from .scene_text import caption
from .scene_types import BACKGROUNDS, COLORS, Background, Scene, SceneObject, tones

MIN_SIZE, MAX_SIZE = 8, 1024
Layer = tuple[tuple[slice, slice], np.ndarray]
"""The pixels that an object may touch (rows, columns), and the share of each that its ink covers."""


@dataclass(frozen=True)
class RenderedScene:
    """One frame of a scene.

    Attributes:
        image: uint8 (size, size, 3), RGB.
        masks: bool (objects, size, size), the pixels that show each object; disjoint.
        boxes: int64 (objects, 4), tight bounds x0, y0, x1, y1 of each mask in pixels, x1 and y1 exclusive; zeros where nothing is visible.
        front_to_back: indices of the objects, nearest first.
        caption: the scene in words.
        attributes: for each object glyph, color, size, style, rotation, position, velocity and depth.
    """

    scene: Scene
    frame: float
    image: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray

    @property
    def front_to_back(self) -> list[int]:
        return self.scene.front_to_back

    @property
    def caption(self) -> str:
        return caption(self.scene, self.frame)

    @property
    def attributes(self) -> list[dict]:
        return [o.to_dict() for o in self.scene.objects]


def render(scene: Scene, size: int, frame: float = 0) -> RenderedScene:
    """Draw ``scene`` at ``size`` x ``size`` pixels, ``frame`` frames after its start; raises DitkitError for a size out of range."""
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise DitkitError(f"size is {size}", allowed=f"{MIN_SIZE} to {MAX_SIZE} pixels")
    order = scene.front_to_back
    layers = {k: _place(scene.objects[k], size, frame) for k in order}
    canvas = draw_background(scene.background, size)
    for k in reversed(order):
        window, alpha = layers[k]
        under = canvas[:, *window]
        under += alpha * (_rgb(COLORS[scene.objects[k].color]) - under)
    masks, boxes = _visible(layers, size)
    return RenderedScene(scene, frame, np.ascontiguousarray((canvas + 0.5).astype(np.uint8).transpose(1, 2, 0)), masks, boxes)


def _visible(layers: dict[int, Layer], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks and boxes of objects, given front to back with their index."""
    masks = np.zeros((len(layers), size, size), dtype=bool)
    boxes = np.zeros((len(layers), 4), dtype=np.int64)
    uncovered = np.ones((size, size))
    for k, (window, alpha) in layers.items():
        shown: np.ndarray = alpha * uncovered[window] > 0.5
        uncovered[window] *= 1 - alpha
        masks[k][window] = shown
        boxes[k] = bounds(shown, window[1].start, window[0].start)
    return masks, boxes


def _rgb(color: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.asarray(color, dtype=np.float64)[:, None, None]


def bounds(mask: np.ndarray, left: int = 0, top: int = 0) -> tuple[int, int, int, int]:
    """Tight bounds (x0, y0, x1, y1), x1 and y1 exclusive, of a bool (rows, columns) mask whose corner is at (left, top); zeros if empty."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    if rows.size == 0:
        return 0, 0, 0, 0
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def _place(thing: SceneObject, size: int, frame: float) -> Layer:
    """The pixels that an object may touch, and the share of each that its ink covers, in steps of 1/255."""
    side = size * SUPERSAMPLE
    ink = coverage(thing.glyph, thing.style, max(SUPERSAMPLE, round(thing.size * side)), thing.rotation)
    x, y = thing.position_at(frame)
    rows, from_row, to_row = _span(y * side, ink.shape[0], size)
    columns, from_column, to_column = _span(x * side, ink.shape[1], size)
    samples = np.zeros(((rows.stop - rows.start) * SUPERSAMPLE, (columns.stop - columns.start) * SUPERSAMPLE), dtype=np.uint16)
    samples[to_row, to_column] = ink[from_row, from_column]
    total = samples.reshape(rows.stop - rows.start, SUPERSAMPLE, columns.stop - columns.start, SUPERSAMPLE).sum((1, 3), dtype=np.uint32)
    return (rows, columns), ((total + SUPERSAMPLE**2 // 2) // SUPERSAMPLE**2) / 255


def _span(center: float, length: int, size: int) -> tuple[slice, slice, slice]:
    """Along one axis, for ``length`` samples around ``center``: the pixels touched, the samples of the ink that are inside, their place."""
    start = round(center - length / 2)
    first = min(max(start // SUPERSAMPLE, 0), size)
    last = min(max(-(-(start + length) // SUPERSAMPLE), first), size)
    low, high = max(start, first * SUPERSAMPLE), min(start + length, last * SUPERSAMPLE)
    high = max(low, high)
    offset = first * SUPERSAMPLE
    return slice(first, last), slice(low - start, high - start), slice(low - offset, high - offset)


def draw_background(background: Background, size: int) -> np.ndarray:
    """The textured background, float64 (3, size, size) in 0..255."""
    if background.texture == "plain":
        return np.tile(_rgb(BACKGROUNDS[background.color]), (1, size, size))
    light, dark = tones(background.color)
    return _rgb(light) + _PATTERNS[background.texture](background, size) * _rgb(dark - light)


def _striped(background: Background, size: int) -> np.ndarray:
    u, _ = _rotated_grid(size, background.angle)
    return _square_wave(u, background.scale, size, Draws(background.seed).uniform())


def _checkered(background: Background, size: int) -> np.ndarray:
    u, v = _rotated_grid(size, background.angle)
    draws = Draws(background.seed)
    a, b = (_square_wave(w, background.scale / 2, size, draws.uniform()) for w in (u, v))
    return a + b - 2 * a * b


def _shaded(background: Background, size: int) -> np.ndarray:
    u, _ = _rotated_grid(size, background.angle)
    extent = _extent(background.angle)
    return 0.5 + u / (2 * extent)


def _mottled(background: Background, size: int) -> np.ndarray:
    """Blotches: bilinear interpolation of a lattice of uniform numbers."""
    n = 2 * background.scale
    lattice = Draws(background.seed).uniforms((n + 1) ** 2).reshape(n + 1, n + 1)
    weights = _interpolation(size, n)
    return weights @ lattice @ weights.T


_PATTERNS = {"striped": _striped, "checkered": _checkered, "shaded": _shaded, "mottled": _mottled}


def _extent(angle: float) -> float:
    """Largest coordinate along a direction at ``angle`` degrees inside the unit square around the origin."""
    return float(abs(np.cos(np.radians(angle))) + abs(np.sin(np.radians(angle)))) / 2


@lru_cache(maxsize=64)
def _rotated_grid(size: int, angle: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the pixel centres, -1/2..1/2, along ``angle`` and across it: two (size, size)."""
    line = (np.arange(size) + 0.5) / size - 0.5
    x, y = line[None, :], line[:, None]
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return x * c + y * s, y * c - x * s


@lru_cache(maxsize=64)
def _interpolation(size: int, cells: int) -> np.ndarray:
    """Linear interpolation from ``cells`` + 1 lattice points to pixel centres: (size, cells + 1)."""
    at = (np.arange(size) + 0.5) / size * cells
    return np.maximum(0.0, 1 - np.abs(at[:, None] - np.arange(cells + 1)))


def _square_wave(u: np.ndarray, periods: float, size: int, phase: float) -> np.ndarray:
    """0 and 1 by turns, ``periods`` times a unit of ``u``, with edges one pixel wide."""
    triangle = np.abs(((u * periods + phase) % 1.0) - 0.5) - 0.25
    return np.clip(0.5 + triangle * (size / periods), 0, 1)
