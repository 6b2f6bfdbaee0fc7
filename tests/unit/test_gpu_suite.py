"""The GPU suite at tiny size on the CPU: every section runs and is written down, failures are kept, the deadline holds."""

import functools
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from ditkit.core.errors import DitkitError
from ditkit.eval.roof import machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]  # torch's own, while it captures
FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", FOLDER / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def section(gpu):
    """Each section is run once, when it is first asked for."""
    return functools.cache(lambda name: gpu.sections(gpu.TINY)[name][1](1000.0))


def test_it_writes_what_ran_and_where(gpu, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    assert gpu.main(["--tiny", "--out", str(tmp_path), "--only", "parity"]) == 0
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert path.stem == f"gpu-tiny_{machine().slug}_{data['date']}"
    assert data["machine"]["torch"] == torch.__version__
    assert "says nothing about a GPU" in path.with_suffix(".txt").read_text()
    parity = data["sections"]["parity"]
    checks = {c["name"]: c for c in parity["checks"]}
    for part in ("dit out/cfg fp32", "dit out/y bf16", "sit out/y fp32", "harmonica-fora n3 trajectory fp32"):
        assert checks[part]["error"] <= checks[part]["limit"] == (2e-2 if "bf16" in part else 1e-5)
    assert any("against cpu fp32, batched guidance" in name for name in checks)
    assert [text.partition(":")[0] for text in parity["not run"]] == ["diffusers"]


def test_a_figure_above_its_limit_is_a_failure(gpu):
    checks = [{"name": "a", "error": 2e-5, "limit": 1e-5, "passed": False}, {"name": "b", "error": 0.0, "limit": 1e-5, "passed": True}]
    assert gpu.failures({"sections": {"parity": {"status": "done", "checks": checks}}}) == ["parity of a: 2e-05 > 1e-05"]


def test_rows_of_evaluations_are_the_same_function_with_their_floor(section):
    found = section("batch 2")
    rows = {r["name"]: r for r in found["rows"]}
    assert set(rows) == {f"{g}, {k}" for g in ("batched", "two-pass") for k in ("eager", "block", "step")}
    assert all(r["ratio_to_floor"] > 1 and r["drift"]["relative_l2"] < 1e-5 for r in rows.values())
    assert len({r["flops"] for r in rows.values()}) == 1  # guidance costs the same in one pass and in two
    assert rows["batched, block"]["seconds"]["cold"] > rows["batched, block"]["seconds"]["median"]  # it compiles
    assert set(found["not measured"].values()) == {"needs a GPU"}


def test_fora_computes_less(section):
    """Of 6 steps FORA computes the first and those where 5 - step is a multiple of N: 4 with N = 2, 3 with N = 3."""
    macs = {r["name"]: r["macs"] for r in section("fora")["rows"]}
    assert macs["base"] / macs["base, 3 steps"] == pytest.approx(2)
    assert macs["base, 3 steps"] < macs["FORA N=3"] < macs["FORA N=2"] < macs["base"]


def test_the_table_has_a_line_for_each_row(gpu, section):
    names = ("batch 2", "train", "fora")
    data = gpu.head(gpu.TINY, 460)
    data["sections"] = {name: {"status": "done", **section(name)} for name in names}
    lines = gpu.gpu_text.table(json.loads(json.dumps(gpu.plain(data)))).splitlines()
    for row in ("batched, step", "compiled by block", "FORA N=3"):
        assert sum(line.strip().startswith(row + "  ") for line in lines) == 1
    assert "  not measured: two-pass, step + CUDA graph: needs a GPU" in lines


def test_the_training_step_has_its_utilisation(section):
    found = section("train")
    assert [s["name"] for s in found["steps"]] == ["compiled by block", "eager"]
    for s in found["steps"]:
        rate = found["batch_size"] / s["seconds"]["median"]
        roof = found["roof"]["gemm_gflops"]["fp32"] * 1e9
        assert s["images_per_second"] == pytest.approx(rate)
        assert s["mfu_roof"] == pytest.approx(rate * found["flops_per_image"] / roof)
        assert s["mfu_datasheet"] is None  # a CPU has no such sheet


def test_a_training_step_learns(gpu):
    training = gpu.gpu_speed.Training(gpu.TINY, 4)
    step = training.step_of(training.model)
    training.optimizers.cfg = training.optimizers.cfg.model_copy(update={"learning_rate": 1e-2})
    losses = [float(step()) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_what_fails_is_written_down_and_the_next_section_runs(gpu, monkeypatch):
    def broken(seconds):
        raise RuntimeError("this kernel does not exist")

    todo = {"first": (60, broken), "second": (60, lambda seconds: {"seconds": seconds})}
    monkeypatch.setattr(gpu, "sections", lambda size: todo)
    seen = []
    data = gpu.suite(gpu.TINY, 100, [], lambda d: seen.append(json.dumps(d)))
    assert data["sections"]["first"]["error"] == "RuntimeError: this kernel does not exist"
    assert data["sections"]["second"] == {"status": "done", "seconds": 48, "section_seconds": pytest.approx(0, abs=5)}
    assert "this kernel" in seen[0]
    assert "second" not in json.loads(seen[0])["sections"]
    assert gpu.failures(data) == ["first: failed: RuntimeError: this kernel does not exist"]


def test_the_deadline_ends_a_section_and_skips_the_rest(gpu, monkeypatch):
    def endless(seconds):
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(gpu, "sections", lambda size: {"first": (2, endless), "second": (60, endless)})
    start = time.perf_counter()
    data = gpu.suite(gpu.TINY, 1.2, [], lambda d: None)
    assert time.perf_counter() - start < 10
    assert data["sections"]["first"]["status"] == "out of time"
    assert data["sections"]["second"]["status"] == "skipped"


def test_candidates_that_come_too_late_or_fail_are_named(gpu):
    admit = gpu.gpu_speed.Admission(1e-9, "cpu")
    admit("late", lambda: None)
    admit.seconds = 60

    def broken():
        raise torch.OutOfMemoryError("tried to allocate")

    admit("large", broken)
    assert admit.left_out == {"late": "no time left to compile it", "large": "OutOfMemoryError: tried to allocate"}
    assert not admit.candidates


def test_the_micro_batch_is_halved_until_it_fits(gpu, monkeypatch):
    tried = []

    def train(size, micro, seconds):
        tried.append(micro)
        if micro > 1:
            raise torch.OutOfMemoryError
        return {"micro": micro}

    monkeypatch.setattr(gpu.gpu_speed, "_train", train)
    assert gpu.gpu_speed.train_step(gpu.TINY, 1.0) == {"micro": 1}
    assert tried == [4, 2, 1]


def test_the_cold_start_is_split_into_its_parts(gpu, capsys):
    gpu.print_cold_start(gpu.TINY)
    marks = json.loads(capsys.readouterr().out)
    assert set(marks) == {"import_seconds", "model_seconds", "first_evaluation_seconds"}
    assert all(v > 0 for v in marks.values())


def test_without_a_gpu_the_real_size_is_refused(gpu, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    assert "--tiny" in capsys.readouterr().err


def test_an_unknown_section_is_named(gpu):
    with pytest.raises(DitkitError, match="no section 'batch 3'"):
        gpu.suite(gpu.TINY, 10, ["batch 3"], lambda d: None)
