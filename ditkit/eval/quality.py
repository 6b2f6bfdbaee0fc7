"""Quality of samples against real data. Every figure says on which features, how many samples, and against which set.

Beside each distance stands that of held-out real data, as many: what real pictures score at that number of samples, so the floor of
a distance and the ceiling of an accuracy. ``Judge`` is for models that are told class labels, ``captions.py`` for those told captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditkit.core.errors import DitkitError
from ditkit.core.lazy import require
from ditkit.data import Dataset, load

from .features import Extractor, LabelReader, everything, extractor, in_chunks, remembered
from .metrics import Array, Moments, bootstrap, frechet_distance, kid, precision_recall

WIDE = 256  # features: beyond, samples are seldom more than features, and a bootstrap of Fréchet distances takes minutes


@dataclass(frozen=True)
class Score:
    """One figure and all that it depends on. ``low`` and ``high`` bound it at 95 % (None: not estimated)."""

    metric: str
    value: float
    low: float | None
    high: float | None
    real: float | None  # the same figure of held-out real data
    extractor: str
    num_samples: int
    reference: str  # "digits/train, 1437 samples"
    settings: dict[str, Any]  # of the metric, and ``input``: how the extractor or reader takes pictures
    chance: float | None = None  # the same figure for what was not asked for


@dataclass(frozen=True)
class Quality:
    """All figures of one set of samples."""

    scores: tuple[Score, ...]

    def __getitem__(self, metric: str) -> Score:
        """The figure of that name, of the first extractor that gives it: ``quality["frechet"]``."""
        for score in self.scores:
            if metric in (score.metric, f"{score.metric}:{score.extractor}"):
                return score
        raise KeyError(metric)

    def __contains__(self, metric: str) -> bool:
        return any(metric in (s.metric, f"{s.metric}:{s.extractor}") for s in self.scores)


class Distances:
    """Distances of samples to real pictures, beside those of held-out real pictures.

    Where there are no more samples than features the Fréchet distance is biased upwards by much. That is refused, but for wide
    extractors (more than ``WIDE`` features), where it is marked in the settings ("biased") and means something only beside the
    real figure of as many pictures. The kernel distance has no such bias.

    Args:
        real, held: (N, C, H, W) in [-1, 1]: the reference, and other real pictures, maybe none.
        reference: the reference in words.
        resamples: of the bootstrap.
    """

    def __init__(self, extractors: Sequence[Extractor], real: Tensor, held: Tensor, reference: str, resamples: int = 200) -> None:
        self.extractors, self.held, self.reference, self.resamples = tuple(extractors), held, reference, resamples
        self.real = {e.name: remembered(e, real) for e in self.extractors}
        self._moments = {name: Moments.of(u) for name, u in self.real.items()}
        self._held: dict[tuple[str, int, bool], dict[str, float]] = {}

    def check_number(self, num: int) -> None:
        """Raise DitkitError where so few samples cannot be judged; ask before making them."""
        dim = max((e.dim for e in self.extractors if e.dim <= WIDE), default=3)
        if num <= dim:
            reason = f": the features are {dim} numbers" if dim > 3 else ", for precision and recall"
            raise DitkitError(f"num_samples is {num}", allowed=f"{dim + 1} or more{reason}", hint="ask for more")

    def features(self, x: Tensor) -> dict[str, Array]:
        """Of samples, by extractor."""
        return {e.name: in_chunks(e, x.detach().cpu().float()) for e in self.extractors}

    def __call__(self, features: Mapping[str, Array], full: bool = True) -> list[Score]:
        """Figures of samples' ``features``; ``full``: precision and recall too."""
        return [score for e in self.extractors for score in self._scores(e, features[e.name], full)]

    def _scores(self, e: Extractor, mine: Array, full: bool) -> list[Score]:
        real, held = self.real[e.name], self._held_out(e, len(mine), full)

        def score(metric: str, value: float, low: float | None = None, high: float | None = None, **settings: Any) -> Score:
            settings = {"input": e.rule, **settings}
            return Score(metric, value, low, high, held.get(metric), e.name, len(mine), self.reference, settings)

        near = kid(mine, real)
        sizes = {"subset_size": near.subset_size, "num_subsets": near.num_subsets, "std_between_subsets": near.std}
        scores = [score("frechet", *self._frechet(e, mine), **self._about(e, len(mine))), score("kid", near.value, **sizes)]
        if full:
            inside = precision_recall(mine, real)
            scores += [score(name, getattr(inside, name), k=inside.k) for name in ("precision", "recall")]
        return scores

    def _frechet(self, e: Extractor, mine: Array) -> tuple[float, float | None, float | None]:
        """The distance, and its interval where that can be had."""
        value = frechet_distance(Moments.of(mine), self._moments[e.name], allow_singular=e.dim > WIDE)
        if e.dim > WIDE:
            return value, None, None
        real = self.real[e.name]
        interval = bootstrap(lambda a, b: frechet_distance(a, b, allow_singular=True), mine, real, num=self.resamples)
        return value, interval.low, interval.high

    def _about(self, e: Extractor, num: int) -> dict[str, Any]:
        few = min(num, len(self.real[e.name]))
        settings = {"dim": e.dim, "bootstrap": 0 if e.dim > WIDE else self.resamples, "real_num_samples": self._num_held(e, num)}
        return {**settings, "biased": True} if few <= e.dim else settings

    def _num_held(self, e: Extractor, num: int) -> int:
        """Held-out pictures for the same figures: as many as samples, or all there are; 0 where they are too few."""
        num = min(num, len(self.held))
        return num if num > (3 if e.dim > WIDE else e.dim) else 0

    def _held_out(self, e: Extractor, num: int, full: bool) -> dict[str, float]:
        """Their figures: a distance depends on the number."""
        num = self._num_held(e, num)
        key = (e.name, num, full)
        if num and key not in self._held:
            held, real = remembered(e, self.held[:num]), self.real[e.name]
            found = {"frechet": frechet_distance(Moments.of(held), self._moments[e.name], allow_singular=e.dim > WIDE)}
            found["kid"] = kid(held, real).value
            if full:
                inside = precision_recall(held, real)
                found |= {"precision": inside.precision, "recall": inside.recall}
            self._held[key] = found
        return self._held.get(key, {})


