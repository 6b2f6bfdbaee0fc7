"""A feature cache whose key decision depends on values, over blocks that write in place (case A22)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.backbones.dit import DiT
from ditkit.core.errors import DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.view import with_methods
from ditkit.nn.adaln import AdaLNBlock


class FirstBlockCache(Method):
    """Where the first block's residual moved by less than the threshold, the rest of the trunk is last time's residual."""

    name, owns = "first_block_cache", frozenset({"reuse"})

    def __init__(self, threshold: float, warmup: int) -> None:
        super().__init__()
        self.threshold, self.warmup = threshold, warmup

    def start(self, run: Run) -> None:
        run.memory[self.label].update(hits=0, hit=False, first=None, rest=None)

    def block(self, nxt: Any, s: Any, at: At) -> Any:
        memory, x = at.run.memory[self.label], s["img"].x
        if at.block == 0:
            y = nxt(s)
            residual = y["img"].x - x
            memory["hit"] = self.near(residual, memory["first"]) and at.step >= self.warmup
            memory["hits"] += memory["hit"]
            memory["first"], memory["start"] = residual, y["img"].x
            return y
        if memory["hit"]:
            last = at.block == len(at.run.model.blocks) - 1
            return {**s, "img": s["img"]._replace(x=memory["start"] + memory["rest"])} if last else s
        y = nxt(s)
        memory["rest"] = y["img"].x - memory["start"]
        return y

    def near(self, now: Tensor, before: Tensor | None) -> bool:
        if before is None:
            return False
        distance = float((now - before).abs().mean() / before.abs().mean())
        if not distance > 0:
            raise DitkitError(f"the first block's distance is {distance}", allowed="above 0", hint="a block must not write into its input")
        return distance < self.threshold

    def finish(self, run: Run) -> dict[str, Any]:
        return {"hits": run.memory[self.label]["hits"]}


class InPlace(AdaLNBlock):
    """Writes into the tokens it was given."""

    def forward(self, s: Any, seam: Any, kv: Any = None) -> Any:
        x = s["img"].x
        y = super().forward(s, seam, kv)["img"].x
        return {**s, "img": s["img"]._replace(x=x.add_(y - x))}


def run_ten(threshold: float) -> dict[str, dict[str, Any]]:
    base = DiT.tiny()
    for block in base.blocks:
        block.__class__ = InPlace
    view = with_methods(base, FirstBlockCache(threshold, warmup=2))
    x, t, cond = view.example()
    run = Run(view, 10)
    with torch.no_grad():
        for step in run.steps():
            run.close(view(x * (1 - 0.05 * step), t * (1 - step / 10), run=run, **cond))
    return run.finish()


def test_in_place_blocks_do_not_blind_the_cache() -> None:
    assert run_ten(1e9) == {"first_block_cache": {"hits": 8}}


def test_a_cache_without_hits_warns() -> None:
    with pytest.warns(UserWarning, match="reused nothing in 10 steps"):
        assert run_ten(1e-9) == {"first_block_cache": {"hits": 0}}


def test_a_distance_of_zero_or_nan_raises() -> None:
    cache = FirstBlockCache(1.0, 0)
    same = torch.ones(1, 2, 3)
    for before in (same, torch.zeros(1, 2, 3)):
        with pytest.raises(DitkitError, match="distance is"):
            cache.near(before, before)


def test_with_hits_there_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_ten(1e9)
