"""Drawing scenes: a pure function of (seed, split, index, config), and the pairs that training never sees.

What is drawn is valid by construction, so it is built with ``model_construct``: validating it again would take most of the time.
"""

from __future__ import annotations

import math
from functools import lru_cache

from ditkit.core.errors import ConfigError, DitkitError

from .glyphs import GLYPH_INDEX, GLYPHS
from .scene_random import Draws
from .scene_text import GAP, Description, Pair, neighbour_relations, parse_caption
from .scene_types import COLORS, Background, ColorName, Point, Scene, SceneConfig, SceneObject, Texture, reach, readable

SPLITS = ("train", "test", "heldout")
"""train: no held-out pair. test: every pair, held-out or not. heldout: held-out pairs only."""

_PROMPTS = 3  # the stream of scenes drawn for a given caption, after one stream a split
_TRIES = 80
_PROMPT_TRIES = 2000


def held_out(glyph: str, color: ColorName) -> bool:
    """Whether training never shows this glyph in this colour.

    The rule counts along the catalogue: (3 * glyph + color) % 10 == 0, which takes 64 of the 640 pairs, at most one colour of a glyph.
    """
    return (3 * GLYPH_INDEX[glyph] + list(COLORS).index(color)) % 10 == 0


def held_out_pairs() -> list[Pair]:
    """All held-out (colour, glyph) pairs."""
    return [(color, glyph.name) for glyph in GLYPHS for color in COLORS if held_out(glyph.name, color)]


def sample_scene(seed: int, index: int, split: str = "train", config: SceneConfig | None = None) -> Scene:
    """Scene ``index`` of a split. The same arguments give the same scene, whatever was drawn before.

    Args:
        seed: 0 <= seed < 2**64.
        index: 0 <= index < 2**63.
        split: one of ``SPLITS``.
        config: what to draw from.

    Raises:
        DitkitError: an unknown split, or a seed or index out of range.
        ConfigError: a config that leaves too few (colour, glyph) pairs for a background.
    """
    config = config or SceneConfig()
    _check(seed, index, split)
    draws = Draws(seed, SPLITS.index(split), index)
    count = config.num_objects[0] + draws.below(config.num_objects[1] - config.num_objects[0] + 1)
    background = _background(draws, draws.choice(_usable_backgrounds(config, split)), draws.choice(config.textures))
    pairs = _distinct(draws, _candidates(config, split, background.color), count)
    placed = _place(draws, pairs, config)
    return Scene.model_construct(objects=_moving(draws, placed, config), background=background)


def scene_from_caption(text: str, seed: int = 0, config: SceneConfig | None = None) -> Scene:
    """A scene that the caption describes exactly; ``seed`` varies what the caption leaves open.

    Raises DitkitError when the caption does not parse, names a colour that cannot be read on its background, or has no placement.
    """
    config, said = config or SceneConfig(), parse_caption(text)
    _check(seed, 0, "train")
    texture, color = said.background
    for pair in said.objects:
        if not readable(pair[0], color):
            raise DitkitError(f"a {pair[0]} {pair[1]} cannot be read on a {color} background", hint="choose another colour for one of them")
    draws = Draws(seed, _PROMPTS)
    background = _background(draws, color, texture)
    placed = _place_as_said(draws, said, config)
    return Scene.model_construct(objects=_moving(draws, placed, config), background=background)


def _check(seed: int, index: int, split: str) -> None:
    if split not in SPLITS:
        raise DitkitError(f"split {split!r} is unknown", allowed=", ".join(SPLITS))
    if not 0 <= seed < 2**64:
        raise DitkitError(f"seed is {seed}", allowed="0 to 2**64 - 1")
    if not 0 <= index < 2**63:
        raise DitkitError(f"index is {index}", allowed="0 to 2**63 - 1")


@lru_cache(maxsize=256)
def _candidates(config: SceneConfig, split: str, background: ColorName) -> tuple[Pair, ...]:
    """The (colour, glyph) pairs of a split that are readable on a background."""
    wanted = {"train": (False,), "test": (False, True), "heldout": (True,)}[split]
    return tuple(
        (color, glyph.name)
        for glyph in GLYPHS
        for color in config.colors
        if glyph.group in config.groups and readable(color, background) and held_out(glyph.name, color) in wanted
    )


@lru_cache(maxsize=64)
def _usable_backgrounds(config: SceneConfig, split: str) -> tuple[ColorName, ...]:
    usable = tuple(b for b in config.backgrounds if len(_candidates(config, split, b)) >= config.num_objects[1])
    if not usable:
        raise ConfigError(
            f"no background leaves {config.num_objects[1]} readable pairs of split {split!r} in {config!r}",
            hint="allow more groups, colors or backgrounds",
        )
    return usable


def _distinct(draws: Draws, pairs: tuple[Pair, ...], count: int) -> list[Pair]:
    chosen: list[Pair] = []
    while len(chosen) < count:
        pair = draws.choice(pairs)
        if pair not in chosen:
            chosen.append(pair)
    return chosen


