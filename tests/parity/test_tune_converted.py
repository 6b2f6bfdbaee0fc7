"""Fine-tuning of a PixArt from elsewhere: diffusers' folder, or the bundle made of it -> LoRA, or all weights, on latents in buckets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ditkit
from ditkit.backbones.dit import draw_parameters
from ditkit.core.files import read_tensors
from ditkit.interop.convert import convert
from ditkit.interop.verify import quiet_imports
from ditkit.testing.training import tiny_recipe
from ditkit.train import train

with quiet_imports():
    from diffusers import PixArtTransformer2DModel

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:__array__ implementation")]  # diffusers with numpy 2


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random PixArt of four latent channels, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("theirs")
    shape = dict(num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=2, caption_channels=16, sample_size=8)
    torch.manual_seed(0)
    draw_parameters(PixArtTransformer2DModel(**shape)).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey pictures with captions: a codec with cells of 2 x 2 makes four channels of them."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16 + 8 * (i % 2), 16), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("converted", [True, False])
def test_two_steps(how: str, converted: bool, theirs: Path, pictures: Path, tmp_path: Path) -> None:
    base = tmp_path / "base" if converted else theirs
    if converted:
        convert(theirs, base)
    values: dict[str, Any] = {
        "base": str(base),
        "backbone": None,
        "process": None,
        "encoder": {"name": "bytes", "config": {"dim": 16, "depth": 1, "num_heads": 2, "max_length": 24}},
        "data": {
            "name": str(pictures),
            "config": {"channels": 1, "buckets": {"resolutions": [16], "multiple": 4}},
            "codec": {"name": "orthogonal", "config": {"in_channels": 1}},
        },
        "sampling": {"solver": "ddim", "num_inference_steps": 2},
    }
    if how == "lora":
        values |= {"methods": [{"name": "lora", "config": {"rank": 2}}], "trainable": ["methods.*"]}
    train(tiny_recipe(values, steps=2, batch_size=2), tmp_path / "run", progress=False)
    before = ditkit.from_pretrained(base, device="cpu").model.state_dict()
    after = read_tensors(tmp_path / "run" / "model.safetensors")
    same = [torch.equal(before[name], after[name]) for name in before]
    assert all(same) if how == "lora" else not any(same)
    pipe = ditkit.from_pretrained(tmp_path / "run", device="cpu")
    assert pipe(prompt="picture 1", progress=False).x.shape == (1, 1, 16, 16)
