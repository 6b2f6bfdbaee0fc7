"""The report: one file that needs nothing else, says what was measured, escapes what it is given. Charts put points where they belong."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ditkit.data import load
from ditkit.demo import available, demo, history
from ditkit.eval import features
from ditkit.eval.bench import BenchResult, Row, Timing
from ditkit.eval.charts import Axis, Series, chart, nice_ticks
from ditkit.eval.drift import Drift
from ditkit.eval.features import LabelReader, PixelPCA, everything, extractor, fit_classifier
from ditkit.eval.pipelines import Setting
from ditkit.eval.quality import Judge, Quality, Score
from ditkit.eval.report import History, Story, fastest, page, picture_uri, thin, verdict, write_report
from ditkit.eval.roof import machine
from ditkit.eval.table import quality_table
from ditkit.train.recipe import Recipe, load_recipe


def score(value: float, spread: float = 0.1, metric: str = "frechet") -> Score:
    return Score(metric, value, value - spread, value + spread, 0.37, "pca64", 360, "digits/train, 1437 samples", {})


def row(name: str, ms: float, frechet: float, **changes: Any) -> Row:
    values: dict[str, Any] = dict(
        name=name,
        methods=(),
        num_inference_steps=25,
        equal_time_to=(),
        items=20,
        seconds=Timing(ms / 1e3, ms / 1e3, ms / 1e3, ms / 1e3, 5, 1.0),
        speedup=10 / ms,
        macs=1e9,
        flops=2e9,
        parameters=1_600_000,
        weight_bytes=6_400_000,
        activation_bytes=2_300_000,
        peak_memory_bytes=None,
        drift=Drift(30.0, 25.0, 0.05, 0.3, 40),
        quality=Quality((score(frechet), score(0.95, 0.02, "label agreement"))),
        floor_seconds=1e-3,
        ratio_to_floor=ms,
        shapes_seconds=2e-3,
        notes=(),
    )
    return Row(**{**values, **changes})


def result(*rows: Row) -> BenchResult:
    protocol = {"repeats": 5, "warmups": 1, "order": "interleaved", "device": "cpu", "dtype": "float32"}
    return BenchResult("demo", "2026-01-01", machine(), "abc", "ditkit demo", protocol, 0.1, 0.2, None, rows)


ROWS = (
    row("digits", 10, 0.8),
    row("fora:interval=2", 6, 0.9, methods=("fora",), notes=("fora: 12 hits",)),
    row("digits, 15 steps", 6, 0.95, num_inference_steps=15, equal_time_to=("fora:interval=2",)),
)


def story(**changes: Any) -> Story:
    x, labels = torch.rand(40, 1, 8, 8) * 2 - 1, torch.arange(40) % 10
    png = io.BytesIO()
    Image.new("L", (8, 8)).save(png, "PNG")
    values: dict[str, Any] = dict(
        title="A title",
        data="digits",
        classes=[str(i) for i in range(10)],
        history=History([(1, 1.5), (100, 0.5)], [(50, 0.7, 0.9), (100, 0.5, 0.45)], [(100, png.getvalue())], 95.0, 100),
        result=result(*ROWS),
        samples={r.name: x for r in ROWS},
        labels=labels,
        real=x,
        real_labels=labels,
        settings={"network": "dit"},
        next_steps=("ditkit sample runs/demo",),
    )
    return Story(**{**values, **changes})


class Page(HTMLParser):
    """Collects text and attributes; complains about tags that do not match."""

    VOID = {"meta", "img", "br", "line", "circle", "path"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# ---- the page


def test_the_page_is_whole_and_needs_no_network() -> None:
    html = page(story())
    found = Page(html)
    assert found.sources
    assert all(s.startswith("data:image/png;base64,") for s in found.sources)
    assert not re.search(r"<script|@import|url\(", html)
    assert "http" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    for source in found.sources:
        Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).verify()


def test_the_page_says_what_was_measured() -> None:
    text = Page(page(story())).text
    m = machine()
    for wanted in (
        "1 min 35 s",
        "95.0 %",
        "0.80",
        "held-out real data",
        "fora:interval=2",
        "equal time to fora:interval=2",
        "1.67x",
        "GMACs",
        "360 samples against digits/train, 1437 samples",
        m.cpu,
        m.torch,
        "busy with other work",
        "fora: 12 hits",
        "ditkit sample runs/demo",
    ):
        assert wanted in text, wanted


def test_text_from_outside_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    rows = (row(evil, 10, 0.8, notes=(evil,)), row("b", 5, 0.8, methods=("m",)))
    html = page(
        story(title=evil, data=evil, result=result(*rows), samples={r.name: torch.zeros(40, 1, 8, 8) for r in rows}, settings={evil: evil})
    )
    assert "<script" not in html
    Page(html)


def test_a_page_without_training_and_without_real_data() -> None:
    rows = (row("a", 10, 0, quality=None), row("b", 5, 0, quality=None, methods=("m",)))
    Page(page(story(history=None, result=result(*rows), samples={r.name: torch.zeros(40, 3, 8, 8) for r in rows})))


def test_a_busy_machine_is_said() -> None:
    busy = replace(result(*ROWS), others_before=99.0)
    assert "do not trust the times" in Page(page(story(result=busy))).text


def test_the_file_is_written(tmp_path: Path) -> None:
    told = story()
    path = write_report(tmp_path / "new" / "report.html", told)
    assert path.read_text(encoding="utf-8") == page(told)


# ---- what it concludes


@pytest.mark.parametrize(
    ("mine", "theirs", "words"), [(0.5, 0.9, "better than"), (0.9, 0.5, "worse than"), (0.8, 0.9, "no difference that 360")]
)
def test_verdicts_follow_the_intervals(mine: float, theirs: float, words: str) -> None:
    rows = (row("a", 10, 0.8), row("fast", 5, mine), row("a, 12 steps", 5, theirs, equal_time_to=("fast",)))
    assert words in verdict(rows[1], rows)
    assert verdict(rows[0], rows) == ""


def test_the_fastest_is_no_rival_and_no_loss() -> None:
    assert fastest(ROWS).name == "fora:interval=2"  # type: ignore[union-attr]
    assert fastest((row("a", 10, 0.8), row("slow", 20, 0.8), row("a, 5 steps", 1, 0.8, equal_time_to=("slow",)))) is None


# ---- pictures and charts


def test_pictures_keep_their_pixels() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 7.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    data = base64.b64decode(picture_uri(x, columns=3, zoom=2, gap=1).split(",")[1])
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert pixels.shape == ((2 * 2 + 1) * 2, (3 * 2 + 2) * 2, 4)
    assert [tuple(pixels[1, i]) for i in (1, 7, 13)] == [(0, 0, 0, 255), (128, 128, 128, 255), (255, 255, 255, 255)]
    assert tuple(pixels[7, 1]) == (255, 255, 255, 255)  # clipped
    assert pixels[1, 4, 3] == 0  # a gap


def test_points_of_a_chart_stand_in_order() -> None:
    svg = chart([Series("a", [(0, 1), (5, 2), (10, 4)], "s1")], Axis("x"), Axis("y"), "t")
    path = re.search(r'class="line s1" d="([^"]+)"', svg)
    assert path
    places = [tuple(map(float, p.split())) for p in re.split("[ML]", path[1]) if p.strip()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert 2 * (y0 - y1) == pytest.approx(y1 - y2, abs=0.3)  # up is less in SVG
    log = chart([Series("a", [(0, 1), (5, 2), (10, 4)], "s1")], Axis("x"), Axis("y", log=True), "t")
    path = re.search(r'class="line s1" d="([^"]+)"', log)
    assert path
    ys = [float(p.split()[1]) for p in re.split("[ML]", path[1]) if p.strip()]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)


def test_a_chart_of_one_point_and_of_equal_values() -> None:
    for points in ([(1.0, 2.0)], [(1.0, 2.0), (3.0, 2.0)]):
        assert "nan" not in chart([Series("a", points, "s1", marks=True)], Axis("x"), Axis("y"), "t")


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.42, [0.2, 0.3, 0.4]), (-1, 1, [-1, -0.5, 0, 0.5, 1])]
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks) or set(np.round(ticks, 9)) <= set(np.round(nice_ticks(low, high), 9))


def test_long_curves_are_thinned_to_means() -> None:
    found = thin([(i, float(i)) for i in range(1000)], most=10)
    assert len(found) == 10
    assert found[0] == (99, pytest.approx(49.5))


# ---- features, label reader, judge


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return *everything(load("digits")), *everything(load("digits", "test"))  # type: ignore[return-value]


def test_pca_equals_scikit_learns() -> None:
    from sklearn.decomposition import PCA

    x, _, test, _ = digits()
    mine, theirs = PixelPCA.fit(x, dim=10), PCA(10, svd_solver="full").fit(x.flatten(1).double().numpy())
    np.testing.assert_allclose(np.abs(mine(test)), np.abs(theirs.transform(test.flatten(1).double().numpy())), atol=1e-9)
    assert (mine.name, mine.dim) == ("pca10", 10)


def test_all_axes_keep_all_distances() -> None:
    """64 axes of 64 pixels only turn the space."""
    x, *_ = digits()
    features = PixelPCA.fit(x)(x[:20])
    pixels = x[:20].flatten(1).double().numpy()
    np.testing.assert_allclose(np.linalg.norm(features[:1] - features, axis=1), np.linalg.norm(pixels[:1] - pixels, axis=1), atol=1e-8)


def test_the_label_reader_reads_real_digits() -> None:
    x, y, test, test_y = digits()
    assert (LabelReader(x, y)(test) == test_y.numpy()).mean() > 0.98


def test_the_classifier_is_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(features, "STEPS", 3)
    x, y, *_ = digits()
    x, y = x[:100], y[:100]
    first = fit_classifier(x, y, 10)
    (file,) = tmp_path.rglob("*.safetensors")
    monkeypatch.setattr(features, "_train", lambda *_: pytest.fail("trained again"))
    again = fit_classifier(x, y, 10)
    np.testing.assert_array_equal(first(x), again(x))
    assert first(x).std(0, ddof=1)[first(x).std(0) > 0.01] == pytest.approx(1, abs=1e-4)
    monkeypatch.setattr(features, "_train", lambda *_: None)
    fit_classifier(x + 0.01, y, 10)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2  # other data, other weights
    file.write_bytes(b"damaged")
    fit_classifier(x, y, 10)
    assert file.stat().st_size > 1000  # made again


def test_an_unknown_extractor_is_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'pca64'"):
        extractor("pca46", *digits()[:2], 10)


def test_every_figure_says_what_it_was_measured_on() -> None:
    judge = Judge("digits", extractors=("pca64",), resamples=10)
    quality = judge(judge.test_x, judge.test_y)
    assert {s.metric for s in quality.scores} == {"frechet", "kid", "precision", "recall", "label agreement"}
    for s in quality.scores:
        assert s.extractor
        assert s.num_samples == 360
        assert s.reference == "digits/train, 1437 samples"
    frechet = quality["frechet"]
    assert frechet.value == frechet.real  # the samples are the held-out data themselves
    assert frechet.low < frechet.value < frechet.high  # type: ignore[operator]
    assert quality["label agreement"].value > 0.98
    noise = judge(torch.rand(360, 1, 8, 8) * 2 - 1, judge.labels(360), full=False)
    assert noise["frechet"].value > 10 * frechet.value
    assert noise["label agreement"].value < 0.4
    text = quality_table(
        quality, {"solver": "euler", "num_inference_steps": 25, "guidance": {"scale": 2.0, "channels": "all"}, "methods": []}
    )
    assert "360 samples (euler, 25 steps, guidance 2 (all)) against digits/train, 1437 samples" in text


def test_a_judge_refuses_what_it_cannot_judge() -> None:
    judge = Judge("digits", extractors=("pca64",), resamples=10)
    with pytest.raises(ValueError, match=r"\(1, 8, 8\)"):
        judge(torch.zeros(100, 3, 8, 8))
    with pytest.raises(ValueError, match="65 or more"):
        judge(torch.rand(60, 1, 8, 8))
    with pytest.raises(ValueError, match="labels of shape"):
        judge(judge.test_x, judge.test_y[:5])


# ---- the demo's own


def test_the_demo_takes_what_the_registry_has() -> None:
    assert [s.text for s in available(["fora:interval=2", "no_such_method+compile", "compile"])] == ["fora:interval=2", "compile"]


def test_the_history_is_read_from_the_log(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.png").write_bytes(b"png")
    lines = [
        '{"event": "train", "step": 10, "loss": 2.0, "images_per_second": 128.0}',
        '{"event": "train", "step": 20, "loss": 1.0, "images_per_second": 640.0}',
        '{"event": "validation", "step": 20, "raw": 1.1, "ema": 1.2}',
        '{"event": "samples", "step": 20, "file": "samples/a.png"}',
        '{"event": "samples", "step": 30, "file": "samples/lost.png"}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    found = history(tmp_path, load_recipe("digits"))  # batches of 128
    assert found.losses == [(10, 2.0), (20, 1.0)]
    assert found.validation == [(20, 1.1, 1.2)]
    assert found.grids == [(20, b"png")]
    assert found.seconds == pytest.approx(10 * 128 / 128 + 10 * 128 / 640)


@pytest.mark.slow
def test_the_demo_from_recipe_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains three steps, samples, accelerates, reports; a second demo takes the trained model as it is."""
    monkeypatch.setenv("DITKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "STEPS", 2)
    values = load_recipe("digits").to_dict()
    values["backbone"]["config"] = {"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
    values["trainer"] |= {"steps": 3, "batch_size": 8, "sample_every": 3, "validate_every": 3, "log_every": 1, "warmup_steps": 1}
    values["sampling"] |= {"num_inference_steps": 3}
    recipe = Recipe.parse(values)
    setting = Setting(num_images=35, num_samples=70, repeats=1, warmups=0)
    done = demo(recipe, tmp_path / "out", name="tiny", setting=setting, accelerations=("fora:interval=2", "nothing"), progress=False)
    text = Page(done.report.read_text(encoding="utf-8")).text
    assert "fora:interval=2" in text
    assert "3 steps" in text
    assert done.result.rows[0].name == "base"
    assert (done.bundle / "manifest.json").is_file()
    assert done.results.parent == tmp_path / "out"
    weights = (done.bundle / "model.safetensors").read_bytes()
    monkeypatch.setattr("ditkit.demo.compare_pipelines", lambda *_, **__: pytest.fail("as far as it should go"))
    with pytest.raises(pytest.fail.Exception):
        demo(recipe, tmp_path / "out", name="tiny", setting=setting, progress=False)
    assert (done.bundle / "model.safetensors").read_bytes() == weights


def test_a_name_stands_on_no_bar_and_no_other_name() -> None:
    points = [(1.0, 5.0), (1.05, 5.0), (1.1, 5.1), (2.0, 4.0)]
    bars = [(5.0, 5.0), (4.7, 5.4), (4.9, 5.3), (3.9, 4.1)]
    labels = ["20 steps, compiled", "FORA", "int8, compiled", "fewer steps"]
    svg = chart([Series("", points, "s1", line=False, bars=bars, labels=labels)], Axis("ms"), Axis("FID"), "t")
    stands = [
        (float(x), float(y1), float(y2))
        for x, y1, y2 in re.findall(r'class="bar s1" x1="([\d.]+)" x2="[\d.]+" y1="([\d.]+)" y2="([\d.]+)"', svg)
    ]
    names = re.findall(r'class="name" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)<', svg)
    assert [(len(stands), len(names))] == [(4, 4)]
    boxes = []
    for x, y, anchor, text in names:
        left = float(x) - (7 * len(text) if anchor == "end" else 0)
        boxes.append((left, left + 7 * len(text), float(y) - 10, float(y)))
    for i, (left, right, top, bottom) in enumerate(boxes):
        assert not any(left < x < right and low > top and high < bottom for x, low, high in stands)
        assert not any(left < r and lo < right and top < b and t < bottom for j, (lo, r, t, b) in enumerate(boxes) if i != j)
