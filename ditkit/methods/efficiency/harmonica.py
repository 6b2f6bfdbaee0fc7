"""HarmoniCa (arXiv 2410.01723): which branches to reuse at which step is learned, along the accelerated model's own trajectory.

A table of logits, one for each step and branch, decides; the network is frozen. The first step executed computes everything. The
objective ``harmonica`` (``ditkit.train.routers``) learns the table: from pure noise along the student's own steps (SDT), each step's
matching error weighted by how much reuse there damages the final image (IEPO).

Differs from the released code: any backbone and deterministic solver, not only DiT and DDIM; slots by guidance pass; a share of
evaluations to reuse may be named instead of the loss coefficient; tables refuse other networks and numbers of steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkit.core import registry
from ditkit.core.config import Config

from ._router import Router


@registry.register("methods", "harmonica")
class HarmoniCa(Router):
    """Trained parameters: ``routers.STEP`` (J,) logits for the steps 1 .. T - 1 in order of execution."""

    proxy: Tensor
    updates: Tensor

    def __init__(self, config: Config | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        self.register_buffer("proxy", torch.ones(self.config.num_inference_steps))  # lambda of each step
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # trajectories learned from
