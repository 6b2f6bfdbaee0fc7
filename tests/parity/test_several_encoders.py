"""Several text encoders for one network: their limits, masks, cache and training, and one error for each wrong folder."""

import shutil

import numpy as np
import pytest
import tiny_text
import torch

from ditkit.conditioning import encoder_from, network_inputs
from ditkit.conditioning.cache import TextCache
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.diffusion.guidance import Guidance
from ditkit.interop.convert import convert
from ditkit.pipeline import Pipeline
from ditkit.train.build import build
from ditkit.train.recipe import Recipe

PROMPTS = ["a red heart on a blue circle", "blue"]
KINDS = {"sd3": tiny_text.sd3, "flux": tiny_text.flux, "hunyuan": tiny_text.hunyuan}
SHORT = {"clip_length": 10, "max_length": 12}
FOLDERS = {
    "sd3": ("text_encoder", "text_encoder_3"),
    "flux": ("text_encoder", "text_encoder_2"),
    "hunyuan": ("text_encoder", "text_encoder_2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a pipeline, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tiny_text.saved(tiny_text.made(KINDS[kind]), tmp_path_factory.mktemp(kind) / "pipe")
        return made[kind]

    return make


def encoder(path, kind, **values):
    return encoder_from(kind, {"path": str(path), **SHORT, **values})


@pytest.mark.parametrize(("kind", "who"), [("sd3", "CLIP-L"), ("flux", "CLIP"), ("hunyuan", "CLIP")])
def test_each_encoder_has_its_own_limit(folder, kind, who):
    """The long prompt has 9 tokens for CLIP, 8 for T5. Cut, it is what it would be if it were written shorter."""
    for values, title, tokens, limit in (({"clip_length": 8}, who, 9, 8), ({"max_length": 7}, "T5", 8, 7)):
        text = encoder(folder(kind), kind, **values)
        with pytest.raises(DitkitError, match=f"circle' has {tokens} tokens for {title}; allowed: at most {limit}.*long_prompts"):
            text.encode(PROMPTS)
        assert text.tokenize(PROMPTS, "truncate").truncated == 1
        assert text.tokenize(PROMPTS[1:]).truncated == 0
    text = encoder(folder(kind), kind, clip_length=8, max_length=7)
    cut, explicit = text.encode(PROMPTS, "truncate"), text.encode(["a red heart on a blue"])
    assert all(u is None or torch.allclose(u[:1].float(), v.float(), atol=1e-6) for u, v in zip(cut, explicit))


def test_where_masked_the_padding_does_not_count(folder):
    """Hunyuan-DiT: each encoder's states, at 10 and 40 places. SD3, where it is told to mask: the picture."""
    short, long = (encoder(folder("hunyuan"), "hunyuan", clip_length=n, max_length=n).encode(PROMPTS) for n in (10, 40))
    for states, mask in (("states", "mask"), ("t5", "t5_mask")):
        assert getattr(short, mask).sum() == getattr(long, mask).sum() == {"mask": 12, "t5_mask": 10}[mask]
        a, b = (getattr(u, states)[getattr(u, mask)] for u in (short, long))
        assert (a - b).abs().max() <= 1e-5
    found = []
    for n in (10, 40):
        text = encoder(folder("sd3"), "sd3", clip_length=n, max_length=n, masked=True)
        pipe = Pipeline.from_pretrained(folder("sd3"), device="cpu", text_encoder=text)
        found.append(pipe(prompt=PROMPTS, num_inference_steps=2, progress=False).x)
    assert (found[0] - found[1]).abs().max() <= 1e-5


@pytest.mark.parametrize(("kind", "values"), [("sd3", {}), ("sd3", {"masked": True}), ("flux", {}), ("hunyuan", {})], ids=str)
def test_the_cache_holds_all_that_they_say(folder, tmp_path, kind, values):
    path = shutil.copytree(folder(kind), tmp_path / "pipe")
    text = encoder(path, kind, **values)
    want = text.encode(PROMPTS[::-1])
    for asked in (2, 0):
        cache = TextCache(text, tmp_path / "cache")
        got = cache.encode(PROMPTS[::-1])
        assert cache.encoded == asked
        for mine, value in zip(got, want):
            assert (mine is None) == (value is None)
            assert mine is None or (mine.float() - value.float()).abs().max() <= 1e-6
    for part in FOLDERS[kind]:
        weights = path / part / "model.safetensors"
        weights.write_bytes(weights.read_bytes() + b"x")
        assert PROMPTS[0] not in TextCache(encoder(path, kind, **values), tmp_path / "cache")


def test_a_bundle_knows_its_encoders_again(folder, tmp_path):
    """Saved, converted, moved: the same pictures. Others in their place are refused where the hash is known."""
    path = shutil.copytree(folder("flux"), tmp_path / "pipe")
    pipe = Pipeline.from_pretrained(path, device="cpu")
    call = dict(prompt=PROMPTS, num_inference_steps=2, progress=False)
    want = pipe(**call).x
    pipe.save_pretrained(tmp_path / "a")
    convert(path, tmp_path / "b")
    for bundle in ("a", "b"):
        assert torch.equal(Pipeline.from_pretrained(tmp_path / bundle, device="cpu")(**call).x, want)
    path.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"there is no T5 in .*pipe.*text_encoder_2/config.json.*text_encoder=FOLDER"):
        Pipeline.from_pretrained(tmp_path / "a", device="cpu")(**call)
    moved = Pipeline.from_pretrained(tmp_path / "a", device="cpu", text_encoder=tmp_path / "moved")
    assert torch.equal(moved(**call).x, want)
    half = Pipeline.from_pretrained(tmp_path / "moved", device="cpu", dtype="bfloat16")
    assert half.encoder.config.dtype == "bfloat16"
    assert moved.encoder.config.dtype == "float32"
    moved.encoder.expected_hash = moved.encoder.content_hash()
    other = encoder(folder("flux"), "flux")
    other.expected_hash = moved.encoder.expected_hash
    with pytest.raises(ConfigError, match="is not the one that the network was trained with"):
        other.encode(PROMPTS)


def test_wrong_folders_are_one_error(folder, tmp_path):
    flux, sd3 = folder("flux"), folder("sd3")
    cases = [
        (
            "flux",
            flux,
            {"clip": "text_encoder_2"},
            r"text_encoder_2.config.json describes t5, and CLIP is read from there; allowed: clip_text",
        ),
        ("flux", flux, {"t5": "text_encoder"}, "describes clip_text_model, and T5 is read from there; allowed: t5"),
        ("flux", flux, {"t5": "text_encoder_9"}, "there is no T5 in .*; allowed: .*text_encoder_9/config.json; next: check the path"),
        ("sd3", flux, {"clip_2": "text_encoder", "t5": None}, "lacks text_projection.weight of a CLIPTextModelWithProjection"),
        ("hunyuan", flux, {}, "describes clip_text_model, and CLIP is read from there; allowed: bert"),
    ]
    for kind, path, values, words in cases:
        with pytest.raises(DitkitError, match=words):
            encoder(path, kind, **values).encode(PROMPTS)
    with pytest.raises(ConfigError, match="both CLIPs are 14 wide, side by side; allowed: at most 13, T5's width"):
        _ = encoder(sd3, "sd3", t5=None, dim=13).dim
    for kind, text, words in (
        ("flux", encoder(folder("hunyuan"), "hunyuan"), "states have width 24; allowed: 20, the text_dim of flux"),
        ("hunyuan", encoder(flux, "flux"), "states have width 20; allowed: 24, the text_dim of hunyuan"),
        (
            "hunyuan",
            encoder(folder("hunyuan"), "hunyuan"),
            "text_length is 10; allowed: 77, the text_length of hunyuan; next: set its lengths",
        ),
    ):
        with pytest.raises(DitkitError, match=words):
            Pipeline.from_pretrained(folder(kind), device="cpu", text_encoder=text)(prompt=PROMPTS, progress=False)
    shutil.copytree(flux, tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "text_encoder_2")
    with pytest.raises(ConfigError, match=r"there is no T5 in .*text_encoder_2"):
        Pipeline.from_pretrained(tmp_path / "x", device="cpu")(prompt="a", progress=False)


SHAPES = {
    "mmdit": ("sd3", {"dim": 24, "depth": 1, "num_heads": 2, "position_size": 8}),
    "flux": ("flux", {"dim": 24, "depth": 1, "single_depth": 1, "num_heads": 2, "rope_widths": [4, 4, 4], "guidance": None}),
    "hunyuan": ("hunyuan", {"dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "pooled_dim": 6}),
}


@pytest.mark.parametrize("backbone", SHAPES)
def test_training_on_captions(folder, tmp_path, monkeypatch, backbone):
    """Widths and lengths of the network follow; a batch is what the encoders say of its captions; the bundle knows which they were."""
    monkeypatch.setenv("DITKIT_CACHE", str(tmp_path))
    kind, shape = SHAPES[backbone]
    lengths = {"clip_length": 32, "max_length": 32}
    recipe = Recipe.parse(
        {
            "backbone": {"name": backbone, "config": {"patch_size": 8, **shape}},
            "encoder": {"name": kind, "config": {"path": str(folder(kind)), **lengths}},
            "data": {"name": "scenes", "config": {"size": 32, "length": 4}},
        }
    )
    parts = build(recipe, torch.device("cpu"))
    captions = parts.train.captions(np.arange(2))
    text = encoder(folder(kind), kind, **lengths)
    want, batch = network_inputs(parts.model, text.encode(captions), text.config.masked), parts.train.batch(np.arange(2))
    assert batch.keys() - want.keys() == {"x"}
    assert all((batch[name].float() - value.float()).abs().max() <= 1e-5 for name, value in want.items())
    assert parts.card.encoder.hash == text.content_hash()
    none = parts.train.none(parts.model, want)
    assert {n: v.shape for n, v in none.items()} == {n: v.shape for n, v in want.items()}
    parts.model.prepare(**want)


def test_a_network_without_an_input_for_it_is_told_no_scale(folder):
    pipe = Pipeline.from_pretrained(folder("sd3"), device="cpu")
    call = dict(prompt=PROMPTS, num_inference_steps=2, progress=False)
    assert torch.equal(pipe(true_cfg_scale=3.0, **call).x, pipe(guidance_scale=3.0, **call).x)
    with pytest.raises(DitkitError, match="mmdit has no input for it"):
        pipe(guidance=Guidance(told=2.0), **call)
