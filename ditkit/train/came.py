"""CAME (arXiv 2307.02047): Adafactor's factored second moments, and steps that shrink where successive updates disagree.

For a matrix of gradients G, with R and C the averages over its rows and columns (algorithm 2, and section 3.3):

    V = R C / mean(R),    R <- b2 R + (1 - b2) mean_col(G^2 + e1),    C likewise over rows
    u = G / sqrt(V),      u <- u / max(1, RMS(u) / d)
    m <- b1 m + (1 - b1) u
    S = R' C' / mean(R'), R' <- b3 R' + (1 - b3) mean_col((u - m)^2 + e2), C' likewise
    p <- p - rate (m / sqrt(S) + decay p)

State: one tensor like the parameter and four vectors, where AdamW has two tensors. A tensor of more axes is factored over its last two; a
vector keeps its whole second moment and steps by m. As released (and unlike the paper's Adafactor) averages start at 0 and are never
corrected for that. PixArt-Sigma (2403.04692) is trained by it: rate 2e-5, no decay, b = (0.9, 0.999, 0.9999).

Sharded parameters (DTensors) keep sharded state: means over an axis that is split are summed over the processes. They are added in float64,
so that a result hardly depends on their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

SQUARES, DISTANCES = "exp_avg_sq", "exp_avg_res"  # of the gradient; of the update from its average


class CAME(torch.optim.Optimizer):
    """See the module. A parameter without a gradient is left alone.

    Args:
        params: tensors, or groups of them with a ``weight_decay`` each.
        lr: learning rate.
        betas: b1 of the update's average, b2 of the squares, b3 of the confidence.
        eps: e1, added to squared gradients, and e2, added to squared distances.
        clip: d, the largest root mean square of an update before it is averaged.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-5,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "clip": clip, "weight_decay": weight_decay})

    def begin(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step: zeros."""
        state: dict[str, Tensor] = {"exp_avg": torch.zeros_like(p)}
        if p.dim() < 2:
            state[SQUARES] = torch.zeros_like(p)
        else:
            rows, columns = (_mean(state["exp_avg"], axis) for axis in (-1, -2))
            state |= {f"{name}_row": rows.clone() for name in (SQUARES, DISTANCES)}
            state |= {f"{name}_col": columns.clone() for name in (SQUARES, DISTANCES)}
        self.state[p] = state
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self.state[p] or self.begin(p), group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        (b1, b2, b3), (e1, e2), average = group["betas"], group["eps"], state["exp_avg"]
        u = grad * _inverse_root(state, SQUARES, grad.square() + e1, b2)
        u = u / (_mean(u.square()).sqrt() / group["clip"]).clamp(min=1.0)
        average.lerp_(u, 1 - b1)
        step = average
        if p.dim() >= 2:
            step = average * _inverse_root(state, DISTANCES, (u - average).square() + e2, b3)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])


def _inverse_root(state: dict[str, Tensor], name: str, squares: Tensor, beta: float) -> Tensor:
    """Average ``squares`` into the state and give 1 / sqrt of the average, whole or factored, as it multiplies a tensor like them."""
    if squares.dim() < 2:
        return state[name].lerp_(squares, 1 - beta).rsqrt()
    rows = state[f"{name}_row"].lerp_(_mean(squares, -1), 1 - beta)
    columns = state[f"{name}_col"].lerp_(_mean(squares, -2), 1 - beta)
    return (rows / _mean(rows, -1).unsqueeze(-1)).rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)


def _mean(x: Tensor, axis: int | None = None) -> Tensor:
    """The mean over one axis, or over all; where x is sharded along it, over all processes."""
    axes = list(range(x.dim())) if axis is None else [axis]
    total = x.sum(axes, dtype=torch.float64)
    if hasattr(total, "placements") and any(place.is_partial() for place in total.placements):
        from torch.distributed.tensor import Replicate

        total = total.redistribute(placements=[Replicate() if place.is_partial() else place for place in total.placements])  # type: ignore[attr-defined]
    return (total / math.prod(x.shape[a] for a in axes)).to(x.dtype)
