"""Training on captions: the byte encoder learns along, a frozen one is asked once, both resume bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ditkit
from ditkit.conditioning.encoders.bytes import ByteEncoder
from ditkit.core import registry
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.core.files import read_tensors
from ditkit.interop.convert import convert
from ditkit.testing.training import comparable, tiny_recipe
from ditkit.train import Recipe, load_recipe, train
from ditkit.train.build import build
from ditkit.train.logs import read_log

CPU = torch.device("cpu")
BYTES = {"name": "bytes", "config": {"dim": 32, "depth": 1, "num_heads": 2, "max_length": 24}}
PIXART = {
    "name": "pixart",
    "config": {"dim": 64, "depth": 1, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2.0, "position_base": 4, "embedding_init": "unit"},
}
SCENES = {"name": "scenes", "config": {"size": 32, "length": 24}}


def recipe(sections: dict[str, Any] | None = None, **trainer: Any) -> Recipe:
    return tiny_recipe({"backbone": PIXART, "encoder": BYTES, "data": SCENES, **(sections or {})}, **trainer)


def losses(folder: Path) -> list[float]:
    return [e["loss"] for e in read_log(folder / "log.jsonl") if e["event"] == "train"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sections of a recipe for two captioned pictures, one black and one white."""
    root = tmp_path_factory.mktemp("pictures")
    for name, level in (("black", 0), ("white", 255)):
        Image.new("RGB", (8, 8), (level,) * 3).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"a {name} square")
    sampling = {"solver": "euler", "num_inference_steps": 4, "guidance": {"scale": 1.5}}
    return {"data": {"name": str(root), "config": {"resolution": 8}}, "sampling": sampling}


