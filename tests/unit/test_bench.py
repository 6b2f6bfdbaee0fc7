"""The benchmark: order, statistics, floors, what is compared before it is timed, and the honest rows beside accelerators."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.backbones.dit import DiT, DiTConfig, draw_parameters
from ditkit.bundle import BundleConfig, DataCard, Part, Sampling
from ditkit.cli import bench as bench_verb
from ditkit.cli import eval as eval_verb
from ditkit.core.errors import DitkitError
from ditkit.core.method import Method
from ditkit.eval import bench as bench_module
from ditkit.eval.bench import Candidate, interleave, peak_memory, run_bench
from ditkit.eval.counters import Cost, count_forward, published
from ditkit.eval.drift import drift
from ditkit.eval.pipelines import Setting, compare_pipelines, notes_of, variants
from ditkit.eval.roof import Roof, machine, measure_roof, other_work
from ditkit.eval.table import table, three
from ditkit.methods.specs import parse_spec
from ditkit.nn.int8 import has_onednn
from ditkit.nn.probe import Choice
from ditkit.pipeline import Pipeline


def pipeline(steps: int = 6) -> Pipeline:
    """A tiny model of digits with drawn weights."""
    torch.manual_seed(0)
    shape = dict(input_size=(8, 8), in_channels=1, out_channels=1, patch_size=2, dim=16, depth=2, num_heads=2, num_classes=10)
    config = DiTConfig(**shape)  # type: ignore[arg-type]
    card = BundleConfig(
        backbone=Part(name="dit", config=config.to_dict()),
        process=Part(name="flow"),
        data=DataCard(name="digits", shape=(1, 8, 8), labels=tuple("0123456789")),
        sampling=Sampling(solver="euler", num_inference_steps=steps, guidance={"scale": 2.0}),
    )
    return Pipeline(draw_parameters(DiT(config)).eval(), card)


# ---- drift


def test_drift_of_a_known_error() -> None:
    """An error of 0.02 everywhere on a range of 2 is 20 log10(2 / 0.02) = 40 dB."""
    x = torch.full((3, 1, 4, 4), 0.5)
    found = drift(x + 0.02, x)
    assert found.psnr == pytest.approx(40, abs=1e-4)
    assert found.relative_l2 == pytest.approx(0.04, abs=1e-6)
    assert found.max_abs == pytest.approx(0.02, abs=1e-6)


def test_drift_names_the_worst_sample_and_is_infinite_where_nothing_differs() -> None:
    x = torch.zeros(2, 8)
    y = x.clone()
    y[1] += 0.2
    found = drift(y, x)
    assert found.worst_psnr == pytest.approx(20, abs=1e-4)
    assert found.psnr == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)
    assert drift(x, x).psnr == math.inf
    assert drift(x, x).relative_l2 == 0


def test_drift_refuses_what_cannot_be_compared() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(DitkitError, match="shape"):
        drift(x[:1], x)
    with pytest.raises(DitkitError, match="sample 1"):
        drift(torch.tensor([[0.0], [math.nan]]), torch.zeros(2, 1))


# ---- the runner, on a clock of our own


class Clock:
    """Time that only passes when a call says so."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, ""

    def perf_counter(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float) -> Callable[[], Tensor]:
        """A call that takes these seconds, one after the other, the last for ever."""
        left = list(seconds)

        def run() -> Tensor:
            self.order += name
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return torch.ones(2, 3)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(bench_module.time, "perf_counter", found.perf_counter)
    return found


def test_calls_take_turns_and_no_place_is_favoured(clock: Clock) -> None:
    interleave({n: clock.call(n, 1.0) for n in "abc"}, repeats=3, warmups=1, progress=False)
    assert clock.order == "abc" + "bca" + "cab" + "abc"


def test_median_quartiles_best_and_cold(clock: Clock) -> None:
    timing = interleave({"a": clock.call("a", 100, 50, 1, 2, 3, 4, 5)}, repeats=5, warmups=2, progress=False)["a"]
    assert (timing.median, timing.q1, timing.q3, timing.best) == (3, 2, 4, 1)
    assert (timing.cold, timing.repeats) == (100, 5)


@pytest.fixture
def known_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "measure_roof", lambda cost, **_: roof())


