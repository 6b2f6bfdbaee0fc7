"""Quality of samples against real data. Every figure says on which features, how many samples, and against which set.

The reference is the training split. The test split's own figures against it stand beside those of the samples: they are what
real pictures score at that number of samples, so the floor of a distance and the ceiling of an accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditkit.core.errors import DitkitError
from ditkit.core.lazy import require
from ditkit.data import Dataset, load

from .features import Extractor, LabelReader, everything, extractor, in_chunks
from .metrics import Moments, bootstrap, frechet_distance, kid, precision_recall


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
    settings: dict[str, Any]


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


class Judge:
    """Real data, prepared once for many sets of samples.

    Args:
        data: name of a data set, or its training and test splits.
        extractors: names, see ``features.EXTRACTORS``.
        resamples: of the bootstrap.
    """

    def __init__(
        self, data: str | tuple[Dataset, Dataset], extractors: Sequence[str] = ("pca64", "classifier"), resamples: int = 200
    ) -> None:
        self.train, self.test = (load(data, "train"), load(data, "test")) if isinstance(data, str) else data
        self.resamples = resamples
        self.x, self.y = everything(self.train)
        self.test_x, self.test_y = everything(self.test)
        self.extractors: list[Extractor] = [extractor(n, self.x, self.y, self.train.num_classes) for n in extractors]
        self.reference = f"{self.train.name}/train, {len(self.x)} samples"
        self._real = {e.name: in_chunks(e, self.x) for e in self.extractors}
        self._held: dict[tuple[str, int, bool], dict[str, float]] = {}
        self._moments = {name: Moments.of(u) for name, u in self._real.items()}

    @cached_property
    def reader(self) -> LabelReader:
        """The independent classifier, trained on the reference."""
        return LabelReader(self.x, self.y)

    def labels(self, num: int) -> Tensor:
        """(num,) labels mixed as in the test split, so that samples are compared with what they should resemble."""
        return self.test_y[torch.arange(num) % len(self.test_y)]

    def check_number(self, num: int) -> None:
        """Raise DitkitError where so few samples cannot be judged; ask before making them."""
        dim = max((e.dim for e in self.extractors), default=1)
        if num <= dim:
            raise DitkitError(
                f"num_samples is {num}", allowed=f"{dim + 1} or more: the features are {dim} numbers", hint="360 is the default"
            )

    def __call__(self, x: Tensor, labels: Tensor | None = None, full: bool = True) -> Quality:
        """Figures of samples x (N, C, H, W) in [-1, 1].

        Args:
            labels: (N,) what they were asked to show; with them the label reader's agreement is counted.
            full: kernel distance, precision and recall too, not the Fréchet distances alone.

        Raises:
            DitkitError: N is not above the number of features, shapes do not fit, or a sample is not finite.
        """
        if tuple(x.shape[1:]) != tuple(self.train.shape):
            raise DitkitError(f"samples of shape {tuple(x.shape[1:])}", allowed=f"{tuple(self.train.shape)}, as {self.train.name}")
        self.check_number(len(x))
        scores = [s for e in self.extractors for s in self._distances(e, x.detach().cpu().float(), full)]
        return Quality((*scores, *([self._agreement(x, labels)] if labels is not None else [])))

    def _distances(self, e: Extractor, x: Tensor, full: bool) -> list[Score]:
        mine, real = in_chunks(e, x), self._real[e.name]
        held = self._held_out(e, len(x), full)
        rest: dict[str, Any] = dict(extractor=e.name, num_samples=len(x), reference=self.reference)
        value = frechet_distance(Moments.of(mine), self._moments[e.name])
        interval = bootstrap(lambda a, b: frechet_distance(a, b, allow_singular=True), mine, real, num=self.resamples)
        settings = {"dim": e.dim, "bootstrap": self.resamples, "real_num_samples": min(len(x), len(self.test_x)) if held else 0}
        scores = [Score("frechet", value, interval.low, interval.high, held.get("frechet"), settings=settings, **rest)]
        if full:
            near, inside = kid(mine, real), precision_recall(mine, real)
            sizes = {"subset_size": near.subset_size, "num_subsets": near.num_subsets, "std_between_subsets": near.std}
            scores.append(Score("kid", near.value, None, None, held.get("kid"), settings=sizes, **rest))
            for name in ("precision", "recall"):
                scores.append(Score(name, getattr(inside, name), None, None, held.get(name), settings={"k": inside.k}, **rest))
        return scores

    def _held_out(self, e: Extractor, num: int, full: bool) -> dict[str, float]:
        """Figures of as many held-out real samples (a distance depends on the number), or of all there are; {} if too few."""
        num = min(num, len(self.test_x))
        if num <= e.dim:
            return {}
        key = (e.name, num, full)
        if key not in self._held:
            held, real = in_chunks(e, self.test_x[:num]), self._real[e.name]
            self._held[key] = {"frechet": frechet_distance(Moments.of(held), self._moments[e.name])}
            if full:
                inside = precision_recall(held, real)
                self._held[key] |= {"kid": kid(held, real).value, "precision": inside.precision, "recall": inside.recall}
        return self._held[key]

    def _agreement(self, x: Tensor, labels: Tensor) -> Score:
        if labels.shape != (len(x),):
            raise DitkitError(f"labels of shape {tuple(labels.shape)}", allowed=f"({len(x)},), one a sample")
        hits = int((self.reader(x) == labels.cpu().numpy()).sum())
        real = float(np.mean(self.reader(self.test_x) == self.test_y.numpy()))
        bounds = require("scipy.stats", "eval").binomtest(hits, len(x)).proportion_ci(method="wilson")
        name = self.reader.name
        return Score("label agreement", hits / len(x), bounds.low, bounds.high, real, name, len(x), self.reference, {"interval": "Wilson"})
