"""Learning-to-Cache (arXiv 2406.01733): at every second step, which branches to reuse from the step before is learned.

With s = T-1 .. 0 in execution order, steps of odd s compute and keep everything; those of even s reuse what a table of logits says, so
that nothing is reused for longer than one step and at most half of all evaluations. The objective ``l2c`` (``ditkit.train.routers``)
learns the table from pairs of adjacent steps that start from noised data.

Differs from the released code: the parity of s decides, not a counter; any backbone and deterministic solver.
"""

from __future__ import annotations

from typing import Any

from ditkit.core import registry
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError

from ._router import Router


@registry.register("methods", "l2c")
class L2C(Router):
    """Trained parameters: ``routers.STEP`` (J,) logits for the steps 1, 3, ... in order of execution."""

    def __init__(self, config: Config | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        if self.config.num_inference_steps % 2:
            raise DitkitError(
                f"num_inference_steps is {self.config.num_inference_steps} with l2c", allowed="even numbers: steps come in pairs"
            )

    def routed(self, step: int) -> bool:
        return (self.config.num_inference_steps - 1 - step) % 2 == 0
