"""CAME: its first step in closed form, its state, decay, confidence, and a run that goes on bit for bit."""

import math
from pathlib import Path

import pytest
import torch

from ditkit.backbones.dit import DiT
from ditkit.core.errors import ConfigError
from ditkit.testing.training import comparable, tiny_recipe
from ditkit.train import train
from ditkit.train.came import CAME
from ditkit.train.optim import Optimizers, decayed
from ditkit.train.recipe import TrainerRecipe

RATE = 0.01


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def stepped(p: torch.Tensor, *grads: torch.Tensor, **options: float) -> torch.Tensor:
    """What the last of these gradients changes, in units of the rate."""
    p = torch.nn.Parameter(p.clone())
    optimizer = CAME([p], lr=RATE, **options)
    for grad in grads:
        before, p.grad = p.detach().clone(), grad
        optimizer.step()
    return (p.detach() - before) / RATE


def test_the_first_step_in_closed_form() -> None:
    """Where |G| has rank 1 the factored moments are exact: u = sign G after clipping, m = 0.1 u, S = (1 - b3) 0.81."""
    grad = drawn(5, 1).abs() * drawn(1, 7).abs() * drawn(5, 7).sign()
    want = 0.1 / (0.9 * math.sqrt(1e-4)) * -grad.sign()
    assert torch.allclose(stepped(torch.zeros_like(grad), grad), want, rtol=1e-6)
    assert torch.allclose(stepped(torch.zeros_like(grad), 1e6 * grad), want, rtol=1e-6)  # whatever the gradient's size
    vector = torch.full((7,), -3.0, dtype=torch.float64)  # no confidence: m alone
    assert torch.allclose(stepped(torch.zeros(7, dtype=torch.float64), vector), torch.full_like(vector, 0.1))


def test_a_tensor_of_more_axes_is_matrices_side_by_side() -> None:
    """But for the clipping, which looks at the whole: here both have the same root mean square of updates."""
    grad = drawn(6, 3).sign()
    both = stepped(torch.zeros(2, 6, 3, dtype=torch.float64), torch.stack([grad, -grad]))
    alone = stepped(torch.zeros_like(grad), grad)
    assert torch.allclose(both, torch.stack([alone, -alone]), rtol=1e-12)


def test_updates_that_disagree_are_trusted_less() -> None:
    """Rows 0 to 3 get the same gradient each time, the others one of changing sign: relative to m, their step is smaller."""
    ones, p = torch.ones(8, 4, dtype=torch.float64), torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.float64))
    optimizer = CAME([p], lr=RATE)
    for step in range(40):
        flips = torch.cat([ones[:4], ones[4:] * (-1) ** step])
        before, p.grad = p.detach().clone(), flips
        optimizer.step()
    trust = ((p.detach() - before) / optimizer.state[p]["exp_avg"]).abs().mean(1)
    assert trust[:4].min() > 2 * trust[4:].max()


def test_the_state_is_one_tensor_and_four_vectors() -> None:
    model = DiT.tiny()
    optimizers = Optimizers(model, TrainerRecipe(optimizer="came"))
    state = optimizers.tensors()
    for n, p in model.named_parameters():
        mine = sum(t.numel() for name, t in state.items() if name.startswith(f"{n}."))
        assert mine == (2 * p.numel() if p.dim() < 2 else p.numel() + 2 * sum(p.shape)), n
    assert not optimizers.skips_on_device
    assert optimizers.counts() == {}


def test_state_made_in_advance_is_the_state_of_the_first_step() -> None:
    grads = [drawn(4, 3), drawn(3)]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    ahead, later = CAME(params), CAME(params)
    made = [{name: t.clone() for name, t in ahead.begin(p).items()} for p in params]
    for p, g in zip(params, grads):
        p.grad = torch.zeros_like(g)
    later.step()
    for p, names in zip(params, made):
        assert {n: t.shape for n, t in names.items()} == {n: t.shape for n, t in later.state[p].items()}
        assert not any(t.any() for t in names.values())


def test_weight_decay_is_decoupled_and_only_for_matrices() -> None:
    model = DiT.tiny()
    optimizers = Optimizers(model, TrainerRecipe(optimizer="came", learning_rate=0.1, weight_decay=0.5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.set_rate(0)
    optimizers.step()
    for n, p in model.named_parameters():
        assert torch.allclose(p, before[n] * (1 - 0.1 * 0.5 if n in decayed(model) else 1.0)), n


def test_betas() -> None:
    assert [g["betas"] for g in optimizer_of(betas=(0.8, 0.9)).param_groups] == [(0.8, 0.9, 0.9999)] * 2
    assert [g["betas"] for g in optimizer_of(betas=(0.8, 0.9, 0.95)).param_groups] == [(0.8, 0.9, 0.95)] * 2
    with pytest.raises(ConfigError, match="adamw has two"):
        TrainerRecipe.parse({"betas": [0.9, 0.99, 0.999]})
    with pytest.raises(ConfigError, match="came has two or three"):
        TrainerRecipe.parse({"optimizer": "came", "betas": [0.9]})


def optimizer_of(**config: object) -> torch.optim.Optimizer:
    (optimizer,) = Optimizers(DiT.tiny(), TrainerRecipe(optimizer="came", **config)).all
    return optimizer


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    values = {"optimizer": "came", "learning_rate": 1e-3, "save_every": 2}
    train(tiny_recipe(steps=4, **values), tmp_path / "whole", progress=False)
    train(tiny_recipe(steps=2, **values), tmp_path / "parts", progress=False)
    train(tiny_recipe(steps=4, **values), tmp_path / "parts", progress=False)
    assert comparable(tmp_path / "parts")["tensors"] == comparable(tmp_path / "whole")["tensors"]
