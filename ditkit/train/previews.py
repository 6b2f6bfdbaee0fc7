"""What is seen while training: validation loss at fixed times and noise, and grids of samples from fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ditkit.output import Output
from ditkit.pipeline import Pipeline

from .batches import Batch
from .objectives import Objective

SIDE, PIXELS = 10, 32  # of a grid: pictures a row, at most; pixels a picture, at least


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is as it was, and sharded again if it was sharded."""
    training = model.training
    model.eval()
    if hasattr(model, "unshard"):
        model.unshard()  # type: ignore[operator]  # labels are embedded outside a forward, where nobody gathers parameters
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        if hasattr(model, "reshard"):
            model.reshard()  # type: ignore[operator]


def validation_loss(model: nn.Module, objective: Objective, batches: Sequence[Batch], size: int) -> float:
    """Mean loss over the samples of fixed batches, in parts of ``size``."""
    total = 0.0
    with evaluating(model):
        for batch in batches:
            for i in range(0, len(batch), size):
                part = {k: v[i : i + size] for k, v in batch.tensors.items()}
                total += float(objective.loss(model, part).loss.double().sum())
    return total / sum(map(len, batches))


def sample_grid(pipe: Pipeline) -> Output:
    """The same labels and seeds every time, a row for each label, so that the eye can follow; or one picture for each example caption.

    Raises:
        DitkitError: a sample is not finite; step and module are named.
    """
    side = min(SIDE, len(pipe.config.data.labels) or SIDE)
    with evaluating(pipe.model):
        if pipe.config.data.captions:
            return pipe(seed=0, progress=False)
        return pipe(class_labels=list(range(side)), num_images=side * side, seed=0, progress=False)


def save_grid(output: Output, path: Path) -> None:
    """One PNG, small pictures enlarged."""
    output.save(path, zoom=max(1, -(-PIXELS // output.x.shape[-1])))
