"""FlexDiT's fine-tuning: every row at the grid of its time, or a micro-batch at one; the recipe from a bundle to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.backbones.dit import DiT
from ditkit.core.backbone import Backbone
from ditkit.core.errors import DitkitError
from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.gaussian import Gaussian
from ditkit.methods.efficiency.flexdit import FlexDiT, find
from ditkit.testing.training import tiny_recipe
from ditkit.train import load_recipe, train
from ditkit.train.flexdit import FlexDiTObjective, FlexDiTObjectiveConfig


def small() -> FlexDiT:
    """On DiT's tiny network of 4 blocks and 4 x 6 tokens; 3 x 3 of them up to t = 0.6625, then 2 x 2."""
    return FlexDiT(pooling=1, modules=1, sparse=1, dense=0, side_noise=2, side_data=3)


def batch_of(n: int, model: Backbone, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, _, cond = model.example(n)
    return {"x": x, "noise": torch.randn(x.shape, generator=g), "time": torch.rand(n, generator=g), "drop": torch.ones(n), **cond}


@torch.no_grad()
@pytest.mark.parametrize("process", [Flow(), Gaussian()])
def test_each_row_learns_at_the_grid_of_its_own_time(process: Any) -> None:
    model = DiT.tiny(out_channels=process.output_channels(3))
    view = with_methods(model, small())
    objective = FlexDiTObjective(process)
    objective.begin(view)
    batch = batch_of(6, model)
    whole = objective.loss(view, batch).loss
    t = process.sample_time(batch["time"])
    assert len({find(view).config.side(float(v)) for v in t}) == 2
    for i in range(6):
        run = Run(view)
        run.public_times = t[i : i + 1]
        x0, noise, now = (u[i : i + 1] for u in (batch["x"], batch["noise"], t))
        out = view(process.add_noise(x0, noise, now), process.network_time(now), run=run, y=batch["y"][i : i + 1])
        assert torch.allclose(process.loss(out, x0, noise, now).loss, whole[i : i + 1], rtol=1e-4)


def test_together_all_rows_have_one_grid_and_times_stay_uniform() -> None:
    """Chi-square over 20 cells, of rows other than the first: their numbers come from the grid of the first."""
    view = with_methods(DiT.tiny(), small())
    objective = FlexDiTObjective(Flow(), FlexDiTObjectiveConfig(rows="together"))
    objective.begin(view)
    u = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0))
    x0 = torch.zeros(3, 3, 8, 12)
    drawn = torch.stack([objective.within_one_grid(row, x0) for row in u])
    edge = 1e-3  # cells are 1 / 4096 wide
    for row in drawn[:200]:
        sides = {small().config.side(float(v)) for v in row}
        assert len(sides) == 1 or min(abs(float(v) - 0.6625) for v in row) < edge
    counts = torch.histc(drawn[:, 1:], 20, 0, 1)
    chi = float(((counts - 100) ** 2 / 100).sum())
    assert chi < 60  # 19 degrees of freedom; rows of a batch are not independent, so more than the usual 30


def test_the_objective_needs_the_method() -> None:
    with pytest.raises(DitkitError, match="no flexdit"):
        FlexDiTObjective(Flow()).begin(DiT.tiny())


def test_a_compiled_model_needs_rows_together() -> None:
    view = with_methods(DiT.tiny(), small())
    view._call = torch.compile(view._call, backend="eager")
    objective = FlexDiTObjective(Flow())
    objective.begin(view)
    with pytest.raises(DitkitError, match="together"):
        objective.loss(view, batch_of(6, view))


def test_the_recipe_trains_and_its_bundle_samples(tmp_path: Path) -> None:
    recipe = load_recipe("digits-flexdit")
    sections = {"base": "digits", "backbone": None, "process": None, "methods": [m.to_dict() for m in recipe.methods]}
    sections["objective"] = recipe.objective.to_dict()  # type: ignore[assignment]
    assert train(tiny_recipe(sections, steps=2), tmp_path / "out", progress=False).finished
    pipe = ditkit.from_pretrained(tmp_path / "out")
    assert find(pipe.eager).merges[0].sparse.weight.abs().max() > 0  # type: ignore[union-attr, operator]
    before = ditkit.from_pretrained("digits").eager.blocks[2].parts["img"].qkv.weight  # type: ignore[union-attr, index]
    assert not torch.equal(pipe.eager.blocks[2].parts["img"].qkv.weight, before)  # type: ignore[union-attr, index]
    assert pipe(class_labels=[1], num_inference_steps=2, progress=False).x.isfinite().all()
