"""Experiments: their statistics on known cases, verdicts, strict protocols, bases by content hash, and a tiny one end to end."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from ditkit.cli import main as cli
from ditkit.core.errors import ConfigError, WeightsError
from ditkit.reproduce import bases as bases_module
from ditkit.reproduce.bases import BaseStore, Stopped, content_hash, meaning
from ditkit.reproduce.protocol import Paired, Protocol, Trend, load_protocol, merged, protocols
from ditkit.reproduce.runner import check_power, reproduce
from ditkit.reproduce.statistics import Bound, bootstrap_bound, detectable, resampled, seed_bound, spearman, spearman_p
from ditkit.reproduce.training import train_bases
from ditkit.reproduce.verdicts import judge_paired, judge_trend, together, trend_verdict, verdict
from ditkit.testing.training import tiny_recipe

TINY = {
    "title": "tiny",
    "paper": "none",
    "written": "2026-01-01",
    "seeds": [0, 1, 2],
    "num_samples": 66,
    "draws": 2,
    "resamples": 100,
    "recipe": {
        "backbone": {"name": "dit", "config": {"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}},
        "process": {"name": "gaussian"},
        "trainer": {"steps": 10, "batch_size": 16, "learning_rate": 0.01, "ema_decay": 0.5, "device": "cpu", "dtype": "float32"},
    },
    "bases": {"long": {}, "short": {"trainer": {"steps": 1}}},
    "arms": {
        "long": {"base": "long", "measure": "loss"},
        "short": {"base": "short", "measure": "loss"},
        "one": {"base": "long", "measure": "samples", "solver": "ddim", "num_inference_steps": 1},
        "two": {"base": "long", "measure": "samples", "solver": "ddim", "num_inference_steps": 2},
    },
    "claims": {
        "training": {
            "kind": "paired",
            "hypothesis": "ten steps reach a lower loss than one",
            "metric": "mse",
            "relative": True,
            "smallest_effect": 0.5,
            "expected": {"between_seeds": 0.1, "within_seed": 0.1, "why": "a test"},
            "comparisons": [{"method": "long", "baseline": "short"}],
        }
    },
    "curves": [{"metric": "frechet", "series": [{"label": "ddim", "arms": ["one", "two"]}]}],
}


def claim(metric: str = "mse", smallest: float = 0.5, **more) -> Paired:
    return Paired.parse(
        {
            "kind": "paired",
            "hypothesis": "h",
            "metric": metric,
            "smallest_effect": smallest,
            "expected": {"between_seeds": 0.1, "within_seed": 0.1, "why": "a test"},
            "comparisons": [{"method": "m", "baseline": "b"}],
            **more,
        }
    )


def arm(per_seed: list[np.ndarray]):
    """The mean over rows, for each seed."""

    def value(x, rows=None):
        return float(x.mean() if rows is None else x[rows].mean())

    return [partial(value, x) for x in per_seed]


PROTOCOL = Protocol.parse(TINY)

# ---- statistics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("y", [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [2, 1, 4, 3, 3], [0.1, 7, 7, 7, -3]])
def test_spearman_is_scipys(y: list[float]) -> None:
    from scipy.stats import spearmanr

    x = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert spearman(x, y) == pytest.approx(float(spearmanr(x, y).statistic), abs=1e-12)


def test_exact_p_of_five_points() -> None:
    x = [1, 2, 3, 4, 5]
    assert spearman_p(x, [5, 4, 3, 2, 1]) == pytest.approx(1 / 120)
    assert spearman_p(x, [5, 4, 3, 1, 2]) == pytest.approx(5 / 120)  # rho -0.9: this and the three other swaps of neighbours, and -1
    assert spearman_p(x, x) == 1


def test_bound_over_seeds_is_students() -> None:
    bound = seed_bound([1.0, 2.0, 3.0])  # s = 1; t(0.95, 2 degrees) = 2.919986
    assert bound.low == pytest.approx(2 - 2.919986 / 3**0.5, abs=1e-6)
    assert bound.high == pytest.approx(2 + 2.919986 / 3**0.5, abs=1e-6)


def test_the_detectable_effect_is_found_in_80_percent_of_experiments() -> None:
    effect = detectable(0.3, 0.4, 3)  # of one seed: standard deviation 0.5
    draws = effect + 0.5 * np.random.default_rng(0).standard_normal((40_000, 3))
    low = draws.mean(1) - 2.919986 * draws.std(1, ddof=1) / 3**0.5
    assert (low > 0).mean() == pytest.approx(0.80, abs=0.01)


def test_bootstrap_bound_of_a_mean() -> None:
    x = np.random.default_rng(1).standard_normal(400)
    draws = [float(x[rows[0]].mean()) for rows in resampled(1, 400, shared=False, num=2000)]
    bound = bootstrap_bound(float(x.mean()), draws)
    half = 1.645 * x.std() / 20
    assert bound.low == pytest.approx(x.mean() - half, rel=0.1, abs=0.01)
    assert bound.high == pytest.approx(x.mean() + half, rel=0.1, abs=0.01)


def test_draws_are_shared_between_arms_and_where_asked_between_seeds() -> None:
    assert all((a == b).all() for a, b in zip(resampled(3, 50, shared=False, num=5), resampled(3, 50, shared=False, num=5)))
    together = resampled(3, 50, shared=True, num=2)[0]
    apart = resampled(3, 50, shared=False, num=2)[0]
    assert (together[0] == together[2]).all()
    assert (apart[0] != apart[2]).any()


def test_the_wider_bound_counts() -> None:
    assert Bound(1, 2).widest(Bound(0, 1.5)) == Bound(0, 2)


# ---- verdicts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 0.9, "shown"),
        (0.01, 0.2, "shown"),  # smaller than planned for, and yet not nothing
        (-0.1, 0.2, "not shown"),
        (-0.9, -0.1, "not shown"),
        (-0.1, 0.6, "underpowered"),
        (0.0, 0.6, "underpowered"),
    ],
)
def test_verdict(low: float, high: float, expected: str) -> None:
    assert verdict(low, high, 0.5) == expected


@pytest.mark.parametrize(
    ("rho", "low", "high", "expected"),
    [
        (1.0, 0.9, 1.0, "shown"),
        (1.0, 0.7, 1.0, "underpowered"),
        (0.9, 0.9, 1.0, "underpowered"),
        (0.9, 0.7, 0.9, "not shown"),
        (-1.0, -1.0, -1.0, "not shown"),
    ],
)
def test_verdict_of_a_trend(rho: float, low: float, high: float, expected: str) -> None:
    assert trend_verdict(rho, low, high, 0.9) == expected


def test_a_claim_needs_all_of_its_comparisons() -> None:
    assert together(["shown", "shown"]) == "shown"
    assert together(["shown", "underpowered"]) == "underpowered"
    assert together(["shown", "underpowered", "not shown"]) == "not shown"


@pytest.mark.parametrize(
    ("shift", "between", "expected"),
    [(1.0, 0.01, "shown"), (0.0, 0.01, "not shown"), (-1.0, 0.01, "not shown"), (0.5, 1.0, "underpowered")],
)
def test_paired_claims(shift: float, between: float, expected: str) -> None:
    rng = np.random.default_rng(0)
    baseline = [5 + 3 * rng.standard_normal(100) for _ in range(3)]  # far noisier than the paired differences
    offsets = shift + between * np.array([-1.0, 0.2, 0.8])
    method = [b - o + 0.1 * rng.standard_normal(100) for b, o in zip(baseline, offsets)]
    result = judge_paired("c", claim(), PROTOCOL, {"m": arm(method), "b": arm(baseline)}, 100)
    assert result.verdict == expected
    assert result.effects[0].effect == pytest.approx(shift, abs=0.05)
    assert result.effects[0].bootstrap.high - result.effects[0].bootstrap.low < 0.1  # paired: unpaired it would be about 0.8


def test_accuracy_is_better_when_higher_and_context_has_no_verdict() -> None:
    values = {"m": arm([np.full(70, v) for v in (0.9, 0.91, 0.92)]), "b": arm([np.full(70, 0.5)] * 3)}
    result = judge_paired("c", claim("accuracy", 0.3, context=[{"method": "b", "baseline": "m"}]), PROTOCOL, values, 70)
    assert (result.verdict, result.context[0].verdict) == ("shown", None)
    assert result.effects[0].effect == pytest.approx(0.41) == -result.context[0].effect


def test_relative_effects_are_shares_of_the_baseline() -> None:
    values = {"m": arm([np.full(70, 3.0)] * 3), "b": arm([np.full(70, 4.0)] * 3)}
    assert judge_paired("c", claim(relative=True), PROTOCOL, values, 70).effects[0].effect == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("values", "expected"), [((5, 4, 3, 2, 1), "shown"), ((1, 2, 3, 4, 5), "not shown"), ((5, 4, 2, 3, 1), "not shown")]
)
def test_trends(values: tuple[float, ...], expected: str) -> None:
    names = tuple("abcde")
    trend = Trend(kind="trend", hypothesis="h", metric="mse", arms=names, smallest_effect=0.9)
    noise = 0.01 * np.random.default_rng(0).standard_normal(80)
    measured = {n: arm([v + noise] * 3) for n, v in zip(names, values)}
    result = judge_trend("t", trend, PROTOCOL, measured, {n: 10**i for i, n in enumerate(names)}, 80)
    assert result.verdict == expected
    assert result.rho == pytest.approx(spearman([1, 2, 3, 4, 5], values))
    assert result.monotone == (values == (5, 4, 3, 2, 1))


# ---- protocols --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(protocols()))
@pytest.mark.parametrize("part", ["default", "full"])
def test_the_package_s_protocols_are_whole(name: str, part) -> None:
    protocol = load_protocol(name, part)
    check_power(protocol)
    assert len(protocol.seeds) >= 3
    assert set(protocol.needed()) == set(protocol.bases)  # nothing is trained for nothing
    for base in protocol.bases:
        if protocol.bundle_of(base) is None:
            assert protocol.recipe_of(base, 2).trainer.seed == (0 if base in protocol.shared else 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": [1]}, "seed"),
        ({"seeds": [0, 1]}, "seeds"),
        ({"seeds": [0, 1, 1]}, "distinct"),
        ({"written": "before"}, "written"),
        ({"arms": {"long": {"base": "longer"}}}, "longer"),
        ({"arms": {"one": {"solver": ""}}}, "solver"),
        ({"arms": {"long": {"num_inference_steps": 5}}}, "num_inference_steps"),
        ({"claims": {"training": {"comparisons": [{"method": "lang", "baseline": "short"}]}}}, "lang"),
        ({"claims": {"training": {"metric": "frechet"}}}, "frechet"),
        ({"claims": {"training": {"metric": "fid"}}}, "metric"),
        ({"claims": {"training": {"expected": {"why": ""}}}}, "why"),
        ({"claims": {"training": {"kind": "sum"}}}, "kind"),
        ({"claims": {"training": {"smallest_effct": 1.0}}}, "did you mean 'smallest_effect'"),
        ({"bases": {"short": {"trainer": {"step": 1}}}}, "step"),
        ({"curves": [{"metric": "frechet", "series": [{"label": "x", "arms": ["one", "long"]}]}]}, "long"),
        ({"full": 3}, "full"),
        ({"full": {"seeds": [0]}}, "seeds"),
    ],
)
def test_a_protocol_that_does_not_fit_is_refused_by_name(tmp_path: Path, change: dict, named: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(merged(TINY, change)))
    with pytest.raises(ConfigError, match=named):
        load_protocol(path, "full" if isinstance(change.get("full"), dict) else "default")


def test_full_replaces_what_it_says_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({**TINY, "full": {"num_samples": 100, "recipe": {"trainer": {"steps": 40}}}}))
    default, full = load_protocol(path), load_protocol(path, "full")
    assert (default.num_samples, full.num_samples) == (66, 100)
    assert (default.recipe_of("long", 0).trainer.steps, full.recipe_of("long", 0).trainer.steps) == (10, 40)
    assert full.recipe_of("short", 0).trainer.steps == 1  # a base's own value stands
    assert full.arms == default.arms


def test_no_promise_to_see_less_than_the_spread_allows() -> None:
    values = merged(TINY, {"claims": {"training": {"smallest_effect": 0.1}}})
    with pytest.raises(ConfigError, match=r"promises to see an effect of 0\.1.*0\.325"):
        check_power(Protocol.parse(values))


def test_an_unknown_experiment_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "sitt"]) == 2
    assert "did you mean 'sit'" in capsys.readouterr().err


def test_results_and_bases_go_into_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    (file := tmp_path / "file").touch()
    for option in ("--out", "--bases"):
        folders = {"--out": str(tmp_path / "out"), "--bases": str(tmp_path / "bases"), option: str(file)}
        arguments = [word for pair in folders.items() for word in pair]
        assert cli.main(["reproduce", str(tmp_path / "tiny.yaml"), *arguments]) == 2
        assert f"{file} is a file; next: choose a folder" in capsys.readouterr().err


# ---- bases ------------------------------------------------------------------------------------------------------------------


def test_a_base_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, recipe = BaseStore(tmp_path), tiny_recipe(steps=2)
    first = store.get(recipe, progress=False)
    monkeypatch.setattr(bases_module, "train", lambda *a, **k: pytest.fail("trained again"))
    again = BaseStore(tmp_path).get(recipe, progress=False)
    assert (first.reused, again.reused) == (False, True)
    assert (again.folder, again.hash, again.seconds) == (first.folder, first.hash, first.seconds)
    (first.folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match="damaged"):
        store.get(recipe, progress=False)


def test_an_interrupted_base_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half:
        finished = False

    with monkeypatch.context() as patch:
        patch.setattr(bases_module, "train", lambda *a, **k: Half())
        with pytest.raises(Stopped):
            BaseStore(tmp_path).get(tiny_recipe(steps=2), progress=False)
    assert not BaseStore(tmp_path).get(tiny_recipe(steps=2), progress=False).reused


def test_the_hash_is_of_what_training_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe()
    same = tiny_recipe({"sampling": {"solver": "euler", "num_inference_steps": 9}, "claim": "another"})
    assert content_hash(recipe) == content_hash(same)
    others = [tiny_recipe(seed=1), tiny_recipe(steps=7), tiny_recipe({"process": {"name": "gaussian"}})]
    assert len({content_hash(r) for r in (recipe, *others)}) == 4
    before = content_hash(recipe)
    monkeypatch.setattr(bases_module, "code_hash", lambda files: "changed")
    assert content_hash(recipe) != before


def test_comments_docstrings_and_layout_mean_nothing() -> None:
    plain = "def f(x):\n    return x + 1\n"
    assert meaning(plain) == meaning('"""Doc."""\n\ndef f(x):\n    """Doc."""\n    # why\n    return (x\n            + 1)\n')
    assert meaning(plain) != meaning("def f(x):\n    return x + 2\n")


# ---- all of it --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a protocol whose bases are trained."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    train_bases(load_protocol(folder / "tiny.yaml"), BaseStore(folder / "bases"), progress=False)
    return folder


@pytest.fixture(scope="module")
def tiny(trained: Path) -> Path:
    """The same, once it was run."""
    reproduce(trained / "tiny.yaml", trained / "out", store=trained / "bases", progress=False)
    return trained


@pytest.mark.slow
def test_every_seed_has_bases_of_its_own(trained: Path) -> None:
    notes = [json.loads(path.read_text()) for path in (trained / "bases").glob("*/base.json")]
    found = {(n["recipe"]["trainer"]["seed"], n["recipe"]["trainer"]["steps"]) for n in notes}
    assert found == {(seed, steps) for seed in (0, 1, 2) for steps in (1, 10)}
    assert len({n["hash"] for n in notes}) == 6


@pytest.mark.slow
def test_a_tiny_experiment_end_to_end(tiny: Path) -> None:
    found = json.loads((tiny / "out" / "tiny.json").read_text())
    assert found["part"] == "default"
    assert found["verdicts"] == {"training": "shown"}  # from a loss of 1 to well below
    assert found["bases"] == {"trained": 0, "reused": 6}
    assert {(r["arm"], r["seed"]) for r in found["rows"]} == {(a, s) for a in TINY["arms"] for s in (0, 1, 2)}
    assert [r["evaluations"] for r in found["rows"] if r["seed"] == 0] == [1, 1, 2, 1]
    assert found["machine"]["torch"]
    assert found["seconds"]["all"] > 0
    assert found["protocol"] == Protocol.parse(TINY).to_dict()
    short = [r["metrics"]["mse"] for r in found["rows"] if r["arm"] == "short"]
    assert found["claims"][0]["effects"][0]["baseline_value"] == pytest.approx(np.mean(short))
    assert found["real"]["num_samples"] == 66
    assert (tiny / "out" / "tiny.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_again_from_the_command_line_nothing_changes(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((tiny / "out" / "tiny.json").read_text())
    code = cli.main(["reproduce", str(tiny / "tiny.yaml"), "--out", str(tiny / "out"), "--bases", str(tiny / "bases"), "--no-progress"])
    after = json.loads((tiny / "out" / "tiny.json").read_text())
    text = capsys.readouterr().out
    assert code == 0
    for row in (*before["rows"], *after["rows"]):
        row.update(sample_seconds=0, time_saved=0)  # measured anew
    assert (after["rows"], after["claims"]) == (before["rows"], before["claims"])
    assert "SHOWN: training" in text
    assert "ten steps reach a lower loss than one" in text
