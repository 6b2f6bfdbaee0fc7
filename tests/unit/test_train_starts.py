"""Stages: a network that starts from a trained one with changes; PixArt-alpha's three and Sigma's four as recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ditkit
from ditkit.codecs import codec_from
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.data.encoded import Encoded
from ditkit.testing.training import comparable
from ditkit.train import Recipe, load_recipe, train
from ditkit.train.build import build

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
STAGES = (
    "alpha-1-pixels",
    "alpha-2-captions",
    "alpha-3-quality",
    "sigma-1-data",
    "sigma-2-vae",
    "sigma-3-resolution",
    "sigma-4-compression",
)
STAGES = tuple(f"pixart-{name}" for name in STAGES)
TINY = {"steps": 2, "batch_size": 2, "validate_every": 0, "sample_every": 0, "save_every": 2, "device": "cpu", "warmup_steps": 0}


def stage(name: str, runs: Path, **sections: Any) -> Recipe:
    """A recipe of the package at its smallest: two steps, eight scenes, width 24."""
    values = load_recipe(name).to_dict()
    values["trainer"] |= TINY
    values["data"]["config"]["length"] = 8
    values["sampling"]["num_inference_steps"] = 2
    if values["base"] is None:
        values["backbone"]["config"] |= {"dim": 24, "num_heads": 2}
    else:
        values["base"] = str(runs / Path(values["base"]).name)
    return Recipe.parse({**values, **sections})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, one after the other."""
    folder = tmp_path_factory.mktemp("runs")
    for name in STAGES:
        train(stage(name, folder), folder / name, progress=False)
    return folder


def config(runs: Path, name: str) -> Any:
    return ditkit.from_pretrained(runs / f"pixart-{name}", device="cpu").model.config


def test_every_stage_ends_in_a_bundle_that_samples(runs: Path) -> None:
    assert [load_recipe(name).base for name in STAGES[1:]] == [f"runs/{name}" for name in STAGES[:-1]]
    pipe = ditkit.from_pretrained(runs / STAGES[-1], device="cpu")
    assert pipe(prompt="a red heart", progress=False).x.shape == (1, 3, 64, 64)
    assert (pipe.model.config.kv_blocks, pipe.model.config.input_size) == ((3, 4, 5), (32, 32))
    assert pipe.codec.config.seed == 1


def test_alpha_2_starts_as_the_dit_without_a_class(runs: Path) -> None:
    """PixArt-alpha, section 2.3: at t = 500 the new network computes what the DiT computes for its null label."""
    dit = ditkit.from_pretrained(runs / STAGES[0], device="cpu").model
    parts = build(stage(STAGES[1], runs), CPU)
    x, t = torch.randn(2, 12, 16, 16, generator=torch.Generator().manual_seed(0)), torch.full((2,), 500.0)
    cond = parts.train.batch(np.arange(2))
    with torch.no_grad():
        want = dit(x, t, y=torch.full((2,), dit.config.num_classes))
        got = parts.model(x, t, tokens=cond["tokens"], mask=cond["mask"])
    assert float((got - want).norm() / want.norm()) <= 1e-5


def test_new_settings_keep_every_weight(runs: Path) -> None:
    """Positions at base 16 and scale 2 are those at base 8 and scale 1: on one grid both compute the same."""
    base = ditkit.from_pretrained(runs / STAGES[4], device="cpu").model
    new = build(stage(STAGES[5], runs), CPU).model
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in base.state_dict().items())
    x, t = torch.randn(2, 12, 32, 32, generator=torch.Generator().manual_seed(0)), torch.full((2,), 300.0)
    cond = {"tokens": torch.zeros(2, 24, 16, dtype=torch.int64), "mask": torch.ones(2, 24, dtype=torch.bool)}
    with torch.no_grad():
        assert torch.allclose(base(x, t, **cond), new.eval()(x, t, **cond), atol=1e-5)
    compressed = build(stage(STAGES[6], runs), CPU).model
    fresh = set(compressed.state_dict()) - set(base.state_dict())
    assert fresh == {f"blocks.{i}.attn.down.{n}" for i in (3, 4, 5) for n in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")}
    assert bool((compressed.state_dict()["blocks.3.attn.down.conv.weight"] == 0.25).all())  # the mean of each cell


def test_a_stage_resumes_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    name = STAGES[1]  # new tables and a new encoder: functions of the seed and of the base
    recipe = stage(name, runs)
    one = recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update={"steps": 1, "log_every": 1})})
    whole = recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update={"log_every": 1})})
    train(whole, tmp_path / "whole", progress=False)
    train(one, tmp_path / "parts", progress=False)
    assert train(whole, tmp_path / "parts", progress=False).resumed_from == 1
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "parts")


