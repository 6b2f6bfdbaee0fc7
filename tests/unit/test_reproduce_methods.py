"""Experiments on accelerators: minutes computed before they run, arms with methods, of equal time and compared picture by picture; and each
experiment of an accelerator with tiny numbers, from its own file to its verdicts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from ditkit.cli import main as cli
from ditkit.core.config import read_data
from ditkit.core.errors import ConfigError
from ditkit.reproduce.costs import run_checks
from ditkit.reproduce.figure import front, name_points
from ditkit.reproduce.measures import Measured
from ditkit.reproduce.plan import forwards, plan
from ditkit.reproduce.protocol import Arm, CostCheck, Paired, Protocol, load_protocol, merged, protocols
from ditkit.reproduce.runner import reproduce
from ditkit.reproduce.verdicts import judge_paired
from ditkit.train import train
from ditkit.train.recipe import Recipe

SAMPLES = {"measure": "samples", "solver": "euler", "num_inference_steps": 4}
FEW = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant", "ema_decay": 0.0}
ACCELERATORS = ["clear", "flexdit", "harmonica", "ras", "tinyfusion"]
VERDICTS = {"shown", "not shown", "underpowered"}


def protocol(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "title": "tiny",
        "paper": "none",
        "written": "2026-01-01",
        "seeds": [0, 1, 2],
        "num_samples": 66,
        "recipe": {"trainer": {"steps": 1}},
        "bases": {"plain": {"backbone": {"name": "dit", "config": {"dim": 16, "depth": 2, "num_heads": 2}}}},
        "every_sample": {**SAMPLES, "base": "plain", "reference": "base"},
        "arms": {"base": {}, "fast": {"methods": "fora:interval=2"}, "few": {"equal_time_to": "fast"}},
        "claims": {
            "near": {
                "kind": "paired",
                "hypothesis": "h",
                "metric": "drift",
                "smallest_effect": 0.5,
                "expected": {"between_seeds": 0.1, "within_seed": 0.1, "why": "a test"},
                "comparisons": [{"method": "fast", "baseline": "few"}],
            }
        },
        "baseline": "base",
    }
    return merged(values, changes)


# ---- minutes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ACCELERATORS, "dit", "sit"])
def test_every_experiment_ends_within_twenty_minutes_as_computed(name: str) -> None:
    found = plan(load_protocol(name))
    assert found.own <= found.everything <= 22 * 60
    assert found.own <= 20 * 60  # what is more is the base that experiments share, where it is not there yet


def test_planned_work_follows_from_the_objectives() -> None:
    def worth(objective: dict[str, Any], methods: list[dict[str, Any]]) -> float:
        values = {"backbone": {"name": "dit"}, "objective": objective, "methods": methods}
        return forwards(Recipe.parse(values))

    table = [{"name": "harmonica", "config": {"num_inference_steps": 20}}]
    assert worth({"name": "diffusion"}, []) == 3
    assert worth({"name": "l2c"}, [{"name": "l2c"}]) == 4
    assert worth({"name": "harmonica", "config": {"proxy": "none", "guidance_scale": 1.0}}, table) == 60
    assert worth({"name": "harmonica", "config": {"refresh": 20}}, table) == 2 * (60 + 21)  # 21 trajectories of 20 every 20 updates


def test_the_plan_is_printed_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(protocol(), sort_keys=False))
    assert cli.main(["reproduce", str(path), "--plan", "--out", str(tmp_path / "out")]) == 0
    assert "training plain" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# ---- protocols --------------------------------------------------------------------------------------------------------------


def test_arms_of_samples_share_what_they_do_not_say() -> None:
    arms = Protocol.parse(protocol()).arms
    assert (arms["base"].solver, arms["fast"].num_inference_steps, arms["fast"].reference) == ("euler", 4, "base")
    assert (arms["few"].num_inference_steps, arms["few"].equal_time_to) == (0, "fast")
    again = Protocol.parse(Protocol.parse(protocol()).to_dict())
    assert again.arms == arms


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"arms": {"fast": {"methods": "forra:interval=2"}}}, "fora"),
        ({"arms": {"few": {"equal_time_to": "fastest"}}}, "fastest"),
        ({"arms": {"fast": {"equal_time_to": "few"}}}, "few"),
        ({"arms": {"fast": {"reference": ""}}}, "has no reference"),
        ({"baseline": "bas"}, "bas"),
        ({"maps": ["few"]}, "maps"),
        ({"shared": ["plane"]}, "plane"),
        ({"bases": {"plain": {"bundle": "digits"}}}, "backbone"),
        ({"claims": {"near": {"margin": 0.2}}}, "margin"),
        ({"claims": {"near": {"metric": "accuracy"}}, "read_labels": False}, "read_labels"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Protocol.parse(protocol(**changes))


def test_methods_are_written_as_for_the_benchmark() -> None:
    assert Arm.parse({**SAMPLES, "base": "b", "methods": "fora:interval=2+compile:grain=step"}).methods
    with pytest.raises(ConfigError, match="solver"):
        Arm.parse({"base": "b", "measure": "samples", "num_inference_steps": 4})
    with pytest.raises(ConfigError, match="num_inference_steps or equal_time_to"):
        Arm.parse({**SAMPLES, "base": "b", "equal_time_to": "other"})


def test_a_shared_base_is_trained_with_the_first_seed() -> None:
    found = Protocol.parse(protocol(seeds=[5, 6, 7], shared=["plain"]))
    assert found.recipe_of("plain", 7).trainer.seed == 5


# ---- measures and verdicts --------------------------------------------------------------------------------------------------


def test_drift_is_the_mean_square_of_each_picture() -> None:
    a = Measured({"pictures": np.array([[0.0, 2.0], [1.0, 1.0]])}, None)  # type: ignore[arg-type]
    b = Measured({"pictures": np.array([[0.0, 0.0], [1.0, 4.0]])}, None)  # type: ignore[arg-type]
    drifted = b.against(a)
    assert drifted.rows["drift"].tolist() == [2.0, 4.5]
    assert drifted.metrics() == {"drift": 3.25}


@pytest.mark.parametrize(("worse", "expected"), [(0.1, "shown"), (0.2, "shown"), (2.0, "not shown")])
def test_not_worse_by_more_than_a_margin(worse: float, expected: str) -> None:
    claim = Paired.parse(
        {
            "kind": "paired",
            "hypothesis": "h",
            "metric": "mse",
            "smallest_effect": 0.5,
            "margin": 0.5,
            "expected": {"between_seeds": 0.1, "within_seed": 0.1, "why": "a test"},
            "comparisons": [{"method": "m", "baseline": "b"}],
        }
    )
    noise = 0.01 * np.random.default_rng(0).standard_normal((3, 70))

    def values(level: float) -> list[Any]:
        return [lambda rows=None, x=level + n: float(x.mean() if rows is None else x[rows].mean()) for n in noise]

    parsed = Protocol.parse(protocol())
    assert judge_paired("c", claim, parsed, {"m": values(5 + worse), "b": values(5)}, 70).verdict == expected


def test_a_baseline_without_error_is_no_division_by_zero() -> None:
    values = protocol()["claims"]["near"] | {"relative": True, "comparisons": [{"method": "m", "baseline": "b"}]}
    exact, worse = [lambda rows=None: 0.0] * 3, [lambda rows=None: 0.5] * 3
    found = judge_paired("c", Paired.parse(values), Protocol.parse(protocol()), {"m": worse, "b": exact}, 70)
    assert (found.effects[0].effect, found.verdict) == (-1.0, "not shown")


def test_the_front_is_what_nothing_beats_in_both() -> None:
    assert front([(3, 1), (1, 3), (2, 2), (2.5, 2.5), (2, 4), (4, 1)]) == [(1, 3), (2, 2), (3, 1)]


def test_names_of_points_cover_no_point_and_no_other_name() -> None:
    figure = Figure(figsize=(5.4, 4.4))
    axes = figure.subplots()
    points = [(100.0, 150.0, "FORA N = 2"), (99.0, 139.0, "full attention, 13 steps"), (101.0, 150.0, "the same"), (55.0, 153.0, "first")]
    for cost, value, _ in points:
        axes.plot(cost, value, "o", markersize=5)
    axes.margins(x=0.15, y=0.1)
    name_points(points, axes)
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in axes.texts]
    assert [t.get_text() for t in sorted(axes.texts, key=lambda t: t.get_text())] == sorted(p[2] for p in points)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.contains(*axes.transData.transform(p[:2])) for box in boxes for p in points)


def test_a_saving_is_counted_and_timed() -> None:
    small = {"size": "DiT-S/2", "config": {"dim": 16, "depth": 8, "num_heads": 2, "input_size": [8, 8]}, "compile": "", "batch": 1}
    checks = {
        "half": {**small, "changes": {"depth": 4}, "least_macs_saved": 0.4, "least_speedup": 1.01},
        "never": {**small, "methods": "fora:interval=2", "num_steps": 4, "least_macs_saved": 0.99},
    }
    half, never = run_checks(Protocol.parse(protocol(costs=checks)), progress=False)
    assert half.macs_saved == pytest.approx(0.5, abs=0.05)  # patches and head are computed by both
    assert half.holds == (half.speedup >= 1.01)
    assert 0 < never.macs_saved < 0.5
    assert not never.holds


@pytest.mark.parametrize(("name", "saved"), [("tinyfusion", 0.45), ("flexdit", 0.45)])
def test_the_papers_savings_are_counted_at_their_shapes(name: str, saved: float) -> None:
    from ditkit.eval.counters import count_run
    from ditkit.reproduce.costs import networks

    (check,) = load_protocol(name).costs.values()
    assert isinstance(check, CostCheck)
    whole, small = (count_run(u, check.num_steps, check.batch).macs for u in networks(check, "meta"))
    assert 1 - small / whole >= saved


# ---- each experiment, tiny ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network of six blocks on the digits, hardly trained."""
    folder = tmp_path_factory.mktemp("bundle") / "digits"
    backbone = {"name": "dit", "config": {"dim": 16, "depth": 6, "num_heads": 2, "patch_size": 4}}
    trainer = {"steps": 2, "batch_size": 8, "learning_rate": 1e-2, "sample_every": 0, "validate_every": 0, "device": "cpu"}
    train(Recipe.parse({"backbone": backbone, "process": {"name": "flow"}, "trainer": trainer}), folder, progress=False)
    return str(folder)


