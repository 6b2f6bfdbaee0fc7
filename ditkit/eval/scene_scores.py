"""Do pictures show what their captions ask for? What a reader found in them, against captions of the ``scenes`` world.

**Matching.** The objects of a caption are matched with the things found in its picture one to one, by the assignment with the most
equal glyphs, and among those the most equal colours; what is still equal goes to the things of higher confidence. So an object whose
glyph is nowhere in the picture is matched with a remaining thing, best one of its colour. Things that remain over are not judged, but
counted.

- object: the matched thing has the object's glyph.
- colour: the matched thing has the object's colour, whatever its glyph. An object for which no thing is left counts as wrong.
- relation: A is left of B when B's centre is to the right of A's by more than it is above or below it; so in the other directions. Both
  matched things must be recognisable, each by its object's glyph or its colour; otherwise the relation counts as wrong.

Every share is of all objects, or of all relations, that the captions name: drawing nothing is never rewarded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditkit.core.errors import DitkitError
from ditkit.core.lazy import require
from ditkit.data.scene_text import Pair, Relation, parse_caption
from ditkit.data.scene_types import MAX_OBJECTS


@dataclass(frozen=True)
class Found:
    """One thing in a picture: what it is, and its centre in the unit square (x to the right, y down). ``confidence`` is in [0, 1]."""

    glyph: str
    color: str
    x: float
    y: float
    confidence: float = 1.0


@dataclass(frozen=True)
class Reading:
    """What a reader sees in one picture: the things, the surest first, and the colour name of the background."""

    found: tuple[Found, ...]
    background: str


@dataclass(frozen=True)
class Attributes:
    """How much of what captions ask for was found.

    Attributes:
        object, color, relation: shares in [0, 1] of ``num_objects``, ``num_objects`` and ``num_relations``; NaN where there is none.
        num_captions: captions judged.
        num_objects, num_relations: what they name.
        num_extra: things found beyond as many as the captions name.
    """

    object: float
    color: float
    relation: float
    num_captions: int
    num_objects: int
    num_relations: int
    num_extra: int = 0


def attribute_scores(readings: Sequence[Reading], captions: Sequence[str]) -> Attributes:
    """Readings of pictures against the caption of each. Raises DitkitError for other than one reading a caption, for none, or for a
    caption that does not parse.
    """
    if len(readings) != len(captions) or not captions:
        raise DitkitError(f"{len(readings)} readings of {len(captions)} captions", allowed="as many readings as captions, 1 or more")
    objects: list[bool] = []
    colors: list[bool] = []
    relations: list[bool] = []
    extra = 0
    for reading, text in zip(readings, captions):
        said = parse_caption(text)
        things = match(said.objects, reading.found)
        objects += [thing is not None and thing.glyph == glyph for (_, glyph), thing in zip(said.objects, things)]
        colors += [thing is not None and thing.color == color for (color, _), thing in zip(said.objects, things)]
        known = [thing if _recognised(pair, thing) else None for pair, thing in zip(said.objects, things)]
        relations += [holds(relation, a, b) for relation, a, b in zip(said.relations, known, known[1:])]
        extra += max(0, len(reading.found) - len(said.objects))
    return Attributes(_share(objects), _share(colors), _share(relations), len(captions), len(objects), len(relations), extra)


def match(objects: Sequence[Pair], found: Sequence[Found]) -> list[Found | None]:
    """For each (colour, glyph) the thing it is matched with (see above), or None where things are too few."""
    matched: list[Found | None] = [None] * len(objects)
    if not objects or not found:
        return matched
    worth = np.array([[_worth(pair, thing) for thing in found] for pair in objects])
    optimize: Any = require("scipy.optimize", "eval")
    for i, j in zip(*optimize.linear_sum_assignment(worth, maximize=True)):
        matched[i] = found[j]
    return matched


def _worth(pair: Pair, thing: Found) -> float:
    """A glyph is worth more than all colours of a caption together, and a colour more than all confidences."""
    color, glyph = pair
    most = MAX_OBJECTS + 1
    return most**2 * (thing.glyph == glyph) + most * (thing.color == color) + thing.confidence


def _recognised(pair: Pair, thing: Found | None) -> bool:
    color, glyph = pair
    return thing is not None and (thing.glyph == glyph or thing.color == color)


def holds(relation: Relation, a: Found | None, b: Found | None) -> bool:
    """Whether ``a`` is left of, right of, above or below ``b``: farther apart in that direction than across it."""
    if a is None or b is None:
        return False
    dx, dy = b.x - a.x, b.y - a.y
    ahead = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return ahead > (abs(dy) if relation in ("left of", "right of") else abs(dx))


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else math.nan
