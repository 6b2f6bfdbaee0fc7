"""Scenes in words and back.

Grammar (every caption follows from the scene alone, and parses back to the same description):

    caption    = things " on " background
    things     = thing | thing relation thing {", which is " relation thing} ["," if more than two]
               | thing {", " thing} " and " thing                                  (where not every neighbour has a clear relation)
    thing      = ("a" | "an") color glyph
    relation   = "left of" | "right of" | "above" | "below"
    background = ("a" | "an") [texture] color "background"
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ditkit.core.errors import DitkitError, nearest

from .glyphs import GLYPH_INDEX
from .scene_types import BACKGROUNDS, COLORS, TEXTURES, ColorName, Scene, SceneObject, Texture

Pair = tuple[ColorName, str]
"""(colour, glyph), as in a caption."""
Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
GAP = 0.02
"""Clear space between two related objects, as a share of the side: more than what snapping to quarter pixels moves at 32 pixels."""
DOMINANCE = 1.5
"""How many times farther apart two objects are along the named direction than across it."""


@dataclass(frozen=True)
class Description:
    """What a caption says.

    Attributes:
        objects: (colour, glyph) of each object, in order.
        relations: of each object to the next one; empty when they are only listed.
        background: (texture, colour).
    """

    objects: tuple[Pair, ...]
    relations: tuple[Relation, ...]
    background: tuple[Texture, ColorName]

    def __str__(self) -> str:
        things = [_with_article(f"{color} {glyph}") for color, glyph in self.objects]
        if self.relations:
            text = f"{things[0]} {self.relations[0]} {things[1]}"
            text += "".join(f", which is {r} {thing}" for r, thing in zip(self.relations[1:], things[2:]))
            text += "," if len(things) > 2 else ""
        else:
            text = ", ".join(things[:-1]) + " and " + things[-1] if len(things) > 1 else "".join(things)
        texture, color = self.background
        surface = _with_article(f"{color} background" if texture == "plain" else f"{texture} {color} background")
        return f"{text} on {surface}" if things else surface


def relation(a: SceneObject, b: SceneObject, frame: float = 0) -> Relation | None:
    """Where ``a`` is as seen from ``b``, or None when that is not clear.

    "a left of b": a ends before b begins, by ``GAP`` or more, and their centres are ``DOMINANCE`` times farther apart in x than in y.
    """
    (ax, ay), (bx, by) = a.position_at(frame), b.position_at(frame)
    dx, dy, apart = bx - ax, by - ay, a.reach + b.reach + GAP
    if abs(dx) >= max(apart, DOMINANCE * abs(dy)):
        return "left of" if dx > 0 else "right of"
    if abs(dy) >= max(apart, DOMINANCE * abs(dx)):
        return "above" if dy > 0 else "below"
    return None


def describe(scene: Scene, frame: float = 0) -> Description:
    """The description of a scene at one frame. Relations are named when every neighbour in caption order has a clear one."""
    relations = neighbour_relations(scene.objects, frame)
    clear = tuple(r for r in relations if r)
    return Description(
        tuple((o.color, o.glyph) for o in scene.objects),
        clear if len(clear) == len(relations) else (),
        (scene.background.texture, scene.background.color),
    )


def neighbour_relations(objects: tuple[SceneObject, ...], frame: float = 0) -> list[Relation | None]:
    """The relation of each object to the next one."""
    return [relation(a, b, frame) for a, b in zip(objects, objects[1:])]


def caption(scene: Scene, frame: float = 0) -> str:
    """For example "a red chess knight above a blue heart on a green background"."""
    return str(describe(scene, frame))


def parse_caption(text: str) -> Description:
    """The description that a caption states; case and spacing do not matter. Raises DitkitError naming the first word that does not fit."""
    patterns, rest = _patterns(), " ".join(text.split())
    objects: list[Pair] = []
    relations: list[Relation] = []
    while not (surface := patterns.background.fullmatch(rest)):
        found = patterns.thing.match(rest)
        if not found:
            raise _misfit(text, rest)
        objects.append((_COLOR[found["color"].lower()], _GLYPH[found["glyph"].lower()]))
        if found["relation"]:
            relations.append(_RELATION[found["relation"].lower()])
        rest = rest[found.end() :]
    if relations and len(relations) != len(objects) - 1:
        raise DitkitError(f"caption {text!r} relates some of its objects only", allowed="a relation between all neighbours, or none")
    texture = _TEXTURE[(surface["texture"] or "plain").lower()]
    return Description(tuple(objects), tuple(relations), (texture, _COLOR[surface["color"].lower()]))


@dataclass(frozen=True)
class _Patterns:
    thing: re.Pattern[str]
    background: re.Pattern[str]


_GLYPH = {name.lower(): name for name in GLYPH_INDEX}
_COLOR: dict[str, ColorName] = {name: name for name in COLORS}
_TEXTURE: dict[str, Texture] = {name: name for name in TEXTURES}
_RELATION: dict[str, Relation] = {name: name for name in RELATIONS}


@cache
def _patterns() -> _Patterns:
    link = f"(?:,? which is | )(?P<relation>{_any(RELATIONS)}) (?=an? )|,? and (?=an? )|, (?=an? )|,? on (?=an? )"
    thing = f"an? (?P<color>{_any(COLORS)}) (?P<glyph>{_any(GLYPH_INDEX)})(?:{link})"
    background = f"an? (?:(?P<texture>{_any(TEXTURES)}) )?(?P<color>{_any(BACKGROUNDS)}) background\\.?"
    return _Patterns(re.compile(thing, re.IGNORECASE), re.compile(background, re.IGNORECASE))


def _any(names: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, names), key=len, reverse=True))


def _misfit(text: str, rest: str) -> DitkitError:
    words = rest.split()
    known = {w for names in (COLORS, TEXTURES, GLYPH_INDEX, RELATIONS) for name in names for w in name.lower().split()}
    known |= {"a", "an", "on", "and", "which", "is", "background"}
    strange = next((w for w in words if w.lower().strip(",.") not in known), "")
    what = f"the word {strange!r}" if strange else repr(" ".join(words[:6]))
    return DitkitError(
        f"caption {text!r} does not parse at {what}",
        allowed='"a COLOR GLYPH [left of | right of | above | below a COLOR GLYPH] on a [TEXTURE] COLOR background"',
        hint=nearest(strange.lower(), known) if strange else "",
    )


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
