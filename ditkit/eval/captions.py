"""Quality of a model that is told captions: distances to the real pictures of the same captions, and whether samples show what was
asked for, where the data set can be asked that exactly.

==========  ===================================================================================================================
``scenes``  objects, colours and relations that ``scene_reader`` finds; half of the captions name only pairs never trained on
``emoji``   recall: among how many nearest of all real pictures is the one that bears the caption (``recall.py``)
other sets  no asked-for score
==========  ===================================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ditkit.bundle import DataCard
from ditkit.core.errors import DitkitError
from ditkit.data import EMBEDDED, NoSplit, load

from .features import Extractor, extractor, remembered
from .metrics import Array
from .quality import Distances, Quality, Score, share
from .recall import caption_recall

if TYPE_CHECKING:
    from ditkit.data.scenes import SceneConfig

HELD_OUT = "held-out pairs"
LEAST = 8  # captions


@dataclass(frozen=True)
class Asked:
    """What is asked for, and what really looks so.

    Attributes:
        captions: N of them; sample k is asked for caption k.
        real: (N, C, H, W) in [-1, 1], the real picture of each.
        others: real pictures of other captions, at most N, maybe none: their distance to ``real`` is the floor.
        parts: rows of ``captions`` that are scored apart, by name; "" is a name.
        data, rows: the set, and each caption's sample in it, where all are of one split.
        reference: ``real`` in words.
    """

    captions: tuple[str, ...]
    real: Tensor
    others: Tensor
    parts: Mapping[str, np.ndarray]
    data: Any
    rows: np.ndarray
    reference: str

    @property
    def licence(self) -> dict[str, str]:
        """``licence`` and ``credit``, where what shows the real pictures must name them."""
        return {k: getattr(self.data, k) for k in ("licence", "credit") if hasattr(self.data, k)}


def usual_number(name: str) -> int:
    """Captions asked of a data set unless the caller says how many."""
    return 200 if name == "emoji" else 500


class Asks(Protocol):
    """Samples x (N, C, H, W) and their features -> figures of whether they show what was asked for."""

    def __call__(self, x: Tensor, features: Mapping[str, Array]) -> list[Score]: ...


class CaptionJudge:
    """Captions and their real pictures, prepared once for many sets of samples.

    Args:
        card: of the bundle: which data, with which options, of which shape.
        num: captions, one sample each.
        extractors: names, see ``features.extractor``; those that need no labels. Recall is on the first.
        data: name of another data set; by default the bundle's.
        resamples: of the bootstrap, where there is one.

    Raises:
        DitkitError: the set has no captions, too few, or pictures of another shape.
    """

    def __init__(
        self,
        card: DataCard,
        num: int,
        extractors: Sequence[str] = ("efficientnet-lite0",),
        *,
        data: str | None = None,
        resamples: int = 200,
    ) -> None:
        name = data or card.name
        if num < LEAST:
            raise DitkitError(f"num_samples is {num}", allowed=f"{LEAST} or more captions")
        options = _options(card, name)
        self.asked = _scenes(num, options) if name == "scenes" else _pictures(name, num, options)
        if tuple(self.asked.real.shape[1:]) != tuple(card.shape):
            shape = tuple(self.asked.real.shape[1:])
            raise DitkitError(f"the pictures of {name} are {shape}", allowed=f"{tuple(card.shape)}, as the bundle makes", hint="--data")
        chosen = [extractor(n, self.asked.real) for n in extractors]
        self.distances = Distances(chosen, self.asked.real, self.asked.others, self.asked.reference, resamples)
        self.check_number(num)
        self._asks: Asks | None = _Scenes(self.asked, options) if name == "scenes" else None
        if name == "emoji" and chosen:
            self._asks = _Recall(self.asked, chosen[0])

    def told(self, num: int) -> list[str]:
        """What ``num`` samples are asked to show: the captions, in turn."""
        captions = self.asked.captions
        return [captions[k % len(captions)] for k in range(num)]

    def check_number(self, num: int) -> None:
        """Raise DitkitError where so few samples cannot be judged."""
        self.distances.check_number(num)

    def __call__(
        self, x: Tensor, told: Sequence[str] | None = None, full: bool = True, features: Mapping[str, Array] | None = None
    ) -> Quality:
        """Figures of samples x (N, C, H, W) in [-1, 1], one for each caption.

        Args:
            told: what they were asked to show, to be sure that it is these captions.
            full: precision and recall of the distances too.
            features: of x, by extractor, where they are known.

        Raises:
            DitkitError: shapes do not fit, another caption was asked for, or a sample is not finite.
        """
        if x.shape != self.asked.real.shape:
            raise DitkitError(f"samples of shape {tuple(x.shape)}", allowed=f"{tuple(self.asked.real.shape)}, one for each caption")
        if told is not None and tuple(told) != self.asked.captions:
            raise DitkitError("the samples were asked for other captions", allowed="judge.told(N)")
        known = self.distances.features(x) if features is None else features
        asked = [] if self._asks is None else self._asks(x, known)
        return Quality((*asked, *self.distances(known, full)))


# ---- what is asked ----------------------------------------------------------------------------------------------------------


def _options(card: DataCard, name: str) -> dict[str, Any]:
    """How the set is loaded: as for training, where the bundle says how, at the size of the bundle's pictures."""
    side = card.shape[-1]
    if name == card.name and card.config:
        several = isinstance(card.config.get("size"), list)  # scenes that were trained at several sizes
        return {**card.config, "size": side} if several else dict(card.config)
    if name == "scenes":  # an older bundle: the world that the reader knows best
        from .scene_reader import SYMBOLS

        return {**SYMBOLS.to_dict(), "size": side}
    if name in EMBEDDED:
        return {"size": side} if name == "emoji" else {}
    return {"resolution": side}


