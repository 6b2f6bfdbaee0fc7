"""Costs: the sheet's formula for every published size, caches over a run, meta and CPU agree, nothing is counted as nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ditkit.backbones.dit import DiT
from ditkit.core import registry
from ditkit.core.errors import DitkitError
from ditkit.core.view import compile_view, with_methods
from ditkit.eval.counters import count, count_forward, count_run, parameters, published, weight_bytes
from ditkit.methods import FORA, Int8
from ditkit.nn.int8 import has_onednn

SIZES = {f"DiT-{n}/{p}": (n, p) for n in ("S", "B", "L", "XL") for p in (2, 4, 8)}
WIDTHS = {"S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}
#: the paper's "Gflops", which are multiply-adds (DiT, appendix)
GIGA = {"DiT-S/8": 0.36, "DiT-S/4": 1.41, "DiT-S/2": 6.06, "DiT-B/8": 1.42, "DiT-B/4": 5.56, "DiT-B/2": 23.01}
GIGA |= {"DiT-L/8": 5.01, "DiT-L/4": 19.70, "DiT-L/2": 80.71, "DiT-XL/8": 7.39, "DiT-XL/4": 29.05, "DiT-XL/2": 118.64}


def formula(name: str, side: int = 32) -> int:
    """The sheet's: T p^2 C D + 256 D + D^2 + L (12 T D^2 + 2 T^2 D + 6 D^2) + 2 D^2 + T D p^2 C_out."""
    size, p = SIZES[name]
    depth, d = WIDTHS[size]
    t = (side // p) ** 2
    return t * p * p * 4 * d + 256 * d + d * d + depth * (12 * t * d * d + 2 * t * t * d + 6 * d * d) + 2 * d * d + t * d * p * p * 8


@pytest.mark.parametrize("name", SIZES)
def test_macs_of_published_sizes(name: str) -> None:
    cost = count_forward(published("dit", name))
    assert cost.macs == pytest.approx(formula(name), rel=1e-3)
    assert cost.macs / 1e9 == pytest.approx(GIGA[name], rel=1e-3, abs=0.006)  # printed with two decimals
    assert cost.flops == 2 * cost.macs
    assert cost.macs == cost.linear_macs + cost.attention_macs
    assert cost.uncounted == ()


@pytest.mark.parametrize(
    ("conditioning", "giga"), [("in_context", 119.37), ("cross_attention", 137.62), ("adaln", 118.56), ("adaln_zero", 118.64)]
)
def test_macs_by_conditioning(conditioning: str, giga: float) -> None:
    """The paper's table for DiT-XL/2; all its figures are 0.01 to 0.02 above what the network multiplies."""
    cost = count_forward(published("dit", "DiT-XL/2", conditioning=conditioning))
    assert 0 < giga - cost.macs / 1e9 < 0.02
    d, tokens, depth = 1152, 258 if conditioning == "in_context" else 256, 28
    cross = 2 * tokens * d * d + 2 * 2 * d * d + 2 * 2 * tokens * d if conditioning == "cross_attention" else 0
    modulation = {"adaln": 4, "adaln_zero": 6}.get(conditioning, 0) * d * d
    ends = 256 * 16 * d + 256 * d + d * d + 256 * d * 32 + (2 * d * d if modulation else 0)
    assert cost.macs == ends + depth * (12 * tokens * d * d + 2 * tokens * tokens * d + cross + modulation)


def test_all_published_sizes_are_covered() -> None:
    assert set(registry.get("backbones", "dit").sizes) == set(SIZES)  # type: ignore[attr-defined]


def test_a_larger_input_and_a_larger_batch() -> None:
    model = published("dit", "DiT-XL/2", input_size=(64, 64))
    assert count_forward(model).macs / 1e9 == pytest.approx(524.6, rel=1e-3)  # the paper's 512-pixel model
    small = published("dit", "DiT-S/8")
    assert count_forward(small, batch=6).macs == 6 * count_forward(small).macs


def test_attention_is_apart() -> None:
    cost = count_forward(published("dit", "DiT-S/2"))
    assert cost.attention_macs == 12 * 2 * 256 * 256 * 384
    assert cost.attentions == {(1, 6, 256, 256, 64): 12}
    assert sum(m * k * n * calls for (m, k, n), calls in cost.linears.items()) == cost.linear_macs


@pytest.mark.parametrize("name", sorted(registry.entries("backbones")))
def test_any_backbone_counts_the_same_on_cpu_and_meta(name: str) -> None:
    model = registry.get("backbones", name).tiny()  # type: ignore[attr-defined]
    cpu = count_forward(model, batch=3)
    meta = count_forward(model.to("meta"), batch=3)
    assert (cpu.linear_macs, cpu.attention_macs, cpu.weight_bytes) == (meta.linear_macs, meta.attention_macs, meta.weight_bytes)
    assert cpu.attention_macs > 0


def test_agrees_with_torchs_counter_on_plain_layers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    x = torch.randn(2, 3, 6, 6)
    with FlopCounterMode(display=False) as theirs:
        net(x)
    cost = count(lambda: net(x), net)
    assert cost.flops == theirs.get_total_flops()
    assert cost.linears == {(2 * 36, 27, 8): 1, (2, 288, 5): 1}


def test_attention_on_cpu_is_not_lost() -> None:
    """torch's own counter has no formula for the CPU kernel. Cross-attention with other lengths, and grouped shapes by hand."""
    q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 7, 8)
    cost = count(lambda: F.scaled_dot_product_attention(q, k, k))
    assert cost.macs == cost.attention_macs == 2 * 3 * 10 * 7 * 8 * 2


