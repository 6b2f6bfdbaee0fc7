"""Evaluating a model that is told captions: what is asked, what a perfect and an empty sample score, what is written, and clear errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ditkit.bundle import DataCard
from ditkit.cli import bench as bench_verb
from ditkit.cli import eval as eval_verb
from ditkit.core.errors import DitkitError
from ditkit.data import load
from ditkit.data.scenes import held_out, parse_caption
from ditkit.eval import captions as captions_module
from ditkit.eval import features
from ditkit.eval.caption_grid import caption_grid
from ditkit.eval.captions import CaptionJudge, usual_number
from ditkit.eval.pipelines import Setting, compare_pipelines, variants
from ditkit.eval.quality import Quality
from ditkit.eval.scene_reader import SYMBOLS, Found, Reading, SceneReader
from ditkit.eval.table import table
from ditkit.methods.specs import parse_spec
from ditkit.output import read_record
from ditkit.pipeline import Pipeline
from ditkit.testing.training import tiny_recipe
from ditkit.train.build import build

WORLD = {"size": 16, "groups": ["suits", "arrows"], "num_objects": [2, 2], "sizes": [0.42]}
SCENES = DataCard(name="scenes", config=WORLD, shape=(3, 16, 16))
BYTES = {"name": "bytes", "config": {"dim": 32, "depth": 1, "num_heads": 2, "max_length": 40}}
PIXART = {"name": "pixart", "config": {"dim": 32, "depth": 1, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2.0, "position_base": 4}}


class Wide:
    """300 random numbers of each picture, in place of a slow network."""

    name, dim, rule = "efficientnet-lite0", 300, "averaged to 4 x 4"

    def __call__(self, x: Tensor) -> np.ndarray:
        small = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1).double().numpy()
        return 1 + small @ np.random.default_rng(0).normal(size=(small.shape[1], self.dim)) / 48


class Oracle:
    """Knows every real picture of the first samples of a world by heart, and sees nothing in any other."""

    def __init__(self, num: int = 12) -> None:
        self.known: dict[bytes, Reading] = {}
        for held in (False, True):
            data = load("scenes", "test", held_out_only=held, length=num, **WORLD)
            for i, x in enumerate(data.batch(np.arange(num))["x"]):
                scene = data.scene(i)  # type: ignore[attr-defined]
                found = tuple(Found(o.glyph, o.color, *o.position) for o in scene.objects)
                self.known[x.numpy().tobytes()] = Reading(found, scene.background.color)

    def read(self, x: Tensor) -> list[Reading]:
        return [self.known.get(u.contiguous().numpy().tobytes(), Reading((), "white")) for u in x]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(autouse=True)
def _cheap(oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(features.FIXED, "efficientnet-lite0", Wide)
    monkeypatch.setattr(SceneReader, "load", classmethod(lambda cls, config, size: oracle))


def pipeline(**changed: Any) -> Pipeline:
    """An untrained model of captions, as a recipe builds it."""
    sampling = {"solver": "euler", "num_inference_steps": 2, "guidance": {"scale": 1.5}}
    data = {"name": "scenes", "config": {**WORLD, "length": 8}}
    parts = build(
        tiny_recipe({"backbone": PIXART, "encoder": BYTES, "data": data, "sampling": sampling, **changed}), torch.device("cpu")
    )  # fmt: skip
    return Pipeline(parts.model.eval(), parts.card)


def figures(quality: Quality) -> dict[str, float]:
    return {s.metric: s.value for s in quality.scores}


# ---- scenes


def test_half_of_the_captions_name_only_pairs_never_trained_on() -> None:
    judge = CaptionJudge(SCENES, 12)
    pairs = [parse_caption(text).objects for text in judge.told(12)]
    assert all(held_out(glyph, color) for objects in pairs[6:] for color, glyph in objects)
    assert not all(held_out(glyph, color) for objects in pairs[:6] for color, glyph in objects)
    assert {p for objects in pairs for _, p in objects} <= set(load("scenes", **WORLD).labels)  # of the bundle's own world
    assert judge.told(14)[12:] == judge.told(2)
    real = load("scenes", "test", length=6, **WORLD).batch(np.arange(6))["x"]
    assert torch.equal(judge.asked.real[:6], real)
    same = {u.numpy().tobytes() for u in judge.asked.real} & {u.numpy().tobytes() for u in judge.asked.others}
    assert not same
    assert len(judge.asked.others) == 12


def test_real_pictures_score_all_and_empty_ones_nothing() -> None:
    judge = CaptionJudge(SCENES, 12)
    best = judge(judge.asked.real, judge.told(12), full=False)
    for name in ("object", "color", "relation"):
        for metric in (name, f"{name} (held-out pairs)"):
            score = best[metric]
            assert (score.value, score.real, score.num_samples) == (1.0, 1.0, 6)
            assert score.low < 1 == score.high  # type: ignore[operator]
            assert score.chance is not None
            assert score.extractor == "scene reader"
    assert best["object"].settings["num_objects"] == 12  # two a caption
    assert best["object"].chance < 0.7  # type: ignore[operator]  # of ten glyphs
    assert best["frechet"].value < 1e-9
    none = figures(judge(torch.zeros_like(judge.asked.real), full=False))
    assert all(none[name] == 0 for name in ("object", "color", "relation (held-out pairs)"))
    assert none["frechet"] > best["frechet"].real > 0  # type: ignore[operator]


def test_every_figure_says_what_it_was_measured_on() -> None:
    judge = CaptionJudge(SCENES, 12)
    for s in judge(judge.asked.others).scores:
        assert s.reference == "scenes/test, the 12 of the same captions"
        assert s.settings["input"]
        assert s.num_samples in (6, 12)


def test_an_older_bundle_is_asked_in_the_world_that_the_reader_knows() -> None:
    old = DataCard(name="scenes", shape=(3, 16, 16))
    assert captions_module._options(old, "scenes")["size"] == 16
    assert "letters" not in captions_module._options(old, "scenes")["groups"]


def test_a_world_within_the_reader_s_own_is_read_by_the_same_reader() -> None:
    read = captions_module.world_to_read
    assert read({**SYMBOLS.to_dict(), "size": 32, "max_rotation": 0, "groups": ["suits"]}) == SYMBOLS
    assert read({**SYMBOLS.to_dict(), "groups": ["letters"]}).groups == ("letters",)
    assert read({**SYMBOLS.to_dict(), "max_rotation": 90}).max_rotation == 90


# ---- pictures with names


class Names:
    """Forty flat pictures of different colours; their names are their numbers."""

    name, shape, labels, num_classes = "emoji", (3, 8, 8), ["all"], 1

    def __init__(self) -> None:
        self.colors = torch.rand(40, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self) -> int:
        return 40

    def batch(self, ids: np.ndarray) -> dict[str, Tensor]:
        return {"x": self.colors[ids].expand(-1, 3, 8, 8).contiguous()}

    def captions(self, ids: np.ndarray) -> list[str]:
        return [f"number {i}" for i in ids]


def test_recall_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions_module, "load", lambda name, split, **_: Names())
    card = DataCard(name="emoji", config={"size": 8}, shape=(3, 8, 8))
    judge = CaptionJudge(card, 10)
    best = judge(judge.asked.real)
    assert [best[f"caption top-{k}"].value for k in (1, 5)] == [1, 1]
    assert best["caption top-1"].chance == 0
    assert best["caption top-1"].reference == "emoji, all 40 pictures"
    assert best["caption top-1"].settings["num_real"] == 40
    other = judge(judge.asked.real.roll(1, 0))  # every sample shows the picture of the caption before
    assert other["caption top-1"].value == 0
    assert other["caption top-1"].chance == pytest.approx(1 / 9)  # of the nine other captions, one is that
    assert usual_number("emoji") == 200


# ---- own pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    rng = np.random.default_rng(0)
    for k in range(20):
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(root / f"{k:02}.png")
        (root / f"{k:02}.txt").write_text(f"noise {k}")
    return root


def test_own_pictures_have_distances_and_no_asked_for_score(folder: Path) -> None:
    card = DataCard(name=str(folder), config={"resolution": 8}, shape=(3, 8, 8))
    judge = CaptionJudge(card, 12)
    assert judge.asked.reference.endswith("pictures/train, the 12 of the same captions")  # nothing was set aside
    assert len(judge.asked.others) == 8
    assert judge.told(1) == ["noise 0"]
    found = judge(judge.asked.real)
    assert {s.metric for s in found.scores} == {"frechet", "kid", "precision", "recall"}
    with pytest.raises(DitkitError, match="8 to 20"):
        CaptionJudge(card, 21)


@pytest.mark.parametrize(
    ("card", "options", "said"),
    [
        (SCENES, {"num": 7}, "8 or more captions"),
        (SCENES, {"extractors": ("classifier",)}, "class labels"),
        (SCENES, {"extractors": ("pca64",)}, "65 or more"),
        (SCENES, {"extractors": ("inception",)}, "no extractor 'inception'"),
        (SCENES.model_copy(update={"shape": (3, 32, 32)}), {}, "are \\(3, 16, 16\\)"),
        (SCENES.model_copy(update={"config": {"sise": 16}}), {}, "sise"),
        (DataCard(name="digits", shape=(1, 8, 8)), {}, "has no captions"),
        (DataCard(name="sceness", shape=(1, 8, 8)), {}, "did you mean 'scenes'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_sampled(card: DataCard, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DitkitError, match=said):
        CaptionJudge(card, **{"num": 8, **options})


def test_samples_of_other_captions_or_shapes_are_refused() -> None:
    judge = CaptionJudge(SCENES, 8)
    with pytest.raises(DitkitError, match="one for each caption"):
        judge(judge.asked.real[:7])
    with pytest.raises(DitkitError, match="other captions"):
        judge(judge.asked.real, judge.told(8)[::-1])


# ---- the verbs


def test_the_bundle_says_how_its_data_were_loaded() -> None:
    assert pipeline().config.data.config == {**WORLD, "length": 8}


def test_the_eval_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline().save_pretrained(tmp_path / "model")
    out = tmp_path / "new" / "eval.json"
    common = [str(tmp_path / "model"), "--num-samples", "10", "--seed", "5", "--batch-size", "4", "--no-progress"]
    assert eval_verb.main([*common, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for said in ("object (held-out pairs)", "frechet *", "biased upwards", "scenes/test, the 10 of the same captions", "averaged to 4 x 4"):
        assert said in text
    data = json.loads(out.read_text())
    assert data["protocol"]["first_seed"] == 5
    assert data["captions"] == CaptionJudge(SCENES, 10).told(10)
    kid = next(s for s in data["scores"] if s["metric"] == "kid")
    assert (kid["extractor"], kid["num_samples"], kid["settings"]["input"]) == ("efficientnet-lite0", 10, "averaged to 4 x 4")
    assert read_record(out.with_suffix(".png"))["num_inference_steps"] == 2
    with pytest.raises(DitkitError, match=r"ends in \.json"):
        eval_verb.main([*common, "--out", str(tmp_path / "eval.txt")])
    with pytest.raises(DitkitError, match="has no captions"):
        eval_verb.main([*common, "--data", "digits"])


def test_a_batch_does_not_change_the_figures() -> None:
    pipe = pipeline()
    judge = CaptionJudge(pipe.config.data, 8)
    whole, parts = (judge(pipe(prompt=judge.told(8), batch_size=n, progress=False).x) for n in (8, 3))
    for metric, value in figures(whole).items():
        assert figures(parts)[metric] == pytest.approx(value, rel=1e-4, abs=1e-6), metric


def test_bench_rows_have_the_asked_for_score_and_the_drift_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditkit.eval.bench.measure_roof", lambda *_, **__: pytest.fail("not timed here"))
    monkeypatch.setattr("ditkit.eval.pipelines.count", lambda *_: None)
    pipe = pipeline()
    judge = CaptionJudge(pipe.config.data, 8)
    setting = Setting(num_images=4, num_samples=8, num_inference_steps=4, repeats=1, warmups=0)
    todo = variants({"base": pipe}, [parse_spec("fora:interval=2")])
    result, samples = compare_pipelines(todo, setting, judge, drift_on=judge.distances.extractors[0], progress=False)
    base, fast = (r.quality for r in result.rows[:2])
    assert base is not None
    assert fast is not None
    assert base["feature drift"].value == pytest.approx(0, abs=1e-12)
    assert fast["feature drift"].reference == "the base's, same seeds"
    assert (fast["feature drift"].value > 1e-12) == (not torch.equal(samples["base"].x, samples["fora:interval=2"].x))
    assert {"object", "frechet", "kid"} <= set(figures(fast))
    text = table(result)
    for said in ("feat. drift", "KID x 1000", "object %", "between different pictures", "efficientnet-lite0 (averaged to 4 x 4)"):
        assert said in text


def test_bench_without_real_data_can_still_measure_the_drift(capsys: pytest.CaptureFixture[str]) -> None:
    args = bench_verb.Args(("x",), num_samples=8, num_images=4, features=("efficientnet-lite0",))
    pipe = pipeline()
    lost = pipe.config.model_copy(update={"data": DataCard(name="lost", shape=(3, 16, 16))})
    judge = bench_verb._judge(Pipeline(pipe.model, lost), args)
    assert judge is None
    assert "no data set 'lost'" in capsys.readouterr().err
    assert bench_verb._drift_on(judge, args) is not None
    assert bench_verb._drift_on(judge, bench_verb.Args(("x",))) is None


def test_the_sheet_shows_samples_beside_real_pictures() -> None:
    samples, real = torch.full((5, 3, 4, 4), -1.0), torch.ones(5, 3, 4, 4)
    sheet = caption_grid(["a caption", *["another caption, which is longer than a line is"] * 4], samples, real, most=5, columns=3)
    pixels = np.asarray(sheet.convert("L"))
    assert (pixels == 0).sum() >= 5 * 96 * 96  # five black squares, and letters
    assert pixels.shape[0] > 2 * 96
    assert sheet.mode == "RGB"
