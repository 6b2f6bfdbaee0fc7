"""A codec that learns is trained before the network, once a run, and is the bundle's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ditkit
from ditkit.codecs import load_codec
from ditkit.core.errors import ConfigError
from ditkit.train import codecs, train
from ditkit.train.recipe import Recipe


def recipe(steps: int = 2, **codec: Any) -> Recipe:
    small = {"in_channels": 1, "channels": 2, "dim": 8, "dim_mult": [1, 1], "num_groups": 2}
    return Recipe.parse(
        {
            "backbone": {"name": "dit", "config": {"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 2}},
            "data": {"name": "digits", "codec": {"name": "kl", "config": small, "fit": {"steps": 3, "batch_size": 8}, **codec}},
            "trainer": {"steps": steps, "batch_size": 4, "sample_every": 0, "validate_every": 2, "save_every": 1, "device": "cpu"},
            "sampling": {"solver": "euler", "num_inference_steps": 2},
        }
    )


def test_the_network_learns_latents_of_a_codec_that_was_trained_first(tmp_path: Path) -> None:
    result = train(recipe(), tmp_path / "run", progress=False)
    assert result.validation["raw"] > 0
    pipe = ditkit.Pipeline.from_pretrained(tmp_path / "run")
    assert (pipe.codec.name, pipe.codec.factor, pipe.model.config.in_channels) == ("kl", 2, 2)
    assert pipe(0, seed=0).images[0].size == (8, 8)
    assert len(set(pipe.codec.scale)) == 2  # calibrated on its latents
    again = train(recipe(), tmp_path / "again", progress=False)
    other = load_codec(again.folder / "codec").state_dict()
    assert all(torch.equal(v, other[k]) for k, v in pipe.codec.state_dict().items())  # a function of the seed


def test_it_is_found_again_and_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(recipe(steps=1), tmp_path / "run", progress=False)
    monkeypatch.setattr(codecs, "fit", lambda *a, **k: pytest.fail("trained a second time"))
    assert train(recipe(steps=2), tmp_path / "run", progress=False).resumed_from == 1
    with pytest.raises(ConfigError, match=r"another data\.codec\.fit\.steps; next: another --out"):
        train(recipe(fit={"steps": 4, "batch_size": 8}), tmp_path / "run", progress=False)


def test_what_starts_from_the_bundle_learns_its_latents(tmp_path: Path) -> None:
    train(recipe(steps=1), tmp_path / "run", progress=False)
    values = recipe(steps=1).to_dict() | {"backbone": None, "base": str(tmp_path / "run"), "process": None, "data": {"name": "digits"}}
    train(Recipe.parse(values), tmp_path / "tuned", progress=False)
    first, second = (ditkit.Pipeline.from_pretrained(tmp_path / name).codec for name in ("run", "tuned"))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


@pytest.mark.parametrize(
    ("codec", "words"),
    [({"fit": None}, "has no weights yet"), ({"name": "orthogonal", "config": {"factor": 2}}, "learns nothing, and data.codec.fit")],
)
def test_what_learns_is_trained_and_nothing_else(codec: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        train(recipe(**codec), tmp_path / "run", progress=False)