def test_an_operator_without_formula_is_named() -> None:
    @torch.library.custom_op("ditkit_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    cost = count(lambda: twice(torch.ones(3)))
    assert cost.uncounted == ("ditkit_test::twice",)


def test_integer_products_are_counted_apart() -> None:
    a, b = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)
    cost = count(lambda: torch._int_mm(a, b))
    assert cost.macs == cost.integer_macs == 32 * 16 * 8
    assert (cost.integers, cost.linears) == ({(32, 16, 8): 1}, {})


def test_int8_does_the_same_work_in_fewer_bytes() -> None:
    base = DiT.tiny()
    view = with_methods(base, Int8(kernel="onednn" if has_onednn() else "int_mm"))
    a, b = count_forward(base, 2), count_forward(view, 2)
    assert (a.macs, a.uncounted) == (b.macs, b.uncounted)
    assert b.integer_macs == 2 * 4 * 12 * 24 * 32 * 32  # all projections of four blocks but the modulation
    assert parameters(view) == parameters(base)
    assert weight_bytes(view) < weight_bytes(base)


def test_bytes() -> None:
    net = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 30))
    unused = nn.Linear(5, 5)
    model = nn.ModuleList([net, unused])
    x = torch.randn(4, 10)
    cost = count(lambda: net(x), model)
    assert cost.weight_bytes == 4 * (10 * 20 + 20 + 20 * 30 + 30)
    assert weight_bytes(model) == cost.weight_bytes + 4 * 30
    assert cost.activation_bytes == 4 * 4 * (20 + 30)  # both outputs live while the second is made


def test_shared_weights_are_counted_once() -> None:
    layer = nn.Linear(6, 6)
    assert parameters(nn.ModuleList([layer, layer])) == 42
    assert weight_bytes(nn.ModuleList([layer, layer])) == 168


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fora_over_a_run(guided: bool, device: str) -> None:
    """Interval 3 of 10 steps computes at s = 9, 9, 6, 3, 0 counted down: steps 0, 3, 6, 9. The others keep only modulation and ends."""
    base = DiT.tiny().to(device)
    full = count_forward(base).macs
    d, depth, tokens = 32, 4, 24
    branches = depth * (12 * tokens * d * d + 2 * tokens**2 * d)
    run = count_run(with_methods(base, FORA(interval=3)), 10, guided=guided)
    cheap = [i for i, c in enumerate(run.steps) if c.macs < run.steps[0].macs]
    passes = 2 if guided else 1
    assert cheap == [1, 2, 4, 5, 7, 8]
    assert run.steps[0].macs == passes * full
    assert run.steps[1].macs == passes * (full - branches)
    assert run.macs == sum(c.macs for c in run.steps)
    assert run.flops == 2 * run.macs
    assert run.total.macs == run.macs
    assert run.total.linears[tokens, d, 4 * d] == passes * depth * 4  # four steps compute the MLP
    assert run.steps[1].weight_bytes < run.steps[0].weight_bytes


def test_a_compiled_view_counts_like_the_eager_one() -> None:
    model = DiT.tiny()
    assert count_forward(compile_view(model, backend="eager")).macs == count_forward(model).macs


def test_mistakes_are_named() -> None:
    with pytest.raises(DitkitError, match="DiT-XL/2"):
        published("dit", "DiT-XL/3")
    with pytest.raises(DitkitError, match="batch is 0"):
        count_forward(DiT.tiny(), batch=0)
