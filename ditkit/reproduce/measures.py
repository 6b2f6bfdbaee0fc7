"""What is measured of a base, sample by sample, so that arms can be compared in pairs.

Loss: mean squared error of the network's prediction on the test split, at times and noises that are the same for every base.
Samples: features for a Fréchet distance to the training split (64 principal components of real pixels), whether a logistic
regression on real pixels reads the class that was asked for, and the mean squared difference from the pictures of another arm.
Picture k of every arm of a seed has the same class and noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from ditkit.methods.specs import parse_spec
from ditkit.pipeline import Pipeline
from ditkit.train.batches import draw_rows
from ditkit.train.objectives import objective_from

from .bases import PACKAGE, Base, code_hash, code_of, method_files
from .protocol import READ, Arm, Protocol
from .readings import MISSING, Captions
from .statistics import Array, Rows

MEASURE_SEED = 2**31  # noise and times of held-out losses: no training seed
PICTURES_A_SEED = 1_000_000  # picture k of seed s starts from the noise of number s * this + k
BATCH = 120
PICTURES = "pictures"  # rows (N, C H W), where arms are compared picture by picture
ROWS_OF = {"mse": "mse", "frechet": "features", "accuracy": "hits", "drift": "drift", **{name: name for name in READ}}


class Real:
    """Real data: the training split as reference, the test split as what real pictures score."""

    def __init__(self, data: str, options: Mapping[str, Any] | None = None) -> None:
        self.name = data
        self.x, self.y = everything(load(data, "train", **(options or {})))
        self.test_x, self.test_y = everything(load(data, "test", **(options or {})))
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

    def asks(self, num: int) -> dict[str, Any]:
        """What a pipeline is asked for."""
        return {"class_labels": self.labels(num).tolist()}

    def hits(self, x: Tensor, labels: Tensor) -> Array:
        """(N,) 1 where the classifier reads the label."""
        return (self.classifier.predict(x.flatten(1).numpy()) == labels.numpy()).astype(np.float64)

    def distance(self, features: Array) -> float:
        """Fréchet distance to the training split."""
        return frechet_distance(Moments.of(features), self.moments, allow_singular=True)

    def floor(self, num: int, read_labels: bool = True) -> dict[str, Any]:
        """What as many real test pictures score (or all there are): no sample can be expected to do better."""
        x, y = self.test_x[:num], self.test_y[:num]
        read = {"accuracy": float(self.hits(x, y).mean())} if read_labels else {}
        return {"frechet": self.distance(self.pca(x)), **read, "num_samples": len(x)}


@dataclass(frozen=True)
class Measured:
    """One arm, one seed: ``mse`` (N,), or ``features`` (N, 64), maybe ``hits`` (N,), ``drift`` (N,) and ``pictures`` (N, C H W); or what a
    reader finds (``readings.py``)."""

    rows: Mapping[str, Array]
    real: Real | Captions

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(next(iter(self.rows.values())))

    def value(self, metric: str, rows: Rows | None = None) -> float:
        """The metric over all samples, or over some."""
        values = self.rows[ROWS_OF[metric]]
        chosen = values if rows is None else values[rows]
        if metric == "frechet" and isinstance(self.real, Real):
            return self.real.distance(chosen)
        return float(chosen[chosen != MISSING].mean())

    def metrics(self) -> dict[str, float]:
        """All that was measured."""
        return {metric: self.value(metric) for metric, rows in ROWS_OF.items() if rows in self.rows}

    def against(self, reference: Measured) -> Measured:
        """With ``drift``: of each picture, the mean squared difference from the reference's of the same noise."""
        apart = ((self.rows[PICTURES] - reference.rows[PICTURES]) ** 2).mean(1)
        return replace(self, rows={**self.rows, "drift": apart.astype(np.float64)})


def pipeline_of(base: Base, arm: Arm) -> tuple[Pipeline, Pipeline]:
    """The base with the arm's methods: as it is sampled, and uncompiled, for counting."""
    pipe = Pipeline.from_pretrained(base.folder, dtype="float32")
    if not arm.methods:
        return pipe, pipe
    spec = parse_spec(arm.methods)
    eager = pipe.with_methods(*spec.build()) if spec.methods else pipe
    return spec.compiled(eager), eager


