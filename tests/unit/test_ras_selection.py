"""RAS: when it acts, how many tokens it leaves out, and which."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditkit.backbones.dit import DiT
from ditkit.core.errors import ConfigError
from ditkit.methods.efficiency.ras import RAS, RASConfig, patches
from ditkit.testing.trajectory import relative

# ---- schedule ----


def test_the_examples_of_the_paper() -> None:
    sd3 = RASConfig(high_ratio=0.3)
    assert sd3.sparse_steps(28) == frozenset(range(4, 28)) - {12, 20}
    counts = [sum(sd3.left_out(s, 28, 4096)) if s in sd3.sparse_steps(28) else 0 for s in range(28)]
    assert 1 - sum(counts) / (28 * 4096) == pytest.approx(0.607, abs=1e-3)
    lumina = RASConfig(resets=(12, 22), ramp=256)
    counts = [sum(lumina.left_out(s, 30, 4096)) if s in lumina.sparse_steps(30) else 0 for s in range(30)]
    assert counts[4:8] == [1280] * 4
    assert counts[12] == counts[22] == 0
    assert counts[28:] == [2816] * 2
    assert 1 - sum(counts) / (30 * 4096) == pytest.approx(0.61, abs=5e-3)


def test_released_counts_are_cut_twice_and_intended_are_not() -> None:
    values = dict(sample_ratio=0.5, high_ratio=0.3)
    assert RASConfig(**values, selection="released").left_out(4, 9, 64) == (22, 9)
    assert RASConfig(**values).left_out(4, 9, 64) == (22, 10)


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("high", [0.0, 0.5, 1.0])
def test_some_token_always_goes_through(ratio: float, high: float) -> None:
    for selection in ("intended", "released"):
        config = RASConfig(sample_ratio=ratio, high_ratio=high, selection=selection)  # type: ignore[arg-type]
        assert 0 <= sum(config.left_out(4, 9, 24)) < 24


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(ConfigError, match="end 4 is not after start 4"):
        RAS(end=4)
    with pytest.raises(ConfigError, match="start"):
        RAS(start=0)
    with pytest.raises(ConfigError, match="resets"):
        RAS(resets=(3, -1))


# ---- selection ----


def rotate(method: RAS, m: Tensor, count: int, rounds: int) -> list[Tensor]:
    """Which tokens go through, round by round, m (rounds | 1, M)."""
    drops, went = torch.zeros(1, m.shape[1]), []
    high = round(count * method.config.high_ratio)
    for i in range(rounds):
        out = method.choose(m[i % len(m)][None], drops, count - high, high)
        assert int(out.sum()) == count
        drops += out
        went.append(~out[0])
    return went


@pytest.mark.parametrize(("ratio", "scale", "least", "most"), [(0.5, 0.1, 5, 16), (0.25, 0.1, 0, 11), (0.5, 0.3, 8, 12), (0.25, 0.3, 3, 7)])
def test_intended_starvation_on_a_constant_metric(ratio: float, scale: float, least: int, most: int) -> None:
    """The sheet's simulation: 64 tokens, 20 sparse steps; who has the smaller metric goes through more often."""
    m = torch.linspace(0.5, 1.5, 64)[None]
    counts = torch.stack(rotate(RAS(starvation_scale=scale), m, int(64 * (1 - ratio)), 20)).sum(0)
    assert (int(counts.min()), int(counts.max())) == (least, most)
    ranks = torch.stack([m[0], counts.float()])
    assert torch.corrcoef(ranks)[0, 1] < -0.9


def test_released_starvation_never_lets_half_of_them_in() -> None:
    m = torch.linspace(0.5, 1.5, 64)[None]
    counts = torch.stack(rotate(RAS(selection="released"), m, 32, 20)).sum(0)
    assert int((counts == 0).sum()) == 32


@pytest.mark.parametrize("high", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("count", [12, 18, 23])
@pytest.mark.parametrize("changing", [False, True])
def test_infinite_starvation_takes_turns(high: float, count: int, changing: bool) -> None:
    m = torch.rand(60 if changing else 1, 24, generator=torch.Generator().manual_seed(1)) + 0.1
    went = torch.stack(rotate(RAS(starvation_scale=1e6, high_ratio=high), m, count, 60)).int()
    spread = went.cumsum(0)
    assert int((spread.amax(1) - spread.amin(1)).max()) <= 1
    turn = -(-24 // (24 - count))
    assert int(spread[turn - 1].min()) >= 1
    gaps = [torch.diff(went[:, n].nonzero()[:, 0]).max() for n in range(24)]
    assert max(map(int, gaps)) <= turn * (1 + changing)


def test_without_starvation_it_is_the_metric_alone() -> None:
    m = torch.rand(1, 24, generator=torch.Generator().manual_seed(2))
    went = rotate(RAS(starvation_scale=0.0), m, 10, 3)
    order = m[0].argsort()
    assert all(set(w.nonzero()[:, 0].tolist()) == set(order[:14].tolist()) for w in went)
    both = rotate(RAS(starvation_scale=0.0, high_ratio=0.5), m, 10, 1)[0]
    assert set(both.nonzero()[:, 0].tolist()) == set(order[5:19].tolist())


def test_metrics_by_hand() -> None:
    """A token's metric is the mean over its pixels of what channels say there; channels beyond the data's say nothing."""
    model, g = DiT.tiny(), torch.Generator().manual_seed(3)
    v = torch.randn(2, 6, 8, 12, generator=g)
    where = patches(model, v, 24, 24)
    for metric, by_pixel in (("std", v[:, :3].std(1)), ("l2norm", v[:, :3].square().sum(1).sqrt())):
        method = RAS(metric=metric)
        method.install(model)
        wanted = by_pixel.unflatten(2, (6, 2)).unflatten(1, (4, 2)).mean((2, 4)).flatten(1)
        assert relative(method.score(v, where, 1), wanted) < 1e-6
    method = RAS(metric="random")
    assert torch.equal(method.score(v, where, 1), method.score(-v, where, 1))
    assert not torch.equal(method.score(v, where, 1), method.score(v, where, 2))
