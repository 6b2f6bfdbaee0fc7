"""Captions of emoji: the names of the Unicode CLDR, as PyPI ``emoji`` has them, put as a person would type them.

``red_apple`` is "red apple"; ``France`` "flag of France"; ``woman_red_hair`` "woman with red hair"; ``family_man_woman_girl_girl``
"family with a man, a woman and two girls"; a skin tone follows after a comma. Everything is plain ASCII.
"""

from __future__ import annotations

import re
import unicodedata

_TONE = re.compile("_(medium-light|medium-dark|light|dark|medium)_skin_tone")
_COUPLE = re.compile("(kiss|couple_with_heart)_(man|woman|person)_(man|woman|person)")
_HAIR = re.compile("(man|woman|person)_((?:red|curly|white|blond)_hair|beard)")
_FLAG = re.compile("[\U0001f1e6-\U0001f1ff]|\U0001f3f4\U000e0067")  # regional indicators; England, Scotland and Wales
_MEMBERS = {
    "man": ("a man", "two men"), "woman": ("a woman", "two women"), "adult": ("an adult", "two adults"),
    "boy": ("a boy", "two boys"), "girl": ("a girl", "two girls"), "child": ("a child", "two children"),
}  # fmt: skip
_WITH_ARTICLE = re.compile(
    "United|European|Isle|U.S.|.*(?:Republic|Islands|Territor(?:y|ies)|Lands|Bahamas|Comoros|Gambia|Maldives|Netherlands|Philippines|Seychelles)$"
)
_MENDED = {
    "Hong_Kong_SAR_China": "Hong Kong",
    "Macao_SAR_China": "Macao",
    "South_Georgia_&_South_Sandwich_Islands": "South Georgia and the South Sandwich Islands",
    "Heard_Island_&_McDonald_Islands": "Heard Island and McDonald Islands",
    "St._Helena_Ascension_&_Tristan_da_Cunha": "St. Helena, Ascension and Tristan da Cunha",
    "St._Vincent_&_Grenadines": "St. Vincent and the Grenadines",
    "couple_with_heart_person_person": "couple with heart",
    "kiss_person_person": "kiss",
    "man_bald": "bald man",
    "woman_bald": "bald woman",
    "person_bald": "bald person",
    "UP!_button": "UP button",
    "ON!_arrow": "ON arrow",
}


def caption_of(emoji: str, name: str) -> str:
    """The caption of a character sequence whose name, without colons, is ``name``."""
    tones = _TONE.findall(name)
    name = _TONE.sub("", name)
    words = _MENDED.get(name) or _people(name) or _plain(name)
    if _FLAG.match(emoji):
        words = f"flag of {'the ' if _takes_article(name, words) else ''}{words}"
    return f"{words}, {' and '.join(tones)} skin tone{'s' if len(tones) > 1 else ''}" if tones else words


def _takes_article(name: str, country: str) -> bool:
    return name not in _MENDED and bool(_WITH_ARTICLE.match(country))


def _people(name: str) -> str:
    """Families, couples and hair, whose names are lists; otherwise empty."""
    first, *members = name.split("_")
    if first == "family" and members:
        kinds = list(dict.fromkeys(members))
        return "family with " + _list([_MEMBERS[kind][members.count(kind) - 1] for kind in kinds])
    if found := _COUPLE.fullmatch(name):
        what, one, other = found.groups()
        who = {"man": "men", "woman": "women", "person": "people"}[one] if one == other else f"{one} and {other}"
        return f"{who} kissing" if what == "kiss" else f"{who} with heart"
    if found := _HAIR.fullmatch(name):
        return f"{found[1]} with {found[2].replace('_', ' ')}"
    return ""


def _list(words: list[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _plain(name: str) -> str:
    """Spaces for underscores, letters without accents, nothing in brackets."""
    text = re.sub(r"\s*\(.*\)", "", name.replace("_", " ")).replace("\u2019", "'").replace("&", "and")
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