def _scenes(num: int, options: Mapping[str, Any]) -> Asked:
    """Half of the captions with all pairs, half with held-out pairs alone."""
    half = num // 2
    sizes = {"": num - half, HELD_OUT: half}
    options = {k: v for k, v in options.items() if k not in ("length", "held_out_only")}
    sets = {
        part: load("scenes", "test", length=2 * n, held_out_only=part == HELD_OUT, **options) for part, n in sizes.items()
    }  # fmt: skip
    first = {part: np.arange(n) for part, n in sizes.items()}
    captions = [text for part, rows in first.items() for text in _captions(sets[part], rows)]
    real = torch.cat([_batch(sets[part], rows) for part, rows in first.items()])
    others = torch.cat([_batch(sets[part], rows + sizes[part]) for part, rows in first.items()])
    parts = {"": np.arange(num - half), HELD_OUT: np.arange(num - half, num)}
    return Asked(tuple(captions), real, others, parts, None, np.arange(num), f"scenes/test, the {num} of the same captions")


def _pictures(name: str, num: int, options: Mapping[str, Any]) -> Asked:
    """Captions spread evenly over the test split, or over the training split where nothing was set aside."""
    try:
        data, split = load(name, "test", **options), "test"
    except NoSplit:
        data, split = load(name, "train", **options), "train"
    if not getattr(data, "has_captions", hasattr(data, "captions")):
        raise DitkitError(f"data set {name!r} has no captions", allowed="scenes, emoji, or pictures with name.txt beside name.png")
    if num > len(data):
        raise DitkitError(f"num_samples is {num}", allowed=f"{LEAST} to {len(data)}, the pictures of {name}/{split}")
    rows = np.linspace(0, len(data) - 1, num).astype(np.int64)
    rest = np.setdiff1d(np.arange(len(data)), rows)
    others = rest[np.linspace(0, len(rest) - 1, min(num, len(rest))).astype(np.int64)] if len(rest) else rest
    reference = f"{name}/{split}, the {num} of the same captions"
    captions = tuple(_captions(data, rows))
    return Asked(captions, _batch(data, rows), _batch(data, others), {"": np.arange(num)}, data, rows, reference)


