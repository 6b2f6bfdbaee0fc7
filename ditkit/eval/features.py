"""What distances between sets of pictures are measured on, and who reads their labels.

An extractor is named and turns x (B, C, H, W) in [-1, 1] into features (B, d). ``pca64`` and ``classifier`` are fitted to the
real training split, ``efficientnet-lite0`` (``efficientnet.py``) was trained on ImageNet; the label reader is a support vector machine
of scikit-learn, independent of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.cache import cache_dir, keep
from ditkit.core.errors import DitkitError, WeightsError, nearest
from ditkit.core.files import read_tensors
from ditkit.core.lazy import require
from ditkit.data import Dataset

from .metrics import Array


class Extractor(Protocol):
    """x (B, C, H, W) in [-1, 1] -> features (B, dim), float64. ``rule``: what is done to pictures first, in words."""

    name: str
    dim: int
    rule: str

    def __call__(self, x: Tensor) -> Array: ...


def everything(data: Dataset, most: int = 10_000, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """The samples of a split, x (N, C, H, W) and y (N,); of a larger one ``most``, evenly spread."""
    chosen = np.arange(len(data)) if len(data) <= most else np.linspace(0, len(data) - 1, most).astype(np.int64)
    parts = [data.batch(rows) for rows in np.array_split(chosen, max(1, len(chosen) // chunk))]
    return torch.cat([p["x"] for p in parts]), torch.cat([p["y"] for p in parts])


def in_chunks(call: Extractor, x: Tensor, chunk: int = 64) -> Array:
    """``call`` over x in parts, so that memory does not grow with the set."""
    from tqdm import tqdm

    parts = tqdm(x.split(chunk), desc=f"features {call.name}", leave=False, delay=2, disable=None)  # None: only on a terminal
    return np.concatenate([call(part) for part in parts])


def remembered(call: Extractor, x: Tensor) -> Array:
    """``in_chunks`` of real pictures, kept in the cache where the extractor is slow and the same for all data."""
    if call.name not in FIXED:
        return in_chunks(call, x)
    path = cache_dir("features") / f"{call.name}-{_content(f'{call.name}, {call.rule}', x)}.safetensors"
    try:
        return read_tensors(path, {"features": (len(x), call.dim)})["features"].numpy()
    except (WeightsError, OSError):
        found = in_chunks(call, x)
    keep(path, {"features": torch.from_numpy(found)})
    return found


class PixelPCA:
    """Coordinates along the ``dim`` main axes of real pixels; pictures larger than ``side`` are averaged down to it first."""

    def __init__(self, mean: Array, axes: Array, side: int) -> None:
        self.mean, self.axes, self.side = mean, axes, side  # (P,), (P, dim)
        self.dim = axes.shape[1]
        self.name = f"pca{self.dim}"
        self.rule = f"averaged to at most {side} x {side}"

    @classmethod
    def fit(cls, x: Tensor, dim: int = 64, side: int = 32) -> PixelPCA:
        """x (N, C, H, W): real pictures."""
        pixels = _pixels(x, side)
        mean = pixels.mean(0)
        dim = min(dim, pixels.shape[1])
        size = pixels.shape[1]
        linalg = require("scipy.linalg", "eval")
        _, axes = linalg.eigh(np.cov(pixels.T), subset_by_index=(size - dim, size - 1))
        return cls(mean, axes[:, ::-1], side)

    def __call__(self, x: Tensor) -> Array:
        return (_pixels(x, self.side) - self.mean) @ self.axes


def _pixels(x: Tensor, side: int) -> Array:
    height, width = (min(n, side) for n in x.shape[2:])
    return F.adaptive_avg_pool2d(x.detach().double().cpu(), (height, width)).flatten(1).numpy()


class Classifier(nn.Module):
    """A small convolutional classifier; its features are the 64 numbers before the last layer, each of unit variance on real data."""

    dim = 64
    rule = "as they are"

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.name = "classifier"
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 64, 3, padding=1, stride=2),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, self.dim),
            nn.GELU(),
        )
        self.last = nn.Linear(self.dim, num_classes)
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("scale", torch.ones(self.dim))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, K)."""
        return self.last(self.body(x))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Any:  # an extractor; training goes through ``forward``
        return ((self.body(x.float().cpu()) - self.mean) / self.scale).double().numpy()

    @torch.no_grad()
    def standardise(self, x: Tensor) -> None:
        """Set mean and scale of the features from real pictures."""
        features = torch.cat([self.body(part) for part in x.split(256)])
        self.mean.copy_(features.mean(0))  # type: ignore[operator]
        self.scale.copy_(features.std(0).clamp_min(1e-3))  # type: ignore[operator]


