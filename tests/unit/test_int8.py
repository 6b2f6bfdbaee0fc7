"""int8: exact products, one rounding, rows that depend on nothing but themselves, and a base that is left alone."""

from __future__ import annotations

import gc
import json
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ditkit.backbones.dit import DiT
from ditkit.core.backbone import block_kind
from ditkit.core.errors import ConfigError, Conflict
from ditkit.core.run import Run
from ditkit.core.view import compile_view, with_methods
from ditkit.methods.efficiency import int8 as method
from ditkit.methods.efficiency.int8 import Int8
from ditkit.nn import int8, probe
from ditkit.nn.int8 import KERNELS, Int8Linear, quantise_tokens, quantise_weight

CPU = torch.device("cpu")
RIGHT = [name for name, k in KERNELS.items() if probe.rightness(k, CPU)]
kernels = pytest.mark.parametrize("kernel", RIGHT)


def layer(fan_in: int, fan_out: int, kernel: str, bias: bool = True, seed: int = 0) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(seed)
    linear = nn.Linear(fan_in, fan_out, bias)
    return linear, Int8Linear(linear, kernel, saturates(kernel))


def saturates(kernel: str) -> bool:
    return probe.rightness(KERNELS[kernel], CPU) == "saturates"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_some_kernel_is_right_on_every_cpu() -> None:
    assert RIGHT


@kernels
@torch.no_grad()
def test_extreme_values_do_not_saturate(kernel: str) -> None:
    """All activations at the top, all weights at +-127: two neighbouring products of 8 and 8 bits would leave 16 bits."""
    linear, quantised = layer(512, 8, kernel, bias=False)
    linear.weight.copy_(torch.where(torch.arange(8)[:, None] < 4, 1.0, -1.0).expand(8, 512))
    quantised = Int8Linear(linear, kernel, saturates(kernel))
    x = torch.ones(3, 512)
    x[:, 0] = 0  # so that the ones stand at the top of the range
    torch.testing.assert_close(quantised(x), F.linear(x, quantised.dequantised()), rtol=1e-5, atol=1e-5)
    assert relative(quantised(x), linear(x)) < 1e-2


@kernels
@torch.no_grad()
def test_a_row_is_bit_equal_whatever_the_others_are(kernel: str) -> None:
    _, quantised = layer(96, 40, kernel)
    x = torch.randn(2, 7, 96)
    y = quantised(x)
    others = x.clone()
    others[0, 1:] *= 1000
    others[1] = 0
    assert torch.equal(quantised(others)[0, 0], y[0, 0])
    assert torch.equal(quantised(x[:1, :1])[0, 0], y[0, 0])


@kernels
@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (33, 17), (383, 129)])
@torch.no_grad()
def test_error_is_within_half_a_step_of_each_rounding(kernel: str, sizes: tuple[int, int]) -> None:
    """|y - W x - b| <= step / 2 sum |W| + scale / 2 sum |x~|, element by element; odd sizes included."""
    linear, quantised = layer(*sizes, kernel)
    x = torch.randn(2, 5, sizes[0]) * torch.logspace(-3, 3, 5)[:, None]
    _, low, step = quantise_tokens(x, quantised.levels)
    rounded = x.abs() + step / 2
    bound = step / 2 * linear.weight.abs().sum(-1) + quantised.scale / 2 * rounded.sum(-1, keepdim=True)
    assert bool(((quantised(x) - linear(x)).abs() <= bound * 1.001 + 1e-5 * linear(x).abs() + 1e-6).all())


@kernels
@torch.no_grad()
def test_equals_the_formula(kernel: str) -> None:
    """x~ (scale w)' + b in float64, with x~ and w each rounded once."""
    linear, quantised = layer(64, 48, kernel)
    x = F.gelu(torch.randn(3, 10, 64) * 3)
    q, low, step = quantise_tokens(x, quantised.levels)
    w, scale = quantise_weight(linear.weight, saturates(kernel))
    rounded = low.double() + step.double() * q.double()
    assert float((rounded - x).abs().max()) <= float(step.max()) * 0.501
    expected = F.linear(rounded, w.double() * scale.double()[:, None], linear.bias.double())
    assert relative(quantised(x), expected) < 1e-6


