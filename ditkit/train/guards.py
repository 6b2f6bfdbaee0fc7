"""Numerical guards: a step whose loss or gradient is not finite is skipped, counted and explained; three in a row end the run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.core.errors import DitkitError
from ditkit.finite import finite

from .distributed import local

LIMIT = 3  # bad steps in a row
WINDOW, HISTORY = 128, 64  # of the spike rule: steps remembered, steps needed before it judges


class TrainingStopped(DitkitError):
    """Training cannot go on: its loss or gradients are not finite."""


@dataclass
class Guard:
    """Judges steps by loss and gradient norm.

    Attributes:
        spike_sigma: also skip what exceeds mean + this many deviations of the last 128 accepted steps; 0: never.
    """

    spike_sigma: float = 0.0
    skipped: int = 0
    in_a_row: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def judge(self, loss: float, norm: float) -> str:
        """``""``: take the step; otherwise why it is skipped."""
        reason = self._reason(loss, norm)
        if reason:
            self.skipped += 1
            self.in_a_row += reason == "not finite"
            return reason
        self.in_a_row = 0
        if self.spike_sigma:
            self.losses.append(loss)
            self.norms.append(norm)
        return ""

    def _reason(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "not finite"
        if self.spike_sigma and len(self.losses) >= HISTORY:
            for value, history, name in ((loss, self.losses, "loss"), (norm, self.norms, "gradient norm")):
                mean = sum(history) / len(history)
                sigma = math.sqrt(sum((h - mean) ** 2 for h in history) / len(history))
                if value > mean + self.spike_sigma * sigma:
                    return f"spike of the {name}"
        return ""

    def stop_if_hopeless(self, step: int, where: str) -> None:
        """Raise TrainingStopped after three steps in a row that were not finite."""
        if self.in_a_row >= LIMIT:
            raise TrainingStopped(
                f"loss or gradients were not finite in {LIMIT} steps in a row, up to step {step}; first non-finite: {where}",
                hint="lower trainer.learning_rate, or set trainer.grad_clip; the last checkpoint is from before",
            )

    def state(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "losses": list(self.losses), "norms": list(self.norms)}

    def restore(self, state: dict[str, Any]) -> None:
        """From ``state``."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])


def first_non_finite(model: nn.Module, loss: Callable[[], Tensor], agree: Callable[[bool], bool] = bool) -> str:
    """Compute a step again and name the first parameter, module output or gradient that is not finite.

    Args:
        loss: computes the loss with ``model``, which must not be compiled. Gradients are cleared afterwards.
        agree: whether a flag is set in any process: all of them must take the same way.
    """
    found = [f"parameter {name}" for name, p in model.named_parameters() if not finite(local(p.detach()))]
    with _watching(model, found), torch.enable_grad():
        value = loss()
        if not found and not finite(value):
            found.append("the loss, of a finite output")
        if not agree(bool(found)):
            value.backward()
    # the backward pass reaches the last parameters first
    found += [f"gradient of {n}" for n, p in reversed(list(model.named_parameters())) if p.grad is not None and not finite(local(p.grad))]
    model.zero_grad(set_to_none=True)
    return found[0] if found else ""


@contextmanager
def _watching(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Note the modules whose output is not finite, in the order in which they end."""

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not finite(output):
                found.append(f"output of {name or type(model).__name__}")

        return look

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