STEPS, BATCH, RATE = 200, 128, 2e-3


def fit_classifier(x: Tensor, y: Tensor, num_classes: int) -> Classifier:
    """Trained on x (N, C, H, W), y (N,) with a fixed seed; the weights are cached by the content of the data."""
    key = _content(f"classifier 1, {STEPS} x {BATCH} at {RATE}", x, y)
    model, path = _new_classifier(x.shape[1], num_classes), cache_dir("classifiers") / f"{key}.safetensors"
    try:
        model.load_state_dict(read_tensors(path, {k: tuple(v.shape) for k, v in model.state_dict().items()}))
    except (WeightsError, OSError):
        _train(model, x, y)
        model.standardise(x)
        keep(path, {k: v.detach() for k, v in model.state_dict().items()})
    return model.eval()


def _new_classifier(channels: int, num_classes: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(channels, num_classes)


def _train(model: Classifier, x: Tensor, y: Tensor) -> None:
    from tqdm import trange

    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    rng = np.random.default_rng(0)
    with torch.enable_grad():
        for _ in trange(STEPS, desc="classifier for the features", leave=False, delay=2, mininterval=1):
            rows = torch.from_numpy(rng.integers(len(x), size=BATCH))
            loss = F.cross_entropy(model.forward(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


def _content(what: str, *tensors: Tensor) -> str:
    """Names what is cached by all that decides it: what is done, and to which numbers."""
    digest = hashlib.sha256(f"{what}, torch {torch.__version__}".encode())
    for u in tensors:
        digest.update(f"{tuple(u.shape)}".encode())
        digest.update(u.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _classifier(x: Tensor, y: Tensor | None, num_classes: int) -> Extractor:
    if y is None:
        allowed = ", ".join(n for n in (*FITTED, *FIXED) if n != "classifier")
        raise DitkitError("the features 'classifier' are learned from class labels, and the data have captions", allowed=allowed)
    return fit_classifier(x, y, num_classes)


def _efficientnet() -> Extractor:
    from .efficientnet import EfficientNetLite0

    return EfficientNetLite0.load()


FITTED: dict[str, Callable[[Tensor, Tensor | None, int], Extractor]] = {
    "pca64": lambda x, y, num_classes: PixelPCA.fit(x),
    "classifier": _classifier,
}
"""Name -> extractor fitted to real pictures x (N, C, H, W), their labels y (N,) if there are any, and the number of classes."""
FIXED: dict[str, Callable[[], Extractor]] = {"efficientnet-lite0": _efficientnet}
"""Name -> extractor that is the same for all data."""


def extractor(name: str, x: Tensor, y: Tensor | None = None, num_classes: int = 0) -> Extractor:
    """The extractor of that name, fitted, where it is fitted, to real pictures x (N, C, H, W) and their labels y (N,)."""
    if name in FIXED:
        return FIXED[name]()
    if name in FITTED:
        return FITTED[name](x, y, num_classes)
    known = (*FITTED, *FIXED)
    raise DitkitError(f"there is no extractor {name!r}", allowed=", ".join(known), hint=nearest(name, known))


class LabelReader:
    """A support vector machine on real pixels (scikit-learn's SVC, gamma "scale"): which class does a picture show?"""

    name = "SVC on pixels"

    def __init__(self, x: Tensor, y: Tensor, side: int = 16) -> None:
        self.side = side
        self._svc = require("sklearn.svm", "eval").SVC().fit(_pixels(x.clamp(-1, 1), side), y.numpy())

    def __call__(self, x: Tensor) -> np.ndarray:
        """x (B, C, H, W) in [-1, 1] (values outside are clipped) -> classes (B,)."""
        return self._svc.predict(_pixels(x.clamp(-1, 1), self.side))