def tiny(name: str, bundle: str) -> dict[str, Any]:
    """The experiment's own file, with a small network, few updates and few samples."""
    values = read_data(protocols()[name])
    del values["full"]
    values |= {"num_samples": 66, "resamples": 100, "draws": 1, "held_out": 16, "timed": 2, "costs": {}}
    if "sampling" in values["recipe"]:
        values["recipe"]["sampling"]["num_inference_steps"] = 4
    if values["data"] == "scenes":
        values["data_config"] |= {"size": 16, "length": 70}
    for base in (values["recipe"], *values["bases"].values()):
        if "bundle" in base:
            base["bundle"] = bundle
        else:
            base["trainer"] = {**base.get("trainer", {}), **FEW}
        if "dim" in (base.get("backbone") or {}).get("config", {}):
            base["backbone"]["config"] |= {"dim": 16} if name in ("flexdit", "tinyfusion") else {"dim": 16, "depth": 2}
        for method in base.get("methods", []):
            if "num_inference_steps" in method["config"]:
                method["config"]["num_inference_steps"] = 4
            if "side_data" in method["config"]:  # of 8 x 8 tokens
                method["config"] |= {"side_noise": 3, "side_data": 5}
    if name == "tinyfusion":  # its criteria are those of test_cuts.py
        del values["claims"]["criterion"]
    for claim in values["claims"].values():
        claim.pop("context", None)
    arms = list(
        dict.fromkeys(u for c in values["claims"].values() if c["metric"] == "frechet" for v in c["comparisons"] for u in v.values())
    )
    arms += ["fewer-layers"] if name == "harmonica" else []
    values["pareto"] = [{"metric": "frechet", "arms": arms}]
    values |= {"maps": values.get("maps", [])[:1], "shared": list(values["bases"])}
    for arm in (values.get("every_sample", {}), *values["arms"].values()):
        if arm.get("num_inference_steps"):
            arm["num_inference_steps"] = 6 if name == "ras" else 4  # sparse from the fifth step on
        if "openvino" in arm.get("methods", ""):
            arm["methods"] = ""
    return values


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCELERATORS)
def test_each_experiment_runs_from_its_file_to_its_verdicts(name: str, tiny_bundle: str, tmp_path: Path) -> None:
    values = tiny(name, tiny_bundle)
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    reproduce(path, tmp_path / "out", store=tmp_path / "bases", progress=False)
    found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert set(found["verdicts"]) == set(values["claims"])
    assert set(found["verdicts"].values()) <= VERDICTS
    assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = {r["arm"]: r for r in found["rows"]}
    sampled = [r for r in rows.values() if r["measure"] == "samples"]
    assert all(r["sample_seconds"] > 0 and r["sample_macs"] > 0 and r["num_inference_steps"] >= 1 for r in sampled)
    if name == "harmonica":
        assert rows["harmonica"]["report"]["harmonica"]["cache_use"] == rows["l2c"]["report"]["l2c"]["cache_use"]  # matched
        assert sum(map(sum, found["maps"]["harmonica"]["0"])) == round(0.45 * 4 * 12)
        assert rows["base"]["metrics"]["drift"] == 0
        assert not (Path(tiny_bundle) / "cuts").exists()
    if name == "flexdit":
        assert rows["flexdit-samples"]["macs_saved"] > 0.3
