"""Reading scenes: what is scored is known by construction; a reader fitted to a small world reads it."""

from __future__ import annotations

import math

import pytest
import torch

from ditkit.core.errors import DitkitError
from ditkit.data.scenes import Background, Scene, SceneConfig, SceneObject, caption, held_out, sample_scene
from ditkit.eval import scene_fit
from ditkit.eval.scene_reader import SYMBOLS, Attributes, Found, Reading, SceneReader, attribute_scores
from ditkit.eval.scene_scores import holds, match

TEXT = "a red heart left of a blue star on a white background"
HEART, STAR = Found("heart", "red", 0.2, 0.5), Found("star", "blue", 0.8, 0.5)
FEW = SceneConfig(
    groups=("shapes",),
    colors=("red", "blue"),
    backgrounds=("white", "black"),
    styles=("sans",),
    sizes=(0.42,),
    textures=("plain",),
    max_rotation=0,
)


def score(*found, text=TEXT):
    return attribute_scores([Reading(found, "white")], [text])


# ---- scores


@pytest.mark.parametrize(
    ("found", "object_", "color", "relation", "extra"),
    [
        pytest.param([HEART, STAR], 1, 1, 1, 0, id="as asked"),
        pytest.param([STAR, HEART], 1, 1, 1, 0, id="the order of what is found does not matter"),
        pytest.param([Found("heart", "blue", 0.2, 0.5), Found("star", "red", 0.8, 0.5)], 1, 0, 1, 0, id="colours swapped"),
        pytest.param([Found("heart", "red", 0.8, 0.5), Found("star", "blue", 0.2, 0.5)], 1, 1, 0, 0, id="places swapped"),
        pytest.param([Found("heart", "red", 0.5, 0.2), Found("star", "blue", 0.6, 0.8)], 1, 1, 0, 0, id="above instead of left"),
        pytest.param([HEART], 0.5, 0.5, 0, 0, id="one object missing"),
        pytest.param([], 0, 0, 0, 0, id="nothing"),
        pytest.param([HEART, STAR, Found("moon", "green", 0.5, 0.1)], 1, 1, 1, 1, id="an extra object is not judged, but counted"),
        pytest.param([HEART, Found("sun", "blue", 0.8, 0.5)], 0.5, 1, 1, 0, id="wrong glyph, known by its colour"),
        pytest.param([HEART, Found("sun", "green", 0.8, 0.5)], 0.5, 0.5, 0, 0, id="neither glyph nor colour: no relation"),
        pytest.param([Found("sun", "blue", 0.2, 0.5), Found("moon", "red", 0.8, 0.5)], 0, 1, 0, 0, id="told apart by colour alone"),
        pytest.param([HEART, Found("heart", "blue", 0.8, 0.5)], 0.5, 1, 1, 0, id="one glyph twice"),
    ],
)
def test_scores_of_readings_with_known_answers(found, object_, color, relation, extra):
    assert score(*found) == Attributes(object_, color, relation, 1, 2, 1, extra)


def test_scores_add_up_over_captions():
    texts = [TEXT, "a green moon on a black background", "a red sun and a green sun on a white background"]
    readings = [Reading((HEART, STAR), "white"), Reading((Found("moon", "blue", 0.5, 0.5),), "black"), Reading((), "white")]
    assert attribute_scores(readings, texts) == Attributes(3 / 5, 2 / 5, 1, 3, 5, 1, 0)


def test_a_share_of_nothing_is_no_number():
    assert math.isnan(score(HEART, text="a red heart on a white background").relation)


def test_glyphs_decide_a_match_before_colours_and_colours_before_confidence():
    pairs = [("red", "heart"), ("blue", "heart")]
    blue, red, sure = Found("heart", "blue", 0, 0), Found("heart", "red", 1, 1), Found("star", "red", 1, 0, 1.0)
    assert match(pairs, [blue, red, sure]) == [red, blue]
    assert match(pairs, [sure, blue]) == [sure, blue]
    faint = Found("heart", "red", 0, 0, 0.6)
    assert match(pairs[:1], [faint, red]) == [red]
    assert match(pairs, []) == [None, None]


def test_every_relation_has_one_direction():
    middle = Found("star", "blue", 0.5, 0.5)
    places = {"left of": (0.1, 0.6), "right of": (0.9, 0.6), "above": (0.6, 0.1), "below": (0.6, 0.9)}
    for name, place in places.items():
        assert [relation for relation in places if holds(relation, Found("heart", "red", *place), middle)] == [name]


@pytest.mark.parametrize(("readings", "texts"), [([], []), ([Reading((), "white")], []), ([], [TEXT])])
def test_as_many_readings_as_captions(readings, texts):
    with pytest.raises(DitkitError, match="as many readings as captions"):
        attribute_scores(readings, texts)


# ---- from pictures to readings


def ideal(scenes, model):
    """What a perfect network would see."""
    wanted = scene_fit._targets(scenes, model)
    one_hot = [torch.nn.functional.one_hot(t, n).float() for t, n in zip((wanted.glyph, wanted.color, wanted.background), model.parts[2:])]
    return scene_fit.Seen(60 * wanted.thing.float() - 30, wanted.offset, *(100 * t for t in one_hot))


