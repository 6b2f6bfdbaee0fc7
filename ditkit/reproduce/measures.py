"""What is measured of a base, sample by sample, so that arms can be compared in pairs.

Loss: mean squared error of the network's prediction on the test split, at times and noises that are the same for every base.
Samples: features for a Fréchet distance to the training split (64 principal components of real pixels), and whether a logistic
regression on real pixels reads the class that was asked for. Picture k of every arm of a seed has the same class and noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditkit.core.errors import WeightsError
from ditkit.core.files import read_tensors, write_tensors
from ditkit.core.lazy import require
from ditkit.data import load
from ditkit.eval.features import PixelPCA, everything
from ditkit.eval.metrics import Moments, frechet_distance
from ditkit.pipeline import Pipeline
from ditkit.train.batches import draw_rows
from ditkit.train.objectives import objective_from

from .bases import Base, code_hash, code_of
from .protocol import Arm, Protocol
from .statistics import Array, Rows

MEASURE_SEED = 2**31  # noise and times of held-out losses: no training seed
PICTURES_A_SEED = 1_000_000  # picture k of seed s starts from the noise of number s * this + k


class Real:
    """Real data: the training split as reference, the test split as what real pictures score."""

    def __init__(self, data: str) -> None:
        self.name = data
        self.x, self.y = everything(load(data, "train"))
        self.test_x, self.test_y = everything(load(data, "test"))
        self.pca = PixelPCA.fit(self.x)
        self.moments = Moments.of(self.pca(self.x))

    @cached_property
    def classifier(self) -> Any:
        """Logistic regression on the pixels of the training split."""
        linear = require("sklearn.linear_model", "eval")
        return linear.LogisticRegression(max_iter=2000).fit(self.x.flatten(1).numpy(), self.y.numpy())

    def labels(self, num: int) -> Tensor:
        """(num,) classes mixed as in the test split."""
        return self.test_y[torch.arange(num) % len(self.test_y)]

    def hits(self, x: Tensor, labels: Tensor) -> Array:
        """(N,) 1 where the classifier reads the label."""
        return (self.classifier.predict(x.flatten(1).numpy()) == labels.numpy()).astype(np.float64)

    def distance(self, features: Array) -> float:
        """Fréchet distance to the training split."""
        return frechet_distance(Moments.of(features), self.moments, allow_singular=True)

    def floor(self, num: int) -> dict[str, Any]:
        """What as many real test pictures score (or all there are): no sample can be expected to do better."""
        x, y = self.test_x[:num], self.test_y[:num]
        return {"frechet": self.distance(self.pca(x)), "accuracy": float(self.hits(x, y).mean()), "num_samples": len(x)}


@dataclass(frozen=True)
class Measured:
    """One arm, one seed: ``mse`` (N,), or ``features`` (N, 64) and ``hits`` (N,)."""

    rows: Mapping[str, Array]
    real: Real

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(next(iter(self.rows.values())))

    def value(self, metric: str, rows: Rows | None = None) -> float:
        """The metric over all samples, or over some."""
        values = self.rows[{"mse": "mse", "frechet": "features", "accuracy": "hits"}[metric]]
        chosen = values if rows is None else values[rows]
        return self.real.distance(chosen) if metric == "frechet" else float(chosen.mean())

    def metrics(self) -> dict[str, float]:
        """All that was measured."""
        return {m: self.value(m) for m in (("mse",) if "mse" in self.rows else ("frechet", "accuracy"))}


def measure(base: Base, arm: Arm, seed: int, protocol: Protocol, real: Real, store: Path, progress: bool = True) -> Measured:
    """Measure, or read what an interrupted run of the same command measured."""
    path = store / f"{_key(base, arm, seed, protocol)}.safetensors"
    try:
        return Measured({k: v.numpy() for k, v in read_tensors(path).items()}, real)
    except WeightsError:
        pass
    pipe = Pipeline.from_pretrained(base.folder, dtype="float32")
    rows = held_out(pipe, real, protocol.draws) if arm.measure == "loss" else samples(pipe, arm, seed, protocol, real, progress)
    store.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in rows.items()})
    return Measured(rows, real)


def _key(base: Base, arm: Arm, seed: int, protocol: Protocol) -> str:
    files = (*code_of("", protocol.data), Path(__file__))
    what = {**arm.to_dict(), "base": base.hash, "label": "", "num_samples": protocol.num_samples, "draws": protocol.draws, "seed": seed}
    return hashlib.sha256(json.dumps([what, code_hash(files)], sort_keys=True).encode()).hexdigest()[:32]


@torch.no_grad()
def held_out(pipe: Pipeline, real: Real, draws: int) -> dict[str, Array]:
    """``mse`` (N,): of each test sample, with its label, the mean over ``draws`` times and noises."""
    objective = objective_from("diffusion", {"label_dropout": 0.0}, pipe.process)
    kinds = objective.draws(tuple(real.test_x.shape[1:]))
    rows = range(len(real.test_x))
    total = torch.zeros(len(rows), dtype=torch.float64)
    model = pipe.model.eval()
    for k in range(draws):
        drawn = {name: draw_rows(kind, MEASURE_SEED, k, f"reproduce.{name}", rows) for name, kind in kinds.items()}
        batch = {"x": real.test_x, "y": real.test_y, **drawn}
        losses = objective.loss(model, {name: v.to(pipe.device) for name, v in batch.items()})
        total += losses.parts["mse"].double().cpu()
    return {"mse": (total / draws).numpy()}


def samples(pipe: Pipeline, arm: Arm, seed: int, protocol: Protocol, real: Real, progress: bool) -> dict[str, Array]:
    """``features`` (N, 64) and ``hits`` (N,)."""
    labels = real.labels(protocol.num_samples)
    out = pipe(
        labels.tolist(),
        num_inference_steps=arm.num_inference_steps,
        guidance_scale=arm.guidance_scale,
        solver=arm.solver,
        seed=seed * PICTURES_A_SEED,
        batch_size=min(120, len(labels)),
        progress=progress,
    )
    return {"features": real.pca(out.x), "hits": real.hits(out.x, labels)}
