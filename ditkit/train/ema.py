"""The average of the weights over training, in float32 whatever the model's dtype, held in a second model.

So nothing is ever swapped into the model that is trained: previews, validation and the bundle use the second one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from .distributed import local

M = TypeVar("M", bound=nn.Module)


def second_model(model: M) -> M:
    """A copy in which what is trained is float32 storage of its own, and what is frozen is shared with ``model``."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    twin = copy.deepcopy(model, memo=dict(frozen))
    for p in twin.parameters():
        if id(p) not in frozen:
            p.data = p.data.float() if p.is_floating_point() else p.data
            p.requires_grad_(False)
    return twin.eval()


class EMA:
    """shadow <- decay shadow + (1 - decay) weight, after each step.

    Args:
        twin: ``second_model(model)``; sharded in the same way if ``model`` is.
        decay: 0 follows the weights, 0.9999 averages over some 10,000 steps.
    """

    def __init__(self, twin: nn.Module, model: nn.Module, decay: float) -> None:
        self.model, self.decay = twin, decay
        weights = dict(model.named_parameters())
        self.shadow: dict[str, Tensor] = {n: p for n, p in twin.named_parameters() if weights[n].requires_grad}
        self._weights = [weights[n] for n in self.shadow]
        self._buffers = list(zip(twin.buffers(), model.buffers()))

    @torch.no_grad()
    def update(self, accepted: Tensor | None = None) -> None:
        """One step. ``accepted``: 0-dim tensor, 0 where the step was skipped on the device (nothing then changes)."""
        shadow = list(self.shadow.values())
        weights = [w if w.dtype == s.dtype else w.to(s.dtype) for s, w in zip(shadow, self._weights)]
        if accepted is None:
            torch._foreach_lerp_(shadow, weights, 1 - self.decay)
        else:
            torch._foreach_lerp_(shadow, weights, [(1 - self.decay) * accepted] * len(shadow))
        for mine, theirs in self._buffers:
            mine.copy_(theirs)

    @torch.no_grad()
    def distance(self, total: Callable[[Tensor], Tensor] = lambda value: value) -> float:
        """|weight - shadow| / |weight|, over all that is trained; ``total`` adds over processes."""
        apart, size = torch.zeros(2, dtype=torch.float64)
        for weight, shadow in zip(map(local, self._weights), map(local, self.shadow.values())):
            apart += (weight - shadow).square().sum()
            size += weight.square().sum()
        both = total(torch.stack([apart, size]))
        return float((both[0] / both[1]).sqrt())
