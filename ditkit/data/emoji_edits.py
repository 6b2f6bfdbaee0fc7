"""Natural editing pairs among emoji: the same person with another skin tone, gender or profession.

What a picture shows is read from its code points (UTS 51): a skin tone is a modifier character; a gender is the person that a sequence
begins with, or the sign that it ends with; a profession is the thing after the person.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal, NamedTuple

Kind = Literal["skin tone", "gender", "profession"]

_TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
_JOINER, _VARIANT = 0x200D, 0xFE0F
_PERSONS = {0x1F9D1: "person", 0x1F468: "man", 0x1F469: "woman"}
_CHILDREN = (0x1F9D2, 0x1F466, 0x1F467)
_SIGNS = {0x2642: "man", 0x2640: "woman"}
_SEVERAL = {0x1F46F, 0x1F93C}  # with bunny ears, wrestling
_PLURAL = {"person": "people", "man": "men", "woman": "women"}
_OTHERS = {  # whose genders have characters of their own: role, gender, words
    (0x1F9D2,): ("child", "person", "a child"), (0x1F466,): ("child", "man", "a boy"), (0x1F467,): ("child", "woman", "a girl"),
    (0x1F9D3,): ("old", "person", "an old person"), (0x1F474,): ("old", "man", "an old man"), (0x1F475,): ("old", "woman", "an old woman"),
    (0x1FAC5,): ("crown", "person", "a person"), (0x1F934,): ("crown", "man", "a prince"), (0x1F478,): ("crown", "woman", "a princess"),
    (0x1FAC4,): ("pregnant", "person", "a person"), (0x1FAC3,): ("pregnant", "man", "a man"), (0x1F930,): ("pregnant", "woman", "a woman"),
    (0x1F9D1, _JOINER, 0x1F384): ("Claus", "person", "Mx Claus"), (0x1F385,): ("Claus", "man", "Santa Claus"),
    (0x1F936,): ("Claus", "woman", "Mrs. Claus"), (0x1F57A,): ("dancing", "man", "a man"), (0x1F483,): ("dancing", "woman", "a woman"),
}  # fmt: skip
_PROFESSIONS = {
    0x1F33E: "farmer", 0x1F373: "cook", 0x1F393: "student", 0x1F3A4: "singer", 0x1F3A8: "artist", 0x1F3EB: "teacher",
    0x1F3ED: "factory worker", 0x1F4BB: "technologist", 0x1F4BC: "office worker", 0x1F527: "mechanic", 0x1F52C: "scientist",
    0x1F680: "astronaut", 0x1F692: "firefighter", 0x2695: "health worker", 0x2696: "judge", 0x2708: "pilot", 0x1FA70: "ballet dancer",
}  # fmt: skip


@dataclass(frozen=True)
class EditingPair:
    """Two pictures that differ in one thing.

    Attributes:
        source: number of the picture before.
        target: number of the picture after.
        kind: what differs: "skin tone", "gender" or "profession".
        instruction: what to ask for, in words.
    """

    source: int
    target: int
    kind: Kind
    instruction: str


class _Seen(NamedTuple):
    """A value of one kind, of all that is the same in what can be exchanged for it, and the words that ask for it."""

    kind: Kind
    same: Hashable
    value: str
    words: str


def editing_pairs(emoji: Sequence[str]) -> list[EditingPair]:
    """All ordered pairs of character sequences that differ in one thing: with (a, b) comes (b, a), of the same kind."""
    groups: dict[tuple[Kind, Hashable], list[tuple[int, _Seen]]] = defaultdict(list)
    for number, sequence in enumerate(emoji):
        for seen in _look(sequence):
            groups[seen.kind, seen.same].append((number, seen))
    return [
        EditingPair(source, target, seen.kind, seen.words)
        for members in groups.values()
        for (source, before), (target, seen) in permutations(members, 2)
        if before.value != seen.value
    ]


def _look(sequence: str) -> Iterator[_Seen]:
    points = [ord(c) for c in sequence]
    tones = tuple(p for p in points if p in _TONES)
    rest = tuple(p for p in points if p not in _TONES and p != _VARIANT)
    if rest and len(set(tones)) <= 1:  # two tones in a picture are no single change
        tone = f"tone {_TONES[tones[0]]}" if tones else "yellow"  # the skin of what has no tone
        yield _Seen("skin tone", rest, tone, f"make the skin {tone}")
    if rest and (found := _gender(rest)):
        role, gender, words = found
        yield _Seen("gender", (role, tones), gender, words)
    if len(rest) == 3 and rest[0] in _PERSONS and rest[2] in _PROFESSIONS:
        work = _PROFESSIONS[rest[2]]
        yield _Seen("profession", (rest[0], tones), work, f"make the {_PERSONS[rest[0]]} {'an' if work[0] in 'aeiou' else 'a'} {work}")


def _gender(rest: tuple[int, ...]) -> tuple[Hashable, str, str] | None:
    """Role, gender and the words that ask for it; None for families and couples. Most things have one gender only: neutral."""
    if rest in _OTHERS:
        what, gender, who = _OTHERS[rest]
        return what, gender, f"make it {who}"
    if rest[0] in _PERSONS:
        alone = not {*_PERSONS, *_CHILDREN} & {*rest[1:]}
        gender = _PERSONS[rest[0]]
        return (rest[1:], gender, f"make it a {gender}") if alone else None
    signed = rest[1:2] == (_JOINER,) and rest[2] in _SIGNS
    gender = _SIGNS[rest[2]] if signed else "person"
    role = (rest[0], *rest[3:]) if signed else rest
    return role, gender, f"make them {_PLURAL[gender]}" if rest[0] in _SEVERAL else f"make it a {gender}"
