"""Training on data of one's own, from the folder to the sampled picture."""

import numpy as np
import pytest
import torch
from PIL import Image

import ditkit
from ditkit import data
from ditkit.codecs.kl import KL, KLConfig
from ditkit.data.latents import cache_latents
from ditkit.train.loop import train
from ditkit.train.recipe import Recipe


def recipe(folder, **config):
    return Recipe.parse(
        {
            "backbone": {"name": "dit", "config": {"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 2}},
            "data": {"name": str(folder), "config": config},
            "trainer": {"steps": 2, "batch_size": 2, "save_every": 10, "sample_every": 0, "validate_every": 1, "device": "cpu"},
            "sampling": {"solver": "euler", "num_inference_steps": 2},
        }
    )


@pytest.fixture
def pictures(tmp_path):
    """A18: two good pictures, and one cut at half its bytes."""
    root = tmp_path / "pictures"
    for i, name in enumerate(("ant/1.png", "bee/2.png", "bee/3.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name)
    raw = (root / "bee" / "3.png").read_bytes()
    (root / "bee" / "3.png").write_bytes(raw[: len(raw) // 2])
    return root


def test_a18_training_runs_on_the_two_good_pictures(pictures, tmp_path, caplog):
    result = train(recipe(pictures, flip=True), tmp_path / "run", progress=False)
    assert (result.step, result.finished, result.validation) == (2, True, {})
    assert "2 usable pictures" in caplog.text
    assert "1 in quarantine" in caplog.text
    assert "no validation" in caplog.text
    pipe = ditkit.from_pretrained(tmp_path / "run", device="cpu")
    assert pipe(class_labels=[0, 1], progress=False).x.shape == (2, 3, 8, 8)
    with pytest.raises(ditkit.DitkitError, match=r"bee/3\.png: is cut off"):
        train(recipe(pictures, strict_data=True), tmp_path / "strict", progress=False)


def test_a_model_of_cached_latents_samples_pictures(pictures, tmp_path):
    torch.manual_seed(0)
    codec = KL(KLConfig(channels=2, dim=4, dim_mult=(1, 2), num_groups=2))
    for split in ("train", "test"):
        cache_latents(data.load(str(pictures), flip=True, progress=False), codec, tmp_path / "latents" / split, progress=False)
    result = train(recipe(tmp_path / "latents"), tmp_path / "run", progress=False)
    assert set(result.validation)
    pipe = ditkit.from_pretrained(tmp_path / "run", device="cpu")
    assert pipe.config.data.shape == (3, 8, 8)
    assert pipe.model.config.in_channels == 2
    assert pipe.codec.content_hash() == codec.content_hash()
    assert pipe(class_labels=[1], progress=False).x.shape == (1, 3, 8, 8)