class Judge:
    """Real data with class labels, prepared once for many sets of samples. The reference is the training split, the held-out real
    data are the test split.

    Args:
        data: name of a data set, or its training and test splits.
        extractors: names, see ``features.extractor``.
        resamples: of the bootstrap.
        options: the data set is loaded with.
    """

    def __init__(
        self,
        data: str | tuple[Dataset, Dataset],
        extractors: Sequence[str] = ("pca64", "classifier"),
        resamples: int = 200,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        chosen = options or {}
        self.train, self.test = (load(data, "train", **chosen), load(data, "test", **chosen)) if isinstance(data, str) else data
        self.x, self.y = everything(self.train)
        self.test_x, self.test_y = everything(self.test)
        made = [extractor(n, self.x, self.y, self.train.num_classes) for n in extractors]
        self.reference = f"{self.train.name}/train, {len(self.x)} samples"
        self.distances = Distances(made, self.x, self.test_x, self.reference, resamples)

    @cached_property
    def reader(self) -> LabelReader:
        """The independent classifier, trained on the reference."""
        return LabelReader(self.x, self.y)

    def labels(self, num: int) -> Tensor:
        """(num,) labels mixed as in the test split, so that samples are compared with what they should resemble."""
        return self.test_y[torch.arange(num) % len(self.test_y)]

    def told(self, num: int) -> list[int]:
        """What ``num`` samples are asked to show: ``labels``."""
        found: list[int] = self.labels(num).tolist()
        return found

    def check_number(self, num: int) -> None:
        """Raise DitkitError where so few samples cannot be judged; ask before making them."""
        self.distances.check_number(num)

    def __call__(
        self,
        x: Tensor,
        labels: Tensor | Sequence[int] | None = None,
        full: bool = True,
        features: Mapping[str, Array] | None = None,
    ) -> Quality:
        """Figures of samples x (N, C, H, W) in [-1, 1].

        Args:
            labels: (N,) what they were asked to show; with them the label reader's agreement is counted.
            full: precision and recall too.
            features: of x, by extractor, where they are known.

        Raises:
            DitkitError: N is not above the number of features, shapes do not fit, or a sample is not finite.
        """
        if tuple(x.shape[1:]) != tuple(self.train.shape):
            raise DitkitError(f"samples of shape {tuple(x.shape[1:])}", allowed=f"{tuple(self.train.shape)}, as {self.train.name}")
        self.check_number(len(x))
        scores = self.distances(self.distances.features(x) if features is None else features, full)
        return Quality((*scores, *([self._agreement(x, torch.as_tensor(labels))] if labels is not None else [])))

    def _agreement(self, x: Tensor, labels: Tensor) -> Score:
        if labels.shape != (len(x),):
            raise DitkitError(f"labels of shape {tuple(labels.shape)}", allowed=f"({len(x)},), one a sample")
        hits = int((self.reader(x) == labels.cpu().numpy()).sum())
        real = float(np.mean(self.reader(self.test_x) == self.test_y.numpy()))
        settings = {"interval": "Wilson", "input": f"averaged to at most {self.reader.side} x {self.reader.side}"}
        return Score("label agreement", *share(hits, len(x)), real, self.reader.name, len(x), self.reference, settings)


def share(hits: int, num: int) -> tuple[float, float, float]:
    """hits / num with its Wilson interval at 95 %."""
    bounds = require("scipy.stats", "eval").binomtest(hits, num).proportion_ci(method="wilson")
    return hits / num, float(bounds.low), float(bounds.high)


def feature_drift(e: Extractor, mine: Array, base: Array) -> Score:
    """How far samples lie from the base's of the same seeds: the mean of 1 - cosine over pairs of features (N, d), row by row.

    0 for equal pictures, whatever the extractor; ``between_pictures`` in the settings is the same between neighbouring pictures of
    the base, which show something else: the scale on which to read it.
    """
    if mine.shape != base.shape or len(mine) < 2:
        raise DitkitError(f"features of {mine.shape[0]} and {base.shape[0]} pictures", allowed="2 or more, as many of both")
    far = _one_minus_cosine(mine, base)
    draws = np.random.default_rng(0).integers(len(far), size=(1000, len(far)))
    low, high = np.quantile(far[draws].mean(1), [0.025, 0.975])
    between = float(_one_minus_cosine(base, np.roll(base, 1, 0)).mean())
    settings = {"input": e.rule, "distance": "1 - cosine", "between_pictures": between, "bootstrap": 1000}
    return Score(
        "feature drift", float(far.mean()), float(low), float(high), None, e.name, len(far), "the base's, same seeds", settings
    )  # fmt: skip


def _one_minus_cosine(a: Array, b: Array) -> Array:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return np.maximum(1 - cosine, 0)