@pytest.mark.parametrize(
    ("number", "sections", "words"),
    [
        (
            2,
            {"backbone": {"name": "pixart", "config": {"dim": 48}}},
            r"patch_embed.weight of the base, .* has no place: there is \(48, 192\)",
        ),
        (2, {"backbone": {"name": "pixart", "config": {"depth": 5}}}, r"blocks\.5\..* has no place: there is nothing"),
        (2, {"backbone": {"name": "pixart", "config": {"kv_ratoi": 2}}}, "unknown key 'kv_ratoi'"),
        (2, {"backbone": {"name": "dit", "config": {"depth": 6}}}, "backbone is dit, the base is a pixart"),
        (2, {"start": {"name": "from_dit"}}, "the base is a pixart; allowed: a dit"),
        (1, {"start": {"name": "form_dit"}}, "did you mean 'from_dit'"),
        (1, {"start": {"name": "from_dit", "config": {"time": 3}}}, "unknown key 'time'"),
        (1, {"backbone": {"name": "flux"}}, "backbone is flux; allowed: pixart"),
        (1, {"encoder": None}, "is told captions, and the recipe has no encoder"),
        (2, {"encoder": {"name": "bytes"}}, "the encoder comes with the base"),
        (2, {"base": "nowhere/pixart-alpha-2-captions"}, "not there yet; next: ditkit train pixart-alpha-2-captions --out nowhere/"),
    ],
    ids=["width", "depth", "key", "other", "no dit", "start", "start key", "no pixart", "no encoder", "second encoder", "not there"],
)
def test_what_does_not_fit_is_one_error(number: int, sections: dict[str, Any], words: str, runs: Path) -> None:
    with pytest.raises(DitkitError, match=words):
        build(stage(STAGES[number], runs, **sections), CPU)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base": "runs/x", "backbone": {"name": "dit"}}, "has no config"),
        ({"backbone": {"name": "dit"}, "start": {"name": "from_dit"}}, "give base"),
        ({}, "give a base bundle or a backbone"),
        ({"base": "runs/x", "process": {"name": "flow"}}, "process comes with the base"),
    ],
)
def test_recipes_that_begin_nowhere(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe.parse(values)


# pictures that are encoded as they are drawn


def test_the_orthogonal_codec_loses_nothing_and_seeds_are_bases() -> None:
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    one, two = (codec_from("orthogonal", {"factor": 4, "seed": seed}) for seed in (0, 1))
    z = one.encode(x).mean
    assert z.shape == (2, 48, 2, 3)
    assert torch.allclose(one.decode(z), x, atol=1e-5)
    assert torch.allclose(z.norm(), x.norm(), rtol=1e-5)
    assert not torch.allclose(two.encode(x).mean, z, atol=0.1)
    assert one.content_hash() != two.content_hash()


def test_encoded_pictures_are_the_codecs_latents() -> None:
    scenes = ditkit.data.load("scenes", size=[32, 48], length=6)
    codec = codec_from("orthogonal", {"factor": 2})
    found = Encoded(scenes, codec)
    assert (found.shape, found.num_classes, len(found), found.name) == ((12, 24, 24), scenes.num_classes, 6, "scenes")
    for ids in scenes.groups:  # type: ignore[attr-defined]
        x, batch = scenes.batch(ids)["x"], found.batch(ids)
        assert torch.allclose(codec.decode(batch["x"]), x, atol=1e-5)
        assert torch.equal(batch["y"], scenes.batch(ids)["y"])
        assert torch.equal(found.augmented(ids, seed=0, step=3)["x"], batch["x"])  # std 0
    with pytest.raises(DitkitError, match="asked for together"):
        scenes.batch(np.arange(2))
    with pytest.raises(DitkitError, match="several that rise"):
        ditkit.data.load("scenes", size=[48, 32])
