"""How far an accelerated output lies from the unaccelerated one of the same seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ditkit.core.errors import DitkitError


@dataclass(frozen=True)
class Drift:
    """Distances over ``num`` samples. ``psnr`` (dB) is that of the mean squared error over all samples, ``worst_psnr`` of the worst
    sample; infinite where nothing differs.
    """

    psnr: float
    worst_psnr: float
    relative_l2: float
    max_abs: float
    num: int


def drift(output: Tensor, reference: Tensor, data_range: float = 2.0) -> Drift:
    """``output`` and ``reference`` (B, ...), row by row from the same seed.

    Args:
        data_range: largest minus smallest value that the data can take; 2 for data in [-1, 1].

    Raises:
        DitkitError: the shapes differ, or a value is not finite.
    """
    if output.shape != reference.shape or output.dim() < 2:
        raise DitkitError(f"an output of shape {tuple(output.shape)}", allowed=f"that of the reference, {tuple(reference.shape)}, (B, ...)")
    a, b = output.detach().double().cpu().flatten(1), reference.detach().double().cpu().flatten(1)
    for name, u in (("the output", a), ("the reference", b)):
        bad = (~torch.isfinite(u)).any(1).nonzero()
        if len(bad):
            raise DitkitError(f"{name} is not finite in sample {int(bad[0])}", hint="nothing can be compared with it")
    mse = (a - b).square().mean(1)
    norm = b.norm().item()
    relative = (a - b).norm().item() / norm if norm else math.inf if mse.any() else 0.0
    return Drift(_psnr(mse.mean(), data_range), _psnr(mse.max(), data_range), relative, (a - b).abs().max().item(), len(a))


def _psnr(mse: Tensor, data_range: float) -> float:
    return 10 * math.log10(data_range**2 / mse.item()) if mse > 0 else math.inf
