"""Data sets: the embedded ones by name, your own by path.

A name stands for a module of this package with ``load(split, **options) -> Dataset``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ditkit.core.errors import DitkitError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
EMBEDDED: dict[str, str] = {"digits": "digits", "scenes": "scenes", "emoji": "emoji"}  # name -> module


class NoSplit(DitkitError):
    """A data set of the user's own that has no such split: nothing was set aside for it."""


class Dataset(Protocol):
    """Samples that can be had in any order, without state: the order is the trainer's.

    A set may also have

    - ``augmented(indices, *, seed, step)``, where samples change from step to step (mirrored pictures, draws of a posterior): training
      then calls it in place of ``batch``;
    - ``captions(indices) -> list[str]``;
    - ``groups``, where samples differ in size: the numbers of the samples of each size, of which a batch holds one;
    - ``framing(indices, ...) -> (B, 4)``, where it knows what its pictures were cut from (``Pictures.framing``);
    - ``licence`` and ``credit``, where what is made from it must name them: they land in the bundle of a model that is trained on it and
      in the pictures that the model makes.
    """

    @property
    def name(self) -> str:
        """What ``load`` was given."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one sample."""

    @property
    def num_classes(self) -> int:
        """Number of labels."""

    @property
    def labels(self) -> list[str]:
        """Class names, in the order of their numbers."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """``x`` (B, C, H, W) float32 in [-1, 1] and the conditioning, such as ``y`` (B,) int64."""


def load(name: str, split: Split = "train", **options: Any) -> Dataset:
    """The data set of that name or at that path: a folder of pictures, of ``.tar`` shards or of cached latents.

    Raises:
        DitkitError: there is none of that name. NoSplit: a set of your own without that split.
    """
    if split not in SPLITS:
        raise DitkitError(f"split is {split!r}", allowed="'train' or 'test'")
    if name not in EMBEDDED:
        if "/" in name or Path(name).exists():
            from .paths import open_path

            own: Dataset = open_path(name, split, **options)
            return own
        raise DitkitError(f"there is no data set {name!r}", allowed=", ".join((*EMBEDDED, "a path")), hint=nearest(name, EMBEDDED))
    data: Dataset = importlib.import_module(f".{EMBEDDED[name]}", __name__).load(split, **options)
    return data
