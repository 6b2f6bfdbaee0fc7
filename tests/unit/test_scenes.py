"""The scenes world: pure, exact, legible, bounded."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import tracemalloc
import unicodedata
from collections import Counter

import numpy as np
import pytest

from ditkit import data
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.data import glyphs, scenes
from ditkit.data.scene_random import Draws
from ditkit.data.scene_text import RELATIONS
from ditkit.data.scene_types import _lab, reach, tones
from ditkit.data.scenes import (
    COLORS,
    GLYPHS,
    Background,
    Scene,
    SceneConfig,
    SceneObject,
    caption,
    describe,
    held_out,
    parse_caption,
    readable,
    render,
    sample_scene,
    scene_from_caption,
)

CROWDED = SceneConfig(num_objects=(4, 6), sizes=(0.28,), overlap=0.6)
THREE = SceneConfig(num_objects=(3, 3), sizes=(0.2, 0.25))


def thing(glyph="square", color="white", **values):
    return SceneObject(glyph=glyph, color=color, **values)


def on(color, *objects):
    return Scene(objects=objects, background=Background(color=color))


# ---- glyphs


@pytest.mark.parametrize("style", glyphs.STYLES)
def test_every_glyph_exists_in_its_faces(style):
    from matplotlib.ft2font import FT2Font

    face = FT2Font(glyphs.font_path(style))
    assert [g.char for g in GLYPHS if style in g.styles and face.get_char_index(ord(g.char)) == 0] == []


@pytest.mark.parametrize("style", glyphs.STYLES)
def test_glyphs_of_a_face_are_pairwise_different_drawings(style):
    size = 40
    drawings = {}
    for g in GLYPHS:
        if style in g.styles:
            # black on nearly white (244, 244, 240): the last channel is the ink
            drawings[g.name] = 240 - render(on("white", thing(g.name, "black", style=style, size=0.3)), size).image[..., 2].astype(float)
    for (a, pa), (b, pb) in itertools.combinations(drawings.items(), 2):
        assert np.abs(pa - pb).sum() / max(pa.sum(), pb.sum()) > 0.1, (a, b)


def test_glyphs_are_eighty_with_unique_names_made_of_their_unicode_name():
    assert len(GLYPHS) == 80
    assert len({g.name.lower() for g in GLYPHS}) == len({g.char for g in GLYPHS}) == 80
    names = {g.char: g.name for g in GLYPHS}
    known = {"♞": "chess knight", "♥": "heart", "A": "letter A", "7": "digit 7", "⬅": "left arrow", "☀": "sun", "■": "square"}
    assert {char: names[char] for char in known} == known
    spoken = set(glyphs._SPOKEN)
    for g in GLYPHS:
        if g.char not in spoken and g.group not in ("letters", "digits", "arrows"):
            assert set(g.name.split()) <= set(unicodedata.name(g.char).lower().split()), g


def test_every_glyph_keeps_visible_pixels_at_the_smallest_size():
    smallest = min(SceneConfig().sizes)
    for g in GLYPHS:
        for style in g.styles:
            shown = render(on("white", thing(g.name, "black", style=style, size=smallest)), 32)
            assert shown.masks[0].sum() >= 12, (g.name, style)


def test_longer_side_of_the_ink_is_the_size():
    for g in GLYPHS:
        for style in g.styles:
            ink = glyphs.coverage(g.name, style, 96, 0)
            assert abs(max(ink.shape) - 96) <= 2, (g.name, style, ink.shape)


def test_rotation_is_counter_clockwise_and_inside_the_reach():
    right = glyphs.coverage("right arrow", "sans", 80, 0).astype(int)
    up = glyphs.coverage("right arrow", "sans", 80, 90).astype(int)
    assert np.abs(np.rot90(right)[: up.shape[0], : up.shape[1]] - up).mean() < 4
    for g, degrees in itertools.product(GLYPHS[::7], (-15, 5, 45)):
        ink = glyphs.coverage(g.name, "sans", 80, degrees)
        assert max(ink.shape) <= 2 * reach(80, degrees) + 2


def test_cache_is_bounded_and_keeps_the_most_recent():
    cache, made = glyphs.BoundedCache(max_bytes=1000), []

    def make(key):
        return cache.get(key, lambda: made.append(key) or np.zeros(300, np.uint8))

    for key in (1, 2, 3, 1, 4):
        make(key)
        assert cache.bytes <= 1000
    make(1)
    make(2)
    assert made == [1, 2, 3, 4, 2]


def test_memory_does_not_grow_with_the_number_of_pictures(monkeypatch):
    monkeypatch.setattr(glyphs, "_drawings", glyphs.BoundedCache(max_bytes=200_000))
    split = data.load("scenes", "train", size=32)
    split.batch(np.arange(40))
    tracemalloc.start()
    split.batch(np.arange(20))
    before = tracemalloc.get_traced_memory()[0]
    split.batch(np.arange(1000, 1200))
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert glyphs._drawings.bytes <= 200_000
    assert grown < 400_000


# ---- sampling


def test_philox_stream_is_the_published_one():
    # Random123, known-answer test of philox4x64-10: key and counter of zeros. NumPy counts up before its first block.
    bits = np.random.Philox(key=np.zeros(2, np.uint64), counter=np.full(4, 2**64 - 1, np.uint64))
    assert [hex(int(v)) for v in bits.random_raw(4)] == [
        "0x16554d9eca36314c",
        "0xdb20fe9d672d0fdc",
        "0xd7e772cee186176b",
        "0x7e68b68aec7ba23b",
    ]
    values = Draws(3, 1, 7).uniforms(4000)
    assert 0 <= values.min() < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02


def test_scene_depends_on_seed_split_and_index_only():
    wanted = {i: sample_scene(5, i) for i in (0, 1, 17, 49_999, 2**40)}
    for i in reversed(wanted):
        sample_scene(6, i)
        assert sample_scene(5, i) == wanted[i]
    assert len({s.model_dump_json() for s in wanted.values()}) == len(wanted)
    assert sample_scene(5, 1) != sample_scene(6, 1)
    assert sample_scene(5, 1, "test") != sample_scene(5, 1, "train")


def test_another_process_draws_the_same_pictures():
    code = (
        "import hashlib; from ditkit.data.scenes import *;"
        "print(hashlib.sha256(b''.join(render(sample_scene(1, i), 32).image.tobytes() for i in (9, 3, 4))).hexdigest())"
    )
    hashes = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    here = b"".join(render(sample_scene(1, i), 32).image.tobytes() for i in (9, 3, 4))
    assert hashes == {hashlib.sha256(here).hexdigest() + "\n"}


@pytest.mark.parametrize("config", [SceneConfig(), CROWDED, THREE, SceneConfig(num_objects=(9, 9), sizes=(0.2, 0.3))])
def test_drawn_scenes_pass_validation_and_survive_plain_data(config):
    for i in range(30):
        scene = sample_scene(0, i, "train", config)
        assert Scene.parse(scene.to_dict()) == scene
        assert config.num_objects[0] <= len(scene.objects) <= config.num_objects[1]


def test_held_out_rule_takes_a_tenth_and_leaves_every_glyph_and_colour():
    pairs = scenes.held_out_pairs()
    assert len(pairs) == 64 == len(set(pairs))
    assert all(sum(held_out(g.name, c) for c in COLORS) <= 1 for g in GLYPHS)
    assert all(sum(held_out(g.name, c) for g in GLYPHS) == 8 for c in COLORS)


def test_held_out_pairs_are_never_trained_on_and_are_in_the_test_split():
    def pairs(split, count):
        return [(o.color, o.glyph) for i in range(count) for o in sample_scene(0, i, split).objects]

    held = set(scenes.held_out_pairs())
    train, test, only = pairs("train", 1500), pairs("test", 600), pairs("heldout", 300)
    assert held.isdisjoint(train)
    assert 0.05 < np.mean([p in held for p in test]) < 0.16
    assert held.issuperset(only)
    assert len(set(only)) > 55


def test_objects_stand_out_from_the_background_and_pairs_are_distinct():
    for i in range(200):
        scene = sample_scene(1, i, "test", THREE)
        assert all(readable(o.color, scene.background.color) for o in scene.objects)
        assert len({(o.color, o.glyph) for o in scene.objects}) == len(scene.objects)


def test_nearly_every_pair_of_colour_and_background_is_readable():
    unreadable = {(c, b) for c in COLORS for b in COLORS if c != b and not readable(c, b)}
    assert all(not readable(c, c) for c in COLORS)
    assert len(unreadable) <= 2


def test_colours_are_told_apart():
    lab = {name: _lab(np.array(rgb, dtype=float)) for name, rgb in COLORS.items()}
    assert np.allclose(_lab(np.array([255.0, 0, 0])), [53.24, 80.09, 67.20], atol=0.02)  # sRGB red, D65
    assert min(np.linalg.norm(lab[a] - lab[b]) for a, b in itertools.combinations(lab, 2)) >= 40


def test_objects_stay_inside_and_apart():
    for i in range(100):
        shown = render(sample_scene(2, i, "train", THREE), 64)
        full = [render(shown.scene.model_copy(update={"objects": (o,)}), 64).masks[0] for o in shown.scene.objects]
        assert all(np.array_equal(m, f) for m, f in zip(shown.masks, full))  # nobody hides anybody
        assert shown.boxes.min() >= 0
        assert shown.boxes.max() <= 64


def test_places_are_middles_of_cells_all_of_them_taken_alike_and_change_nothing_else():
    config = SceneConfig(sizes=(0.42,), max_rotation=0, places=8)
    drawn = [sample_scene(0, i, "train", config).objects for i in range(2000)]
    found = Counter(objects[0].position for objects in drawn if len(objects) == 1)
    assert set(found) == {(x / 16, y / 16) for x in range(5, 12, 2) for y in range(5, 12, 2)}
    assert max(found.values()) < 2.5 * min(found.values())
    assert sample_scene(0, 7, "train", SceneConfig()) == sample_scene(0, 7, "train", SceneConfig(places=0))
    quarters = SceneConfig(sizes=(0.42,), max_rotation=0, places=2)
    asked = scene_from_caption("a red heart above a blue cloud on a green background", 3, quarters)
    assert [o.position[1] for o in asked.objects] == [0.25, 0.75]
    assert {o.position[0] for o in asked.objects} < {0.25, 0.75}


def test_centred_objects_keep_their_distance_and_stay_inside_and_the_caption_still_holds():
    free = SceneConfig(sizes=(0.2, 0.36, 0.42), num_objects=(1, 2))
    for i in range(200):
        drawn, moved = sample_scene(4, i, "train", free), sample_scene(4, i, "train", free.model_copy(update={"centred": True}))
        assert caption(drawn) == caption(moved)
        for axis in (0, 1):
            low, high = (f(o.position[axis] + s * o.reach for o in moved.objects) for f, s in ((min, -1), (max, 1)))
            assert low + high == pytest.approx(1)
            assert low >= -1e-9
            steps = {round(m.position[axis] - o.position[axis], 9) for o, m in zip(drawn.objects, moved.objects)}
            assert len(steps) == 1


def test_centred_quarters_leave_one_picture_a_caption():
    config = SceneConfig(sizes=(0.42,), max_rotation=0, places=2, centred=True, textures=("plain",), styles=("sans",))
    seen = {}
    for i in range(500):
        scene = sample_scene(0, i, "train", config)
        relation = next((r for r in RELATIONS if f" {r} " in caption(scene)), "one")
        seen.setdefault(relation, set()).add(tuple(o.position for o in scene.objects))
    assert {relation: len(found) for relation, found in seen.items()} == dict.fromkeys(("one", *RELATIONS), 1)


# ---- pixels


def test_masks_are_the_difference_of_renders_with_and_without_the_object():
    """Object k white, all others black, before a black square: the picture is 255 v_k, and v_k > 1/2 means 128 or more."""
    for i in range(25):
        drawn = sample_scene(3, i, "train", CROWDED)
        shown = render(drawn, 48)
        for k in range(len(drawn.objects)):
            painted = [o.model_copy(update={"color": "white" if j == k else "black"}) for j, o in enumerate(drawn.objects)]
            scene = on("black", *painted, thing("square", "black", size=1.0, depth=99))
            without = render(scene.without(k), 48).image
            black = without.max(2) == 0
            difference = render(scene, 48).image[..., 0].astype(int) - without[..., 0]
            assert black.mean() > 0.9
            assert np.array_equal((difference >= 128)[black], shown.masks[k][black])


def test_coloured_pictures_change_only_where_the_object_is():
    for i in range(40):
        scene = sample_scene(4, i)
        shown = render(scene, 64)
        for k, mask in enumerate(shown.masks):
            without = render(scene.without(k), 64).image.astype(int)
            changed = np.abs(shown.image - without).max(2) > 0
            assert np.all(changed[mask])
            ys, xs = np.nonzero(changed)
            x0, y0, x1, y1 = shown.boxes[k]
            assert x0 - 2 <= xs.min() <= xs.max() <= x1 + 1  # one pixel of antialiasing, one where a thin end fades
            assert y0 - 2 <= ys.min() <= ys.max() <= y1 + 1


def test_boxes_are_the_tight_bounds_of_the_masks():
    for i in range(60):
        shown = render(sample_scene(5, i, "train", CROWDED), 64)
        for mask, box in zip(shown.masks, shown.boxes):
            ys, xs = np.nonzero(mask)
            wanted = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0, 0, 0, 0]
            assert box.tolist() == wanted


def test_masks_are_disjoint():
    for i in range(60):
        assert render(sample_scene(6, i, "train", CROWDED), 64).masks.sum(0).max() <= 1


def test_nearer_objects_hide_farther_ones():
    near, far = thing("circle", "red", size=0.5, depth=0), thing("square", "blue", size=0.8, depth=1)
    for objects in ((near, far), (far, near)):  # caption order does not matter
        shown = render(on("white", *objects), 64)
        red, blue = shown.masks[objects.index(near)], shown.masks[objects.index(far)]
        assert shown.image[32, 32].tolist() == list(COLORS["red"])
        assert red[32, 32]
        assert not blue[32, 32]
        assert np.array_equal(red, render(on("white", near), 64).masks[0])
        assert shown.front_to_back == [objects.index(near), objects.index(far)]
    hidden = render(on("white", thing("square", "red", size=0.8), thing("circle", "blue", size=0.2, depth=1)), 64)
    assert hidden.masks[1].sum() == 0
    assert hidden.boxes[1].tolist() == [0, 0, 0, 0]


def test_antialiasing_keeps_the_area_at_every_size():
    scene = on("white", thing("circle", "black", size=0.5))
    shares = [render(scene, size).masks[0].mean() for size in (32, 64, 128, 512)]
    assert np.allclose(shares, np.pi / 16, rtol=0.05)
    inks = [(244 - render(scene, size).image[..., 0].astype(float)).sum() / 244 / size**2 for size in (32, 64, 512)]
    assert np.allclose(inks, np.pi / 16, rtol=0.02)


def test_objects_cut_by_the_border_or_outside_leave_exact_masks():
    whole = render(on("white", thing("heart", "red", size=0.5)), 64).masks[0]
    cut = render(on("white", thing("heart", "red", size=0.5, position=(0.0, 0.5))), 64)
    assert np.array_equal(cut.masks[0][:, :32], whole[:, 32:])
    assert cut.masks[0][:, 32:].sum() == 0
    gone = render(on("white", thing("heart", "red", position=(-3.0, 9.0))), 64)
    assert gone.masks.sum() == 0
    assert np.array_equal(gone.image, render(on("white"), 64).image)


def test_frames_move_by_velocity():
    scene = on("white", thing("star", "blue", size=0.3, position=(0.25, 0.75), velocity=(1 / 16, -1 / 32)))
    first = render(scene, 64, frame=0)
    for frame in (1, 2, 5):
        moved = render(scene, 64, frame=frame)
        assert np.array_equal(moved.image, np.roll(first.image, (-2 * frame, 4 * frame), axis=(0, 1)))
        assert np.array_equal(moved.boxes[0] - first.boxes[0], frame * np.array([4, -2, 4, -2]))


def test_drawn_videos_stay_inside_and_within_the_speed():
    config = SceneConfig(num_frames=8, speed=0.04)
    moved = 0.0
    for i in range(40):
        scene = sample_scene(0, i, "train", config)
        for o in scene.objects:
            moved += max(map(abs, o.velocity))
            assert max(map(abs, o.velocity)) <= 0.04
            for frame in range(8):
                assert all(o.reach - 1e-9 <= p <= 1 - o.reach + 1e-9 for p in o.position_at(frame))
    assert moved > 0


@pytest.mark.parametrize("texture", scenes.TEXTURES)
@pytest.mark.parametrize("color", COLORS)
def test_textures_keep_between_their_two_tones_and_their_size(color, texture):
    light, dark = tones(color)
    ground = Background(color=color, texture=texture, scale=4, angle=45, seed=3)
    big, small = (render(Scene(objects=(), background=ground), size).image.astype(float) for size in (128, 32))
    assert np.all(big <= light + 0.51)
    assert np.all(big >= dark - 0.51)
    averaged = big.reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(averaged - small).mean() < 2.5  # the same picture at another size
    assert (big.std((0, 1)).max() > 1) == (texture != "plain")


# ---- words


def test_captions_parse_back_to_the_scene():
    for config, split in itertools.product((SceneConfig(), CROWDED, THREE), ("train", "test", "heldout")):
        for i in range(60):
            scene = sample_scene(7, i, split, config)
            said = parse_caption(caption(scene))
            assert said == describe(scene) == parse_caption(caption(scene).upper() + " ")
            assert said.objects == tuple((o.color, o.glyph) for o in scene.objects)
            assert said.background == (scene.background.texture, scene.background.color)


@pytest.mark.parametrize(
    "text",
    [
        "a red chess knight above a blue heart on a green background",
        "an orange letter A on a striped white background",
        "a red heart left of a blue star, which is below a white moon, on a shaded black background",
        "a red heart and a blue star on a plain green background",
        "a red hammer and pick, a blue star and a white moon on a green background",
        "an orange background",
    ],
)
def test_captions_of_every_form(text):
    assert str(parse_caption(text)) == text.replace("plain ", "")


@pytest.mark.parametrize("size", [32, 64])
def test_relations_hold_in_the_rendered_boxes(size):
    seen = set()
    for config in (SceneConfig(num_objects=(2, 2)), THREE):
        for i in range(150):
            shown = render(sample_scene(8, i, "test", config), size)
            boxes = shown.boxes
            for k, said in enumerate(describe(shown.scene).relations):
                seen.add(said)
                (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = boxes[k], boxes[k + 1]
                holds = {"left of": ax1 <= bx0, "right of": bx1 <= ax0, "above": ay1 <= by0, "below": by1 <= ay0}
                assert holds[said], (i, shown.caption)
    assert seen == set(scenes.RELATIONS)


def test_two_drawn_objects_have_a_clear_relation_and_all_four_are_as_frequent():
    counts = dict.fromkeys(scenes.RELATIONS, 0)
    for i in range(600):
        said = describe(sample_scene(9, i, "train", SceneConfig(num_objects=(2, 2)))).relations
        counts[said[0]] += 1
    assert min(counts.values()) > 110
    assert max(counts.values()) < 190


def test_relation_changes_with_the_frame():
    scene = on("white", thing("star", "blue", position=(0.2, 0.5), size=0.2, velocity=(0.1, 0)), thing("heart", "red", size=0.2, depth=1))
    assert caption(scene) == "a blue star left of a red heart on a white background"
    assert caption(scene, frame=3) == "a blue star and a red heart on a white background"
    assert caption(scene, frame=6) == "a blue star right of a red heart on a white background"


@pytest.mark.parametrize("seed", range(3))
def test_scene_from_caption_says_what_it_was_given(seed):
    for i in range(15):
        text = caption(sample_scene(10, i, "heldout"))
        assert caption(scene_from_caption(text, seed)) == text
    text = "a red heart left of a blue star, which is below a white moon, on a shaded black background"
    assert caption(scene_from_caption(text, seed, THREE)) == text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a rad heart on a blue background", "'red'"),
        ("a red haert on a blue background", "'heart'"),
        ("a red heart on a blue", "does not parse"),
        ("", "does not parse"),
        ("a red heart on a red background", "cannot be read"),
        ("a red heart above a blue star and a black moon on a white background", "relates some"),
        ("a red heart above a red heart above a red heart on a white background", "does not parse|no placement"),
    ],
)
def test_captions_that_cannot_be_drawn_are_refused_by_name(text, named):
    with pytest.raises(DitkitError, match=named):
        scene_from_caption(text)


# ---- loading and refusing


def test_dataset_contract():
    train = data.load("scenes", "train", size=32)
    assert (len(train), len(data.load("scenes", "test", size=32))) == (50_000, 2_000)
    assert train.shape == (3, 32, 32)
    assert train.num_classes == len(train.labels) == 80
    indices = np.array([49_999, 0, 123, 0])
    batch = train.batch(indices)
    assert batch["x"].shape == (4, 3, 32, 32)
    assert str(batch["x"].dtype) == "torch.float32"
    assert str(batch["y"].dtype) == "torch.int64"
    assert -1 <= batch["x"].min() < batch["x"].max() <= 1
    assert batch["x"][1].equal(batch["x"][3])
    assert train.batch(indices[2:3])["x"][0].equal(batch["x"][2])
    shown = train.rendered(indices)
    assert train.captions(indices) == [s.caption for s in shown]
    for k, s in enumerate(shown):
        assert np.array_equal(np.rint((batch["x"][k].numpy() + 1) * 127.5), s.image.transpose(2, 0, 1))
        assert train.labels[batch["y"][k]] == s.attributes[0]["glyph"]


def test_load_options():
    small = data.load(
        "scenes", "test", size=16, length=5, seed=4, held_out_only=True, groups=["chess", "suits"], colors=("red", "blue", "black")
    )
    assert len(small) == 5
    assert small.num_classes == 10
    for scene in map(small.scene, range(5)):
        assert all(held_out(o.glyph, o.color) for o in scene.objects)
    with pytest.raises(DitkitError, match="allowed: 0 to 4"):
        small.batch(np.array([5]))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": 4}, "size is 4"),
        ({"length": 0}, "length is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"nobjects": 2}, "nobjects"),
        ({"groups": ("chess", "animals")}, "animals"),
        ({"num_objects": (0, 2)}, "num_objects"),
        ({"num_objects": (1, 9), "sizes": (0.4,)}, "9 objects need"),
        ({"sizes": (0.9,)}, "sizes"),
        ({"colors": ("pink",)}, "pink"),
        ({"held_out_only": True}, "held_out_only"),
        ({"colors": ("red",), "backgrounds": ("red",)}, "no background"),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(DitkitError, match=named):
        data.load("scenes", "train", **options)


def test_wrong_scenes_are_named():
    with pytest.raises(ConfigError, match="chess knight"):
        thing("chess nite")
    with pytest.raises(ConfigError, match="sans"):
        thing("heart", style="serif")
    with pytest.raises(ConfigError, match="share a depth"):
        on("white", thing(), thing("heart", "red"))
    with pytest.raises(DitkitError, match="split 'val'"):
        sample_scene(0, 0, "val")
    with pytest.raises(DitkitError, match="index"):
        sample_scene(0, -1)


def test_no_torch_and_no_matplotlib_to_describe_scenes():
    code = (
        "import sys; from ditkit.data.scenes import *; print(caption(sample_scene(0, 0)), file=sys.stderr);"
        "sys.exit(sorted({'torch', 'matplotlib'} & set(sys.modules)) != [])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