def measure(base: Base, arm: Arm, seed: int, protocol: Protocol, real: Real | Captions, store: Path, progress: bool = True) -> Measured:
    """Measure, or read what an interrupted run of the same command measured. The arm's number of steps is known."""
    path = store / f"{_key(base, arm, seed, protocol)}.safetensors"
    try:
        return Measured({k: v.numpy() for k, v in read_tensors(path).items()}, real)
    except WeightsError:
        pass
    pipe, _ = pipeline_of(base, arm)
    rows = _rows(pipe, arm, seed, protocol, real, progress)
    store.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in rows.items()})
    return Measured(rows, real)


def _rows(pipe: Pipeline, arm: Arm, seed: int, protocol: Protocol, real: Real | Captions, progress: bool) -> dict[str, Array]:
    if isinstance(real, Captions):
        if arm.measure == "loss":
            return real.held_out(pipe, protocol.draws, protocol.held_out, MEASURE_SEED)
        asked = real.asks(protocol.num_samples)
        return real.read(sample(pipe, arm, asked, seed * PICTURES_A_SEED, BATCH, progress), asked["prompt"])
    if arm.measure == "loss":
        return held_out(pipe, real, protocol.draws, protocol.held_out)
    return samples(pipe, arm, seed, protocol, real, progress)


def _key(base: Base, arm: Arm, seed: int, protocol: Protocol) -> str:
    methods = [name for name, _ in parse_spec(arm.methods).methods] if arm.methods else []
    files = [*code_of("", protocol.data, told=protocol.reader is not None), Path(__file__)]
    files += [path for name in methods for path in method_files(name)]
    if protocol.reader is not None:
        files += [Path(__file__).with_name("readings.py"), *sorted((PACKAGE / "eval").glob("scene_*.py"))]
    sizes = {k: getattr(protocol, k) for k in ("data_config", "num_samples", "draws", "held_out", "read_labels", "reader")}
    told = {"label": "", "equal_time_to": "", "reference": bool(arm.reference)}
    what = {**arm.to_dict(), **told, "base": base.hash, "seed": seed, **sizes}
    return hashlib.sha256(json.dumps([what, code_hash(tuple(files))], sort_keys=True).encode()).hexdigest()[:32]


@torch.no_grad()
def held_out(pipe: Pipeline, real: Real, draws: int, most: int) -> dict[str, Array]:
    """``mse`` (N,): of each test sample, ``most`` at most, with its label, the mean over ``draws`` times and noises."""
    x, y = real.test_x[:most], real.test_y[:most]
    objective = objective_from("diffusion", {"label_dropout": 0.0}, pipe.process)
    kinds = objective.draws(tuple(x.shape[1:]))
    rows = range(len(x))
    total = torch.zeros(len(rows), dtype=torch.float64)
    model = pipe.model.eval()
    for k in range(draws):
        drawn = {name: draw_rows(kind, MEASURE_SEED, k, f"reproduce.{name}", rows) for name, kind in kinds.items()}
        batch = {"x": x, "y": y, **drawn}
        losses = objective.loss(model, {name: v.to(pipe.device) for name, v in batch.items()})
        total += losses.parts["mse"].double().cpu()
    return {"mse": (total / draws).numpy()}


def samples(pipe: Pipeline, arm: Arm, seed: int, protocol: Protocol, real: Real, progress: bool) -> dict[str, Array]:
    """``features`` (N, 64), and what the protocol asks for of ``hits`` (N,) and ``pictures`` (N, C H W)."""
    labels = real.labels(protocol.num_samples)
    x = sample(pipe, arm, {"class_labels": labels.tolist()}, seed * PICTURES_A_SEED, BATCH, progress)
    found: dict[str, Any] = {"features": real.pca(x)}
    if protocol.read_labels:
        found["hits"] = real.hits(x, labels)
    if any(a.reference for a in protocol.arms.values()):
        found[PICTURES] = x.flatten(1).numpy()
    return found


def sample(pipe: Pipeline, arm: Arm, asked: Mapping[str, Any], first: int, batch_size: int, progress: bool = False) -> Tensor:
    """Pictures as the arm says, with seeds from ``first`` on, in batches of one size where there are several.

    ``asked``: class labels or prompts, see ``asks``."""
    out = pipe(
        **asked,
        height=arm.size or None,
        width=arm.size or None,
        num_inference_steps=arm.num_inference_steps,
        guidance_scale=arm.guidance_scale,
        solver=arm.solver,
        seed=first,
        batch_size=min(batch_size, *map(len, asked.values())),
        progress=progress,
    )
    return out.x