@torch.no_grad()
def test_a_constant_row_is_exact() -> None:
    linear, quantised = layer(32, 8, RIGHT[0])
    for value in (0.0, 5.0, -1e4):
        x = torch.full((1, 32), value)
        expected = F.linear(x, quantised.dequantised(), linear.bias)
        torch.testing.assert_close(quantised(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saturating", [False, True])
def test_weights_are_rounded_once(saturating: bool) -> None:
    """A24: each is within half a step of the original; a row of zeros stays one; neighbours stay within 16 bits."""
    for seed in range(20):
        weight = torch.randn(64, 63, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 10)
        weight[3] = 0
        w, scale = quantise_weight(weight, saturating)
        error = (w.double() * scale.double()[:, None] - weight).abs()
        assert bool((error <= scale[:, None] * 0.50001).all())
        assert not w[3].any()
        assert int(w.abs().max()) <= 127
        assert int(int8.neighbours(w.short()).max()) <= (128 if saturating else 254)


def test_bias_is_kept_and_gradients_pass_through() -> None:
    linear, quantised = layer(16, 8, RIGHT[0])
    assert quantised.bias is linear.bias
    x = torch.randn(4, 16, requires_grad=True)
    quantised(x).sum().backward()
    torch.testing.assert_close(x.grad, quantised.dequantised().sum(0).expand(4, -1))


def quantised_view(**values: object) -> tuple[DiT, DiT]:
    base = DiT.tiny()
    return base, with_methods(base, Int8(**{"kernel": RIGHT[0], **values}))  # type: ignore[return-value,arg-type]


@torch.no_grad()
def test_view_leaves_the_base_alone_and_lets_it_go() -> None:
    base, view = quantised_view()
    x, t, cond = base.example()
    before = DiT.tiny()(x, t, **cond)
    out = view(x, t, **cond)
    assert torch.equal(base(x, t, **cond), before)
    assert 0 < relative(out, before) < 0.05
    weight, kept = weakref.ref(base.blocks[0].parts["img"].qkv.weight), weakref.ref(base.final.proj.weight)  # type: ignore[index]
    del base, view.__dict__["_root"]
    gc.collect()
    assert weight() is None
    assert kept() is not None
    assert torch.equal(view(x, t, **cond), out)


def test_second_quantise_is_refused() -> None:
    _, view = quantised_view()
    with pytest.raises(Conflict, match="attached twice|decide weights"):
        with_methods(view, Int8())


def test_what_matches_nothing_or_is_no_pattern_is_refused() -> None:
    with pytest.raises(Conflict, match="matches no projection"):
        quantised_view(include="nothing")
    with pytest.raises(ConfigError, match="no regular expression"):
        Int8(include="(")


def test_include_and_exclude() -> None:
    _, view = quantised_view(include=r"^blocks.*\.(qkv|fc1)$")
    names = {n.rpartition(".")[2] for n, m in view.named_modules() if isinstance(m, Int8Linear)}
    assert names == {"qkv", "fc1"}
    _, view = quantised_view()
    assert not any(n.endswith("ada") for n, m in view.named_modules() if isinstance(m, Int8Linear))
    base, every = quantised_view(include="", exclude="")
    x, t, cond = base.example()
    assert len([m for m in every.modules() if isinstance(m, Int8Linear)]) == 5 * 4 + 4  # all but the patches, the label's is a table
    with torch.no_grad():
        assert relative(every(x, t, **cond), base(x, t, **cond)) < 0.1
    report = Run(view).finish()["int8"]
    assert (report["kernel"], report["layers"]) == (RIGHT[0], 4 * 4)


@torch.no_grad()
def test_state_is_8_bits_and_loads_again() -> None:
    """Weights are saved in a quarter of the bytes; what was loaded computes the same, also over a packed weight."""
    base, view = quantised_view()
    x, t, cond = base.example()
    out = view(x, t, **cond)
    state = {k: v.clone() for k, v in view.state_dict().items()}
    whole, small = (sum(v.numel() * v.element_size() for k, v in s.items() if "qkv.weight" in k) for s in (base.state_dict(), state))
    assert small * 4 == whole
    other = with_methods(_zero(DiT.tiny()), Int8(kernel=RIGHT[0]))
    other(x, t, **cond)  # packs
    other.load_state_dict(state)
    assert torch.equal(other(x, t, **cond), out)


def _zero(model: DiT) -> DiT:
    for p in model.parameters():
        p.data.mul_(0.5)
    return model


@torch.no_grad()
@pytest.mark.skipif(not int8.has_onednn(), reason="this torch has no oneDNN")
def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    plain = torch.ops.onednn.qlinear_prepack

    def counted(*args: object) -> torch.Tensor:
        nonlocal count
        count += 1
        return plain(*args)

    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", counted)
    base, view = quantised_view(kernel="onednn")
    x, t, cond = base.example()
    compiled = compile_view(view, "block", backend="aot_eager")
    for model in (view, compiled, view, compiled):
        model(x, t, **cond)
    assert count == 4 * 4


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own imports
@torch.no_grad()
def test_compiled_is_one_graph_with_independent_rows() -> None:
    _, quantised = layer(24, 20, RIGHT[0])
    compiled = torch.compile(lambda x: quantised(F.gelu(x)), fullgraph=True, dynamic=False)
    x = torch.randn(2, 5, 24)
    out = compiled(x)
    assert relative(out, quantised(F.gelu(x))) < 2e-3  # a last bit may turn a rounding
    other = x.clone()
    other[:, 1:] *= 100
    assert torch.equal(compiled(other)[:, 0], out[:, 0])


def test_blocks_share_a_graph() -> None:
    _, view = quantised_view()
    assert len({block_kind(b) for b in view.blocks}) == 1
    assert block_kind(view.blocks[0]) != block_kind(DiT.tiny().blocks[0])


def choice_file(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITKIT_CACHE", str(tmp_path))
    probe.int8_kernel.cache_clear()


def test_probe_is_remembered_and_a_damaged_memory_is_ignored(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    choice_file(tmp_path, monkeypatch)
    tried = []
    answer = probe.Choice("onednn", True, 2.0, {"onednn": 2.0, "int_mm": 0.02})
    monkeypatch.setattr(probe, "try_kernels", lambda device: tried.append(device) or answer)
    for damage in (None, "", "[]", "{}", '{"key": 3}'):
        probe.int8_kernel.cache_clear()
        path = probe.cache_dir("probe") / "int8-cpu.json"
        if damage is not None:
            path.write_text(damage)
        assert probe.int8_kernel("cpu") == answer
        probe.int8_kernel.cache_clear()
        assert probe.int8_kernel("cpu") == answer
    assert len(tried) == 5
    other = json.loads(path.read_text())
    other["key"]["processor"] = "another"
    path.write_text(json.dumps(other))
    probe.int8_kernel.cache_clear()
    probe.int8_kernel("cpu")
    assert len(tried) == 6
    probe.int8_kernel.cache_clear()


def test_probe_takes_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong or 60 times slower is not taken, whatever else it is."""

    def seconds(names: list[str], *_: object) -> dict[str, object]:
        return dict.fromkeys(["plain", *names])  # type: ignore[return-value]

    monkeypatch.setattr(probe, "_calls", seconds)
    times = {"plain": 1.0, "onednn": 0.5, "int_mm": 60.0}
    monkeypatch.setattr(probe, "_best", lambda calls, *_: {n: times[n] for n in calls})
    monkeypatch.setattr(probe, "rightness", lambda kernel, device: "saturates")
    assert probe.try_kernels(CPU) == probe.Choice("onednn", True, 2.0, {"onednn": 2.0, "int_mm": 1 / 60})
    times["int_mm"] = 0.25
    assert probe.try_kernels(CPU).kernel == "int_mm"
    monkeypatch.setattr(probe, "rightness", lambda kernel, device: "" if kernel.name == "int_mm" else "exact")
    assert probe.try_kernels(CPU) == probe.Choice("onednn", False, 2.0, {"onednn": 2.0})
    times["onednn"] = 0.9
    choice = probe.try_kernels(CPU)
    assert (choice.kernel, choice.pays) == ("dequantise", False)


def test_slower_than_fp32_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "int8_kernel", lambda device: probe.Choice("dequantise", False, 0.5, {"int_mm": 0.5}))
    with pytest.warns(UserWarning, match="int8 makes nothing faster on this machine.*int_mm 0.5x"):
        view = with_methods(DiT.tiny(), Int8())
    x, t, cond = view.example()  # type: ignore[operator]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < relative(view(x, t, **cond), DiT.tiny()(x, t, **cond)) < 0.02


def test_a_kernel_that_does_not_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "rightness", lambda kernel, device: "")
    with pytest.raises(Conflict, match="int_mm"):
        with_methods(DiT.tiny(), Int8(kernel="int_mm"))


def saturating(limit: int) -> int8.Kernel:
    """A kernel that adds two neighbouring products within +-limit."""

    def product(q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        pairs = F.pad(q.int()[..., None, :] * weight.int(), (0, weight.shape[1] % 2)).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-limit, limit).sum(-1).float() * scale

    return int8.Kernel(f"stub{limit}", product, torch.uint8, 0, ("cpu",))


def test_saturation_is_found_by_the_probe() -> None:
    assert probe.rightness(saturating(2**17), CPU) == "exact"
    assert probe.rightness(saturating(2**15 - 1), CPU) == "saturates"
    assert probe.rightness(saturating(2**12), CPU) == ""


@torch.no_grad()
def test_weights_from_a_cpu_with_vnni_do_not_saturate_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours that add up to more than 128 leave the activations 7 bits; those made here leave them 8."""
    monkeypatch.setitem(KERNELS, "stub", saturating(2**15 - 1))
    torch.manual_seed(0)
    linear = nn.Linear(33, 5)
    linear.weight.copy_(torch.where(torch.rand(5, 33) < 0.1, -1.0, 1.0))
    here, elsewhere = Int8Linear(linear, "stub", saturates=True), Int8Linear(linear, "stub", saturates=False)
    x = torch.rand(4, 33) < 0.9
    expected = linear(x.float())
    assert here.levels == 255
    torch.testing.assert_close(here(x.float()), expected, rtol=1e-2, atol=0.2)
    here.load_state_dict(elsewhere.state_dict())
    assert here.levels == 127
    torch.testing.assert_close(here(x.float()), expected, rtol=1e-5, atol=1e-4)
