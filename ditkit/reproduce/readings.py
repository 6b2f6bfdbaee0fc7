"""What is measured of models that are told captions of ``scenes``: the loss on held-out pictures, and what a reader finds in samples.

Sample k of every arm of a seed has the same caption and noise. Rows of samples: ``object`` and ``color`` (N,), the share of its caption's
objects that are there, and there in their colour; ``relation`` (N,), MISSING where the caption has none; ``extra`` (N,), things beyond as
many as it names. A sample larger than the pictures of training is averaged down to their size, at which the reader reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.data import load
from ditkit.eval.captions import world_to_read
from ditkit.eval.scene_reader import SceneReader, attribute_scores
from ditkit.pipeline import Pipeline
from ditkit.train.batches import draw_rows
from ditkit.train.captioned import Captioned
from ditkit.train.objectives import objective_from

from .protocol import Protocol
from .statistics import Array

CHUNK = 64
MISSING = -1.0


class Captions:
    """The test split of ``scenes``, its captions, and the reader of its world; in the place of ``measures.Real``."""

    def __init__(self, protocol: Protocol, progress: bool = True) -> None:
        num = max(protocol.num_samples, protocol.held_out, protocol.timed)
        self.data: Any = load(protocol.data, "test", **{**protocol.data_config, "length": num})
        self.world = {**protocol.data_config, **(protocol.reader or {})}
        self.progress = progress

    @cached_property
    def reader(self) -> SceneReader:
        """Fitted in a minute or two the first time, then from the cache."""
        return SceneReader.load(world_to_read(self.world), self.data.shape[-1], progress=self.progress)

    def asks(self, num: int) -> dict[str, Any]:
        """What a pipeline is asked for."""
        return {"prompt": self.captions(num)}

    def captions(self, num: int) -> list[str]:
        """The first ``num`` of the test split."""
        found: list[str] = self.data.captions(np.arange(num))
        return found

    def read(self, x: Tensor, captions: Sequence[str]) -> dict[str, Array]:
        """Rows of samples x (N, 3, H, W), one for each caption."""
        side = self.data.shape[-1]
        x = x if x.shape[-1] == side else F.adaptive_avg_pool2d(x, side)
        found = [attribute_scores([one], [text]) for one, text in zip(self.reader.read(x), captions)]
        columns: Mapping[str, list[float]] = {
            "object": [a.object for a in found],
            "color": [a.color for a in found],
            "relation": [a.relation if a.num_relations else MISSING for a in found],
            "extra": [float(a.num_extra) for a in found],
        }
        rows = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
        return {name: values for name, values in rows.items() if (values != MISSING).any()}

    def floor(self, num: int) -> dict[str, Any]:
        """What the real pictures of the same captions score: the reader's own errors; and by chance, against their neighbours' captions."""
        x, captions = self.data.batch(np.arange(num))["x"], self.captions(num)
        real, chance = self.read(x, captions), self.read(x, [*captions[1:], captions[0]])
        return {**_means(real), "chance": _means(chance), "num_samples": num}

    @torch.no_grad()
    def held_out(self, pipe: Pipeline, draws: int, num: int, seed: int) -> dict[str, Array]:
        """``mse`` (num,): of each picture, told its caption, the mean over ``draws`` times and noises, which follow from ``seed``."""
        model = pipe.model.eval()
        told = self.data if pipe.encoder is None else Captioned(self.data, model, pipe.encoder, self.data.shape[1:])
        objective = objective_from("diffusion", {"label_dropout": 0.0}, pipe.process)
        total = np.zeros(num)
        for first in range(0, num, CHUNK):
            rows = range(first, min(first + CHUNK, num))
            batch = told.batch(np.asarray(rows))
            kinds = objective.draws(tuple(batch["x"].shape[1:]))
            for k in range(draws):
                drawn = {n: draw_rows(kind, seed, k, f"reproduce.{n}", rows) for n, kind in kinds.items()}
                parts = objective.loss(model, {n: v.to(pipe.device) for n, v in {**batch, **drawn}.items()}).parts
                total[first : first + len(rows)] += parts["mse"].double().cpu().numpy() / draws
        return {"mse": total}


def _means(rows: Mapping[str, Array]) -> dict[str, float]:
    return {name: float(values[values != MISSING].mean()) for name, values in rows.items()}