def _captions(data: Any, rows: np.ndarray) -> list[str]:
    found: list[str] = data.captions(rows)
    return found


def _batch(data: Any, rows: np.ndarray, chunk: int = 64) -> Tensor:
    """Real pictures (N, C, H, W)."""
    places = range(0, len(rows), chunk)
    bar = tqdm(places, desc=f"pictures of {data.name}", leave=False, delay=2, disable=None)
    parts = [data.batch(rows[i : i + chunk])["x"] for i in bar]
    return torch.cat(parts) if parts else torch.empty(0, *data.shape)


# ---- whether it is shown ----------------------------------------------------------------------------------------------------


class _Scenes:
    """Shares of objects, colours and relations that an independent reader finds, for each part of the captions; beside them those
    in the real pictures of the same captions, and by chance: samples against the caption of their neighbour.
    """

    def __init__(self, asked: Asked, options: Mapping[str, Any]) -> None:
        from .scene_reader import SceneReader, attribute_scores

        self.asked, self.attributes = asked, attribute_scores
        self.reader = SceneReader.load(world_to_read(options), asked.real.shape[-1])
        self.real = self.reader.read(asked.real)

    def __call__(self, x: Tensor, features: Mapping[str, Array]) -> list[Score]:
        readings = self.reader.read(x.detach().cpu().float().clamp(-1, 1))
        return [score for part, rows in self.asked.parts.items() for score in self._part(part, rows, readings)]

    def _part(self, part: str, rows: np.ndarray, readings: Sequence[Any]) -> list[Score]:
        captions = [self.asked.captions[i] for i in rows]
        mine = self.attributes([readings[i] for i in rows], captions)
        real = self.attributes([self.real[i] for i in rows], captions)
        chance = self.attributes([readings[i] for i in np.roll(rows, 1)], captions)
        counts = {"object": mine.num_objects, "color": mine.num_objects, "relation": mine.num_relations}
        scores = []
        for what, num in counts.items():
            if not num:
                continue
            value, low, high = share(round(getattr(mine, what) * num), num)
            settings = {"input": "as they are", "interval": "Wilson", "captions": part or "all pairs", f"num_{what}s": num}
            name = f"{what} ({part})" if part else what
            beside = getattr(real, what), "scene reader", len(rows), self.asked.reference
            scores.append(Score(name, value, low, high, *beside, settings, getattr(chance, what)))
        return scores


def world_to_read(options: Mapping[str, Any]) -> SceneConfig:
    """The reader's own world where that holds all that can be shown, so that one reader judges alike; else the world itself."""
    from ditkit.data.scenes import SceneConfig

    from .scene_reader import SYMBOLS

    world = SceneConfig.parse({k: v for k, v in options.items() if k in SceneConfig.model_fields}, "scenes")
    choices = ("groups", "colors", "backgrounds", "textures", "styles", "sizes")
    within = all(set(getattr(world, name)) <= set(getattr(SYMBOLS, name)) for name in choices)
    few = world.num_objects[1] <= SYMBOLS.num_objects[1] and world.max_rotation <= SYMBOLS.max_rotation
    return SYMBOLS if within and few and not world.overlap else world


class _Recall:
    """Recall of captions among all real pictures of the set, on the features of one extractor."""

    def __init__(self, asked: Asked, e: Extractor) -> None:
        self.asked, self.extractor = asked, e
        self.real = remembered(e, _batch(asked.data, np.arange(len(asked.data))))

    def __call__(self, x: Tensor, features: Mapping[str, Array]) -> list[Score]:
        e = self.extractor
        found = caption_recall(features[e.name], self.real, self.asked.rows)
        reference = f"{self.asked.data.name}, all {found.num_real} pictures"
        settings = {"input": e.rule, "interval": "Wilson", "distance": "1 - cosine", "num_real": found.num_real}
        scores = []
        for k, value in found.top.items():
            bounds = share(round(value * found.num_samples), found.num_samples)
            scores.append(Score(f"caption top-{k}", *bounds, None, e.name, found.num_samples, reference, settings, found.chance[k]))
        return scores