def test_a_perfect_network_gives_perfect_readings():
    reader = SceneReader(SYMBOLS, 32, scene_fit._new(SYMBOLS, 32))
    scenes = [sample_scene(0, i, "test", SYMBOLS) for i in range(200)]
    readings = reader._readings(ideal(scenes, reader.detector))
    scores = attribute_scores(readings, [caption(s) for s in scenes])
    assert (scores.object, scores.color, scores.relation, scores.num_extra) == (1, 1, 1, 0)
    for scene, reading in zip(scenes, readings):
        assert reading.background == scene.background.color
        at = {(f.color, f.glyph): (f.x, f.y) for f in reading.found}
        for thing in scene.objects:
            assert at[thing.color, thing.glyph] == pytest.approx(thing.position, abs=1e-6)


def test_the_reader_is_fitted_to_held_out_pairs_too():
    shown = [scene_fit._training_scene(SYMBOLS, i) for i in range(400)]
    pairs = [held_out(o.glyph, o.color) for scene in shown for o in scene.objects]
    assert 0.05 < sum(pairs) / len(pairs) < 0.15  # a tenth of all pairs
    assert sum(not scene.objects for scene in shown) == 400 / scene_fit.BLANK_EVERY


@pytest.mark.parametrize(("size", "side"), [(16, 16), (24, 16), (32, 32), (64, 32), (100, 32)])
def test_pictures_of_any_size_are_read_on_one_grid(size, side):
    config = FEW
    reader = SceneReader(config, size, scene_fit._new(config, size).eval())
    assert reader.detector.side == scene_fit.reading_side(size) == side
    assert reader.detector(scene_fit.at_reading_side(torch.zeros(1, 3, size, size))).thing.shape == (1, 8, 8)
    assert len(reader.read(torch.zeros(2, 3, size, size))) == 2


def test_blur_keeps_the_mean_of_a_spot_and_widens_it():
    x = torch.zeros(1, 3, 21, 21)
    x[..., 10, 10] = 1
    y = scene_fit.blurred(x, 0.8)
    line = torch.arange(21.0) - 10
    assert y.sum((2, 3)) == pytest.approx(1)
    assert float((y[0, 0].sum(0) * line.square()).sum()) == pytest.approx(0.64, rel=0.01)  # variance sigma^2


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Of three glyphs, fitted in seconds: 80 steps of 16 pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_fit, "BATCH", 16)
        patch.setenv("DITKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        first = SceneReader.load(FEW, num_pictures=80 * 16)
        patch.setattr(scene_fit, "_fit", None)  # a second fit would fail
        second = SceneReader.load(FEW, num_pictures=80 * 16)
    for a, b in zip(first.detector.state_dict().values(), second.detector.state_dict().values()):
        assert torch.equal(a, b)
    return second


def test_a_fitted_reader_reads_real_pictures(reader):
    scores = reader.accuracy(100)
    assert (scores.num_captions, scores.num_extra <= 2) == (100, True)
    assert min(scores.object, scores.color, scores.relation) > 0.85
    spoiled = reader.accuracy(100, noise=0.05, blur=0.5)
    assert min(spoiled.object, spoiled.color, spoiled.relation) > 0.8


def test_where_things_are(reader):
    scene = Scene(
        objects=(SceneObject(glyph="triangle", color="red", size=0.42, position=(0.25, 0.7)),),
        background=Background(color="white"),
    )
    (reading,) = reader.read(scene_fit.pictures([scene], 32))
    (thing,) = reading.found
    assert (thing.glyph, thing.color, reading.background) == ("triangle", "red", "white")
    assert (thing.x, thing.y) == pytest.approx((0.25, 0.7), abs=0.06)


@pytest.mark.parametrize("color", FEW.backgrounds)
def test_a_blank_picture_shows_nothing(reader, color):
    (reading,) = reader.read(scene_fit.pictures([Scene(objects=(), background=Background(color=color))], 32))
    assert reading.found == ()


@pytest.mark.parametrize("x", [torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 64, 64)])
def test_pictures_of_another_shape_are_refused(reader, x):
    with pytest.raises(DitkitError, match=r"\(B, 3, 32, 32\)"):
        reader.read(x)


def test_values_that_are_not_finite_are_refused(reader):
    with pytest.raises(DitkitError, match="not finite"):
        reader.read(torch.full((1, 3, 32, 32), math.nan))


def test_numbers_out_of_range_are_refused(reader):
    with pytest.raises(DitkitError, match="num is 0"):
        reader.accuracy(0)
    with pytest.raises(DitkitError, match="was fitted"):
        reader.accuracy(1, seed=scene_fit.FIT_SEED)
    with pytest.raises(DitkitError, match="size is 8"):
        SceneReader.load(FEW, 8)
    with pytest.raises(DitkitError, match="num_pictures is 0"):
        SceneReader.load(FEW, num_pictures=0)


def test_a_damaged_file_in_the_cache_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("DITKIT_CACHE", str(tmp_path))
    before = SceneReader.load(FEW, 16, num_pictures=1)
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    after = SceneReader.load(FEW, 16, num_pictures=1)
    assert path.read_bytes() == whole
    assert torch.equal(before.detector.head.weight, after.detector.head.weight)