@pytest.fixture(scope="module")
def trained(own: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty steps on these, and a preview at the end."""
    folder = tmp_path_factory.mktemp("captions") / "run"
    train(recipe(own, steps=60, batch_size=16, learning_rate=5e-3, sample_every=60), folder, progress=False)
    return folder


def test_what_a_caption_says_is_what_is_drawn(trained: Path) -> None:
    pipe = ditkit.from_pretrained(trained, device="cpu")
    assert pipe.config.data.captions == ("a black square", "a white square")
    assert not pipe.config.data.labels
    dark, bright = (x.mean() for x in pipe(num_images=8, progress=False).x.split(4))
    assert dark < -0.4
    assert bright > 0.4
    same = [pipe(prompt=p, progress=False).x for p in ("a white square", "A White  square")]
    assert torch.equal(*same)
    assert len(list((trained / "samples").iterdir())) == 1


def test_the_loss_falls_on_scenes(tmp_path: Path) -> None:
    """The recipe of the package, with a small network of a velocity. At the start that is zero: the loss is the mean of (noise - x)^2."""
    small = {"backbone": PIXART, "encoder": BYTES, "data": SCENES, "process": {"name": "flow"}}
    values = {**load_recipe("scenes").to_dict(), **small, "trainer": recipe(steps=12).trainer.to_dict()}
    train(Recipe.parse(values), tmp_path, progress=False)
    found = losses(tmp_path)
    square = float(ditkit.data.load("scenes", size=32, length=24).batch(np.arange(24))["x"].square().mean())
    assert math.isclose(found[0], 1 + square, rel_tol=0.2)
    assert np.mean(found[-5:]) < 0.9 * found[0]


def test_the_encoder_is_part_of_all_that_is_kept(trained: Path, own: dict[str, Any]) -> None:
    last = trained / "checkpoints" / "step-60"
    for kind in ("model", "ema", "optimizer"):
        assert any(name.startswith(f"{kind}.encoder.") for name in read_tensors(last / f"{kind}.safetensors"))
    start = build(recipe(own), CPU).model.state_dict()
    end = read_tensors(last / "model.safetensors")
    assert not [n for n, p in start.items() if n.startswith("encoder.") and torch.equal(p, end[f"model.{n}"])]  # all of it learned


def test_resume_is_bit_exact(own: dict[str, Any], tmp_path: Path) -> None:
    train(recipe(own, steps=4), tmp_path / "whole", progress=False)
    train(recipe(own, steps=2), tmp_path / "parts", progress=False)
    assert train(recipe(own, steps=4), tmp_path / "parts", progress=False).resumed_from == 2
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "parts")


def test_the_split_into_micro_batches_does_not_matter(own: dict[str, Any], tmp_path: Path) -> None:
    weights = []
    for parts in (1, 4):
        train(recipe(own, steps=2, accumulation=parts), tmp_path / str(parts), progress=False)
        weights.append(read_tensors(tmp_path / str(parts) / "checkpoints" / "step-2" / "model.safetensors"))
    scale = max(float(v.abs().max()) for v in weights[0].values())
    assert max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0]) <= 1e-4 * scale


def test_dropped_captions_are_the_empty_one(own: dict[str, Any]) -> None:
    """2207.12598, algorithm 1: what guidance subtracts is learned under the empty caption, and only where the number says so."""
    parts = build(recipe({**own, "objective": {"name": "diffusion", "config": {"label_dropout": 0.5}}}), CPU)
    batch = {**parts.train.batch(np.array([0, 1, 0, 1])), "drop": torch.tensor([0.0, 0.9, 0.4, 0.6])}
    cond = parts.objective.conditioning(parts.model, batch)  # type: ignore[attr-defined]
    empty = ByteEncoder(**BYTES["config"]).tokenize([""])  # type: ignore[arg-type]
    for row in range(4):
        want = (empty.tokens[0], empty.mask[0]) if row in (0, 2) else (batch["tokens"][row], batch["mask"][row])
        assert torch.equal(cond["tokens"][row], want[0])
        assert torch.equal(cond["mask"][row], want[1])
    assert "y" not in cond


def test_methods_train_beside_an_encoder(trained: Path, own: dict[str, Any], tmp_path: Path) -> None:
    """LoRA on the network of a bundle; its encoder stays as it was."""
    sections: dict[str, Any] = {"backbone": None, "encoder": None, "process": None, "base": str(trained)}
    sections |= {"methods": [{"name": "lora", "config": {"rank": 2}}], "trainable": ["methods.*"]}
    train(recipe({**own, **sections}, steps=2), tmp_path / "run", progress=False)
    before, after = (read_tensors(folder / "model.safetensors") for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert ditkit.from_pretrained(tmp_path / "run", device="cpu")(prompt="a red circle", progress=False).x.shape == (1, 3, 8, 8)


# a frozen encoder


@registry.register("encoders", "frozen")
class Frozen(ByteEncoder):
    """Weights that are always the same, and not in the bundle."""

    learned = False
    asked = 0

    def __init__(self, config: Any = None, **values: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            super().__init__(config, **values)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> Any:
        Frozen.asked += len(tokens)
        return super().forward(tokens, mask)


def test_a_frozen_encoder_is_asked_once_for_each_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITKIT_CACHE", str(tmp_path / "cache"))
    frozen = recipe({"encoder": {**BYTES, "name": "frozen"}, "data": {**SCENES, "config": {"size": 32, "length": 12}}}, steps=2)
    Frozen.asked = 0
    train(frozen, tmp_path / "one", progress=False)
    distinct = {"", *(c for split in ("train", "test") for c in ditkit.data.load("scenes", split, size=32, length=12).captions(range(12)))}
    assert Frozen.asked == len(distinct)
    train(frozen, tmp_path / "two", progress=False)
    assert Frozen.asked == len(distinct)
    assert comparable(tmp_path / "one") == comparable(tmp_path / "two")
    assert not any("encoder" in name for name in read_tensors(tmp_path / "one" / "model.safetensors"))
    pipe = ditkit.from_pretrained(tmp_path / "one", device="cpu")
    assert (pipe.config.encoder.hash, pipe.encoder.name) == (pipe.encoder.content_hash(), "frozen")  # type: ignore[union-attr]
    assert (pipe(prompt="red", progress=False).x - pipe(prompt="blue", progress=False).x).abs().max() > 0


# what does not fit


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"encoder": None}, "pixart is told captions, and the recipe has no encoder; next: encoder"),
        ({"backbone": {"name": "dit"}}, "dit is told class labels, and the recipe has an encoder"),
        ({"data": {"name": "digits"}}, "'digits' has no captions"),
        ({"encoder": {"name": "bytes", "config": {"widht": 3}}}, "unknown key 'widht'"),
        ({"backbone": {**PIXART, "config": {**PIXART["config"], "text_dim": 99}}}, "states have width 32; allowed: 99"),  # type: ignore[dict-item]
    ],
    ids=["no encoder", "labels", "no captions", "key", "width"],
)
def test_parts_that_do_not_fit_are_one_error(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(DitkitError, match=words):
        build(recipe(sections), CPU)


def test_a_long_caption_is_named_before_the_first_step(tmp_path: Path) -> None:
    for k, text in enumerate(("a red circle", "on and on " * 20)):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(text)
    long = {"data": {"name": str(tmp_path), "config": {"resolution": 32}}}
    with pytest.raises(DitkitError, match="prompt 'on and on .* has 61 tokens; allowed: at most 24"):
        build(recipe(long), CPU)
    cut = {**BYTES, "config": {**BYTES["config"], "long_prompts": "truncate"}}  # type: ignore[dict-item]
    assert build(recipe({**long, "encoder": cut}), CPU).train.batch(np.arange(2))["mask"].sum(1).tolist() == [4, 24]


def test_the_recipe_of_scenes_has_the_size_it_says() -> None:
    """By hand: 16 D^2 a block, patches, head, time, modulation, captions; under 20 MB in bfloat16, and trained in 90 minutes."""
    recipe = load_recipe("scenes")
    small = recipe.model_copy(update={"data": recipe.data.model_copy(update={"config": {"size": 32, "length": 32}})})
    count = sum(p.numel() for p in build(small, CPU).model.parameters())
    assert math.isclose(count, 9.71e6, rel_tol=0.01)
    assert 2 * count < 20e6
    assert recipe.trainer.steps * recipe.trainer.batch_size * 3.45e8 / 60e9 <= 90 * 60


def test_no_other_layout_has_the_encoder(trained: Path, tmp_path: Path) -> None:
    convert(str(trained), tmp_path / "ours")
    assert ditkit.from_pretrained(tmp_path / "ours", device="cpu").encoder is not None
    with pytest.raises(WeightsError, match="holds a text encoder that was learned with the network; allowed: --to ditkit"):
        convert(str(trained), tmp_path / "theirs", "diffusers")
