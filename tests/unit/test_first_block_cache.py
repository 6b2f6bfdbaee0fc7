"""A feature cache whose key decision depends on values, over blocks that write in place (case A22)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from ditkit.backbones.dit import DiT
from ditkit.core.errors import DitkitError
from ditkit.core.run import Run
from ditkit.core.seams import Seam
from ditkit.core.view import keep_blocks, with_methods
from ditkit.methods.efficiency.first_block_cache import FirstBlockCache
from ditkit.nn.adaln import AdaLNBlock
from ditkit.testing.trajectory import sample


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
    view = with_methods(base, FirstBlockCache(threshold=threshold, warmup=2))
    x, t, cond = view.example()
    run = Run(view, 10)
    with torch.no_grad():
        for step in run.steps():
            run.close(view(x * (1 - 0.05 * step), t * (1 - step / 10), run=run, **cond))
    return run.finish()


def test_in_place_blocks_do_not_blind_the_cache() -> None:
    assert run_ten(1e9) == {"first_block_cache": {"hits": 8, "forwards": 10}}


def test_a_cache_without_hits_warns() -> None:
    with pytest.warns(UserWarning, match="reused nothing in 10 steps"):
        assert run_ten(1e-9) == {"first_block_cache": {"hits": 0, "forwards": 10}}


def test_a_distance_of_zero_or_nan_raises() -> None:
    cache = FirstBlockCache(threshold=1.0)
    same = torch.ones(1, 2, 3)
    for before in (same, torch.zeros(1, 2, 3)):
        with pytest.raises(DitkitError, match="distance is"):
            cache.near(before, before)


def test_with_hits_there_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_ten(1e9)


def figures(view: Any, scale: float, **settings: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The end of a trajectory, and the methods' report."""
    made: list[Run] = []
    start = FirstBlockCache.start

    class Kept(FirstBlockCache):
        def start(self, run: Run) -> None:
            made.append(run)
            start(self, run)

    x = sample(with_methods(view, Kept(**settings)), scale=scale)
    return x, made[-1].finish()["first_block_cache"]


def test_each_guidance_pass_decides_for_itself() -> None:
    """Of 6 steps, 2 warm up: 4 reuse in each of two passes. With at most one in a row, every second one."""
    base = DiT.tiny()
    assert figures(base, 2.0, threshold=1e9, warmup=2)[1] == {"hits": 8, "forwards": 12}
    assert figures(base, 1.0, threshold=1e9, max_reused=1)[1] == {"hits": 3, "forwards": 6}


def test_a_reused_step_adds_the_rest_last_computed() -> None:
    """By hand: at step 1 the tokens after the first block, plus what the other blocks added at step 0."""
    base = DiT.tiny()
    view = with_methods(base, FirstBlockCache(threshold=1e9))
    x, t, cond = view.example()
    run, prepared = Run(view, 2), base.prepare(**cond)
    with torch.no_grad():
        inputs = [(x, t), (0.9 * x, 0.8 * t)]
        got = [view(*inputs[i], prepared, run=run) for i in run.steps()][1]
        tokens = []
        for x, t in inputs:
            s = base.embed(x, t, prepared)
            seen = [s := block(s, Seam()) for block in base.blocks]
            tokens.append([u["img"].x for u in seen])
        last = tokens[1][0] + tokens[0][-1] - tokens[0][0]
        want = base.unembed(base.head({**s, "img": s["img"]._replace(x=last)}), x)
    assert torch.allclose(got, want, atol=1e-6)


def test_a_threshold_between_the_distances_reuses_where_it_is_small() -> None:
    """Whatever the threshold, what is reused grows with it, and the drift from the base begins at 0."""
    base = DiT.tiny()
    plain = sample(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [figures(base, 1.0, threshold=value) for value in (0.0, 0.02, 0.05, 0.1, 1.0)]
    hits = [report["hits"] for _, report in found]
    assert hits == sorted(hits)
    assert hits[0] == 0
    assert hits[-1] == 5
    assert torch.equal(found[0][0], plain)
    assert not torch.equal(found[-1][0], plain)


def test_one_block_is_refused() -> None:
    with pytest.raises(DitkitError, match="one block"):
        with_methods(keep_blocks(DiT.tiny(), [0]), FirstBlockCache())