def _background(draws: Draws, color: ColorName, texture: Texture) -> Background:
    scale, angle, seed = 3 + draws.below(4), 45 * draws.below(8), draws.below(2**32)
    return Background.model_construct(color=color, texture=texture, scale=scale, angle=angle, seed=seed)


def _place(draws: Draws, pairs: list[Pair], config: SceneConfig) -> tuple[SceneObject, ...]:
    """Objects inside the picture that hide no more of each other than ``overlap``; with clear relations if some try has them."""
    fallback: tuple[SceneObject, ...] = ()
    for _ in range(_TRIES):
        objects = _try_place(draws, pairs, config)
        if objects and (config.overlap > 0 or None not in neighbour_relations(objects)):
            return objects
        fallback = fallback or objects
    return fallback or _on_grid(draws, pairs, config)


def _place_as_said(draws: Draws, said: Description, config: SceneConfig) -> tuple[SceneObject, ...]:
    for _ in range(_PROMPT_TRIES):
        objects = _try_place(draws, list(said.objects), config)
        relations = neighbour_relations(objects)
        clear = () if None in relations else tuple(relations)
        if len(objects) == len(said.objects) and clear == said.relations:
            return objects
    raise DitkitError(f"no placement found for {str(said)!r}", hint="name fewer objects, or give a config with smaller sizes")


def _try_place(draws: Draws, pairs: list[Pair], config: SceneConfig) -> tuple[SceneObject, ...]:
    """One try: every object at a random place, or nothing if two of them collide."""
    spots: list[tuple[float, float, float, float, int]] = []
    for _ in pairs:
        size = draws.choice(config.sizes)
        rotation = 5 * (draws.below(2 * (config.max_rotation // 5) + 1) - config.max_rotation // 5)
        half = reach(size, rotation)
        n = config.places
        low, high = math.ceil(half * n - 0.5 - 1e-9), math.floor((1 - half) * n - 0.5 + 1e-9)  # the first cell of a centre, and the last
        if half > 0.5 or (n and low > high):
            return ()
        if n:
            x, y = ((low + draws.below(high - low + 1) + 0.5) / n for _ in "xy")
        else:
            x, y = draws.uniform(half, 1 - half), draws.uniform(half, 1 - half)
        if any(_hidden_share((x, y), half, (ox, oy), other) > config.overlap for ox, oy, other, _, _ in spots):
            return ()
        spots.append((x, y, half, size, rotation))
    if config.centred:
        dx, dy = (0.5 - (min(s[i] - s[2] for s in spots) + max(s[i] + s[2] for s in spots)) / 2 for i in (0, 1))
        spots = [(x + dx, y + dy, half, size, rotation) for x, y, half, size, rotation in spots]
    depths = draws.shuffled(range(len(pairs)))
    return tuple(
        _object(draws, pair, config, (x, y), size, rotation, depth) for pair, (x, y, _, size, rotation), depth in zip(pairs, spots, depths)
    )


def _hidden_share(a: Point, half_a: float, b: Point, half_b: float) -> float:
    """Share of the smaller of two upright squares that the other covers, both squares grown by half of ``GAP``."""
    half_a, half_b = half_a + GAP / 2, half_b + GAP / 2
    smaller = 2 * min(half_a, half_b)
    width, height = (min(half_a + half_b - abs(p - q), smaller) for p, q in zip(a, b))
    return max(width, 0.0) * max(height, 0.0) / smaller**2


def _on_grid(draws: Draws, pairs: list[Pair], config: SceneConfig) -> tuple[SceneObject, ...]:
    """The smallest size, upright, in the cells of a square grid in random order: always fits."""
    n = math.ceil(math.sqrt(len(pairs)))
    cells = draws.shuffled([((i + 0.5) / n, (j + 0.5) / n) for i in range(n) for j in range(n)])
    depths = draws.shuffled(range(len(pairs)))
    return tuple(_object(draws, pair, config, cell, min(config.sizes), 0, depth) for pair, cell, depth in zip(pairs, cells, depths))


def _object(draws: Draws, pair: Pair, config: SceneConfig, position: Point, size: float, rotation: int, depth: int) -> SceneObject:
    color, name = pair
    own = GLYPHS[GLYPH_INDEX[name]].styles
    style = draws.choice([s for s in own if s in config.styles] or own)
    return SceneObject.model_construct(
        glyph=name, color=color, size=size, style=style, rotation=rotation, position=position, velocity=(0.0, 0.0), depth=depth
    )


def _moving(draws: Draws, objects: tuple[SceneObject, ...], config: SceneConfig) -> tuple[SceneObject, ...]:
    """The objects with velocities that keep them inside the picture for ``num_frames`` frames."""
    if config.speed == 0:
        return objects
    frames = max(1, config.num_frames - 1)

    def component(start: float, half: float) -> float:
        low, high = (half - start) / frames, (1 - half - start) / frames
        return draws.uniform(max(low, -config.speed), min(high, config.speed))

    return tuple(o.model_copy(update={"velocity": (component(o.position[0], o.reach), component(o.position[1], o.reach))}) for o in objects)