@pytest.mark.usefixtures("known_roof")
def test_rows_are_per_item_and_relative_to_the_first(clock: Clock) -> None:
    cost = Cost(macs=4000, linear_macs=4000, attention_macs=0, weight_bytes=8, activation_bytes=8)
    slow = Candidate("slow", clock.call("s", 4.0), items=4, cost=cost)
    fast = Candidate("fast", clock.call("f", 1.0), items=4)
    result = run_bench([slow, fast], suite="t", repeats=2, warmups=0, progress=False)
    a, b = result.rows
    assert (a.seconds.median, b.seconds.median, b.speedup) == (1.0, 0.25, 4.0)
    assert (a.macs, a.flops) == (1000, 2000)
    assert a.floor_seconds == pytest.approx(2 * 1000 / 100)
    assert a.ratio_to_floor == pytest.approx(1.0 / 20)
    assert b.macs is None


def test_different_results_are_not_timed() -> None:
    """An exact variant that is wrong stops the benchmark; a lossy one is shown with its error."""
    right, wrong = torch.ones(2, 3), torch.ones(2, 3) * 1.1
    timed = []

    def call(x: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            timed.append(x)
            return x

        return run

    first = Candidate("first", call(right))
    with pytest.raises(DitkitError, match="other differs from first by 1.0e-01"):
        run_bench([first, Candidate("other", call(wrong), tolerance=1e-5)], suite="t", repeats=5, progress=False)
    assert len(timed) == 2
    lossy = run_bench([first, Candidate("other", call(wrong))], suite="t", repeats=1, warmups=0, progress=False).rows[1]
    assert lossy.drift is not None
    assert lossy.drift.relative_l2 == pytest.approx(0.1, abs=1e-6)


def test_what_was_compared_already_is_not_called_again(clock: Clock) -> None:
    known = drift(torch.ones(1, 2), torch.ones(1, 2))
    candidates = [Candidate(n, clock.call(n, 1.0), drift=known, cold=9.0) for n in "ab"]
    result = run_bench(candidates, suite="t", repeats=2, warmups=0, progress=False)
    assert clock.order.startswith("ab" + "ba")
    assert result.rows[0].seconds.cold == 9.0
    far = Candidate("b", clock.call("b", 1.0), drift=drift(torch.ones(1, 2) * 2, torch.ones(1, 2)), cold=1.0, tolerance=1e-3)
    with pytest.raises(DitkitError, match="b differs"):
        run_bench([candidates[0], far], suite="t")


def test_mistakes_are_named() -> None:
    c = Candidate("a", lambda: torch.ones(1, 1))
    for bad in ([], [c, c]):
        with pytest.raises(DitkitError, match="distinct"):
            run_bench(bad, suite="t")
    with pytest.raises(DitkitError, match="repeats is 0"):
        run_bench([c], suite="t", repeats=0)


def test_peak_memory_sees_what_a_call_allocates() -> None:
    small, large = peak_memory(lambda: None), peak_memory(lambda: torch.ones(64 * 2**18).sum())
    if small is None or large is None:
        pytest.skip("this system does not say it")
    assert 40 * 2**20 < large - small < 200 * 2**20  # 64 MiB


# ---- the roof


def roof(**changes: Any) -> Roof:
    values: dict[str, Any] = dict(gemm={"fp32": 100.0, "int8": 400.0}, attention=50.0, copy=10.0, gemm_by_shape={}, device="cpu")
    values["kernels"] = {"fp32": "linear", "int8": "_int_mm"}
    return Roof(**{**values, **changes})


def test_floor_adds_products_and_attention_or_is_the_bytes() -> None:
    """t = max(FLOP_linear / P + FLOP_attention / P_attention, bytes / B), integers at their own rate."""
    cost = Cost(macs=300, linear_macs=200, attention_macs=100, weight_bytes=1, activation_bytes=0, io_bytes=1)
    assert roof().floor(cost) == pytest.approx(400 / 100 + 200 / 50)
    heavy = Cost(macs=300, linear_macs=200, attention_macs=100, weight_bytes=900, activation_bytes=0, io_bytes=100)
    assert roof().floor(heavy) == pytest.approx(1000 / 10)
    mixed = Cost(macs=300, linear_macs=200, attention_macs=100, weight_bytes=0, activation_bytes=0, integers={(10, 5, 3): 1})
    assert roof().floor(mixed) == pytest.approx(100 / 100 + 300 / 400 + 200 / 50)


def test_each_shape_at_its_own_rate() -> None:
    cost = Cost(macs=0, linear_macs=0, attention_macs=0, weight_bytes=0, activation_bytes=0, linears={(2, 5, 5): 4, (1, 5, 5): 2})
    found = roof(gemm_by_shape={"fp32": {(1, 5, 5): 25.0}}).by_shape(cost)
    assert found == pytest.approx(2 * 50 * 4 / 100 + 2 * 25 * 2 / 25)


def test_measured_roof_of_a_real_model() -> None:
    cost = count_forward(published("dit", "DiT-S/8", depth=2))
    found = measure_roof(cost, rounds=1, max_shapes=2)
    assert set(found.gemm_by_shape["fp32"]) <= set(cost.linears)
    assert 1e8 < found.gemm["fp32"] < 1e14
    assert 1e7 < found.attention < 1e14
    assert 1e8 < found.copy < 1e13
    assert found.floor(cost) > 0
    better = found.best(roof(gemm={"fp32": 1e18}, attention_by_shape={}))
    assert better.gemm["fp32"] == 1e18
    assert better.attention == found.attention


def test_integers_have_a_roof_only_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no integer product is faster than fp32 (``_int_mm`` without VNNI is 60 times slower) none is measured or counted on."""
    cost = count_forward(published("dit", "DiT-S/8", depth=1))
    for kernel, pays in (("dequantise", False), ("onednn" if has_onednn() else "int_mm", True)):
        monkeypatch.setattr("ditkit.eval.roof.int8_kernel", lambda device, kernel=kernel: Choice(kernel, 127, 1.0, {}))
        assert ("int8" in measure_roof(cost, rounds=1, max_shapes=1).gemm) == pays
    slow = Cost(macs=100, linear_macs=100, attention_macs=0, weight_bytes=0, activation_bytes=0, integers={(10, 10, 1): 1})
    assert roof(gemm={"fp32": 100.0}).floor(slow) == roof(gemm={"fp32": 100.0}).by_shape(slow) == 2.0


def test_the_machine_is_described() -> None:
    m = machine()
    assert m.cpu
    assert m.torch == torch.__version__
    assert " " not in m.slug
    load = other_work()
    assert load is None or load >= 0


# ---- pipelines


class Noisy(Method):
    """Adds a fixed error to the prediction, at no cost in time."""

    name = "noisy"

    def close(self, prediction: Tensor, run: Any) -> Tensor:
        return prediction + 0.01

    def finish(self, run: Any) -> dict[str, Any]:
        return {"note": "fake quantisation: rounds, computes in fp32"}


@pytest.mark.usefixtures("known_roof")
def test_rows_of_accelerators_and_their_honest_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant that takes half the time of 6 steps is followed by the base with 3; one that is slower is not."""
    times = {"base": 6.0, "fora:interval=2": 3.0, "fora:interval=3": 7.0}

    def measured(calls: Any, **_: Any) -> Any:
        return {n: bench_module.Timing(times[n], 0, 0, 0, 1, 0) for n in calls}

    monkeypatch.setattr("ditkit.eval.pipelines.interleave", measured)
    todo = variants({"base": pipeline()}, [parse_spec("fora:interval=2"), parse_spec("fora:interval=3")])
    setting = Setting(num_images=4, num_samples=8, repeats=1, warmups=0)
    result, samples = compare_pipelines(todo, setting, suite="t", progress=False)
    assert [r.name for r in result.rows] == ["base", "fora:interval=2", "base, 3 steps", "fora:interval=3"]
    base, fora, rival, slow = result.rows
    assert rival.num_inference_steps == 3
    assert rival.equal_time_to == ("fora:interval=2",)
    assert any("not faster" in note for note in slow.notes)
    assert rival.macs == pytest.approx(base.macs / 2, rel=0.05)  # type: ignore[operator]
    assert fora.macs < base.macs  # type: ignore[operator]
    assert fora.drift.relative_l2 > 0  # type: ignore[union-attr]
    assert base.drift.relative_l2 == 0  # type: ignore[union-attr]
    assert all(s.x.shape == (8, 1, 8, 8) for s in samples.values())
    torch.testing.assert_close(samples["base, 3 steps"].x, pipeline()([k % 10 for k in range(8)], num_inference_steps=3, progress=False).x)


@pytest.mark.usefixtures("known_roof")
def test_fake_quantisation_says_so_in_its_row() -> None:
    """Case A24: and the table prints it."""
    base = pipeline(2)
    pipes = {"base": base, "rounded": base.with_methods(Noisy())}
    result, _ = compare_pipelines(variants(pipes), Setting(num_images=2, num_samples=2, repeats=1, warmups=0), progress=False)
    assert "noisy: fake quantisation: rounds, computes in fp32" in result.rows[1].notes
    assert "fake quantisation" in table(result)


@pytest.mark.usefixtures("known_roof")
def test_without_a_judge_all_rows_show_the_same_classes() -> None:
    base = pipeline(2)
    setting = Setting(num_images=3, num_samples=3, repeats=1, warmups=0)
    _, samples = compare_pipelines(variants({"base": base, "again": base}), setting, progress=False)
    assert torch.equal(samples["base"].x, samples["again"].x)
    assert torch.equal(samples["base"].x, base([0, 1, 2], seed=0, progress=False).x)


def test_a_cache_that_never_hit_is_a_warning() -> None:
    """Case A22: the report line."""
    assert notes_of({"cache": {"hits": 8, "steps": 10}}) == ("cache: hits 8, steps 10",)
    assert any("WARNING: cache" in note for note in notes_of({"cache": {"hits": 0}}))


def test_a_compiled_accelerator_brings_the_compiled_base() -> None:
    names = [v.name for v in variants({"base": pipeline(2)}, [parse_spec("fora:interval=2+compile:grain=block")])]
    assert names == ["base", "compile:grain=block", "fora:interval=2+compile:grain=block"]
    with pytest.raises(DitkitError, match="once"):
        variants({"base": pipeline(2)}, [parse_spec("fora"), parse_spec("fora")])


@pytest.mark.usefixtures("known_roof")
def test_the_verb_prints_a_table_and_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(3).save_pretrained(tmp_path / "model")
    options = ["--num-images", "2", "--num-samples", "0", "--repeats", "1", "--warmups", "0", "--no-progress", "--out", str(tmp_path)]
    assert bench_verb.main([str(tmp_path / "model"), "--methods", "fora:interval=2", *options]) == 0
    text = capsys.readouterr().out
    assert "fora:interval=2" in text
    assert "MACs" in text
    (file,) = tmp_path.glob("bench_*.json")
    values = json.loads(file.read_text())
    assert values["command"].startswith("ditkit bench")
    assert [r["quality"] for r in values["rows"]] == [None] * len(values["rows"])
    with pytest.raises(DitkitError, match="no bundle"):
        bench_verb.main([])


def test_the_eval_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(3).save_pretrained(tmp_path / "model")
    common = [str(tmp_path / "model"), "--features", "pca64", "--no-progress"]
    assert eval_verb.main([*common, "--num-samples", "70", "--methods", "fora:interval=2", "--out", str(tmp_path / "eval.json")]) == 0
    text = capsys.readouterr().out
    assert "70 samples (euler, 3 steps, guidance 2 (all), fora) against digits/train, 1437 samples" in text
    values = json.loads((tmp_path / "eval.json").read_text())
    assert values["protocol"]["num_inference_steps"] == 3
    assert {s["metric"] for s in values["scores"]} == {"frechet", "kid", "precision", "recall", "label agreement"}
    with pytest.raises(DitkitError, match="65 or more"):
        eval_verb.main([*common, "--num-samples", "64"])


def test_eval_samples_as_many_at_a_time_as_it_is_told() -> None:
    for told, batches in (([3] * 7, 2), ([3, 4], 1)):
        out = eval_verb._sample(pipeline(1), {"class_labels": told}, eval_verb.Args("-", batch_size=4, progress=False))
        assert (out.x.shape[0], out.report["batches"]) == (len(told), batches)


# ---- files and text


def test_the_file_is_named_for_suite_machine_and_day_and_is_strict_json(tmp_path: Path) -> None:
    result = run_bench([Candidate("a", lambda: torch.ones(1, 2))], suite="speed", repeats=1, warmups=0, progress=False)
    path = result.write(tmp_path)
    assert path.name == f"speed_{result.machine.slug}_{result.date}.json"
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values["rows"][0]["drift"]["psnr"] == "inf"
    assert values["machine"]["torch"] == torch.__version__
    assert {"others_before", "commit", "command", "protocol"} <= set(values)


def test_a_busy_machine_is_said_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "other_work", lambda: 50.0)
    result = run_bench([Candidate("a", lambda: torch.ones(1, 2))], suite="t", repeats=1, warmups=0, progress=False)
    assert result.busy
    assert "do not trust" in table(result)


@pytest.mark.parametrize(("value", "text"), [(0.00123, "0.00123"), (9.999, "10.0"), (123.4, "123"), (12345.6, "12346"), (0, "0")])
def test_three_digits(value: float, text: str) -> None:
    assert three(value) == text


def test_specs() -> None:
    spec = parse_spec("fora:interval=2+taylorseer:interval=4,order=2+compile:grain=block")
    assert spec.methods == (("fora", {"interval": 2}), ("taylorseer", {"interval": 4, "order": 2}))
    assert spec.grain == "block"
    assert [m.label for m in spec.build()] == ["fora", "taylorseer"]
    for bad in ("nothing", "fora:interval", "compile:grain=whole", "fora:interval=0", "fora:intervall=2"):
        with pytest.raises(DitkitError):
            parse_spec(bad).build()
