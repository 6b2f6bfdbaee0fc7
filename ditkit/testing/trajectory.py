"""A bare trajectory through a backbone, without process or pipeline: what the contract tests compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ditkit.core.backbone import Backbone
from ditkit.core.run import Run
from ditkit.core.view import compile_view

STEPS = 6


def steps(
    model: Backbone, seed: int = 0, batch: int = 2, num_steps: int = STEPS, scale: float = 1.0, batched: bool = False
) -> Iterator[Tensor]:
    """Euler steps of a made-up flow: x after each. ``scale`` != 1 guides towards the conditioning of the flipped batch."""
    x, t, cond = model.example(batch, seed)
    channels, run = x.shape[1], Run(model, num_steps, inputs=inputs_of(model, x))
    other = {k: v.flip(0) for k, v in cond.items()}
    both = {k: torch.cat([cond[k], other[k]]) for k in cond}
    prepared = [model.prepare(**c) for c in ((both,) if batched else (cond, other))]
    run.times = torch.stack([t * (1 - i / num_steps) for i in range(num_steps)]).repeat(1, 2 if batched else 1)
    for i in run.steps():
        now = t * (1 - i / num_steps)
        if batched:
            c, u = model(torch.cat([x, x]), torch.cat([now, now]), prepared[0], run=run).chunk(2)
        else:
            c = model(x, now, prepared[0], run=run, guidance_pass="cond")
            u = c if scale == 1 else model(x, now, prepared[1], run=run, guidance_pass="null")
        v = c if scale == 1 else u + scale * (c - u)
        x = x - run.close(v)[:, :channels] * (0.3 / num_steps)
        yield x


def inputs_of(model: Backbone, x: Tensor) -> dict[str, Tensor]:
    """What the attached methods take from a run over x."""
    return {name: value for m in model.attached for name, value in m.example(x).items()}


@torch.no_grad()
def sample(model: Backbone, **options: Any) -> Tensor:
    """The end of the trajectory."""
    *_, last = steps(model, **options)
    return last


class Counted:
    """A view compiled with dynamo's capture only, which counts its graphs."""

    def __init__(self, model: Backbone, grain: str, num_steps: int = STEPS) -> None:
        self.graphs = 0
        self.model = compile_view(model, grain, num_steps=num_steps, backend=self._backend)

    def _backend(self, graph: Any, example: Any) -> Any:
        self.graphs += 1
        return graph.forward


def relative(a: Tensor, b: Tensor) -> float:
    """Relative L2 error of a against b."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
