"""Learning rate, decay groups, Muon, gradient norm, and skipping on the device."""

import math

import pytest
import torch

from ditkit.backbones.dit import DiT
from ditkit.train.distributed import World
from ditkit.train.optim import Optimizers, clip_gradients, decayed, learning_rate
from ditkit.train.recipe import TrainerRecipe

ALONE = World(0, 1, torch.device("cpu"))


def with_gradients(**config: object) -> tuple[DiT, Optimizers]:
    model = DiT.tiny()
    optimizers = Optimizers(model, TrainerRecipe(**config))
    x, t, cond = model.example()
    model(x, t, **cond).square().mean().backward()
    return model, optimizers


def test_warm_up_then_half_a_cosine() -> None:
    cfg = TrainerRecipe(steps=110, learning_rate=2.0, warmup_steps=10, schedule="cosine")
    assert [learning_rate(cfg, s) for s in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert learning_rate(cfg, 10) == 2.0
    assert learning_rate(cfg, 60) == pytest.approx(1.0)
    assert learning_rate(cfg, 109) == pytest.approx(1 + math.cos(math.pi * 0.99))
    assert learning_rate(cfg.model_copy(update={"schedule": "constant"}), 109) == 2.0


def test_only_matrices_decay() -> None:
    names = decayed(DiT.tiny())
    assert "blocks.0.parts.img.qkv.weight" in names
    assert not any(n.endswith("bias") or n.startswith("label") for n in names)


def test_weight_decay_is_decoupled_and_only_for_its_group() -> None:
    model, optimizers = with_gradients(learning_rate=0.1, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.set_rate(0)
    optimizers.step()
    for n, p in model.named_parameters():
        assert torch.allclose(p, before[n] * (1 - 0.1 * 0.5 if n in decayed(model) else 1.0)), n


def test_state_made_in_advance_is_the_state_of_the_first_step() -> None:
    model, optimizers = with_gradients(learning_rate=0.01)
    other, _ = with_gradients()
    plain = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    optimizers.set_rate(0)
    for _ in range(2):
        optimizers.step()
        plain.step()
    for (n, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(optimizers.tensors()[f"{n}.exp_avg"], plain.state[q]["exp_avg"])
    assert set(optimizers.counts().values()) == {2}


def test_a_step_can_be_skipped_by_a_tensor() -> None:
    model, optimizers = with_gradients(learning_rate=0.1, weight_decay=0.1)
    before = {n: t.clone() for n, t in (*model.named_parameters(), *optimizers.tensors().items())}
    assert optimizers.skips_on_device
    optimizers.step(torch.tensor(0.0))
    assert all(torch.equal(t, before[n]) for n, t in (*model.named_parameters(), *optimizers.tensors().items()))
    assert set(optimizers.counts().values()) == {0}
    optimizers.step(torch.tensor(1.0))
    assert set(optimizers.counts().values()) == {1}
    assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_updates_are_counted_by_parameter() -> None:
    model, optimizers = with_gradients()
    model.label.weight.grad = None  # as of an expert that got no token
    optimizers.step()
    counts = optimizers.counts()
    assert counts.pop("label.weight") == 0
    assert set(counts.values()) == {1}
    _, other = with_gradients()
    other.restore_counts(optimizers.counts())
    assert other.counts() == optimizers.counts()


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    model, optimizers = with_gradients(optimizer="muon", learning_rate=0.01)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers.set_rate(0)
    optimizers.step()
    state = optimizers.tensors()
    for n, p in model.named_parameters():
        matrix = n.startswith("blocks.") and p.dim() == 2
        assert (f"{n}.momentum_buffer" in state) is matrix
        assert (f"{n}.exp_avg" in state) is not matrix
        assert not torch.equal(p, before[n]), n
    assert not optimizers.skips_on_device


def test_muon_steps_have_singular_values_near_one_and_the_size_of_adamw_s() -> None:
    model, optimizers = with_gradients(optimizer="muon", learning_rate=0.01)
    p = model.blocks[0].parts["img"].qkv.weight
    p.grad, before = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), p.detach().clone()
    optimizers.set_rate(0)
    optimizers.step()
    values = torch.linalg.svdvals((p.detach() - before) / 0.01)
    size = 0.2 * math.sqrt(max(p.shape))  # 2502.16982, eq. 4
    assert 0.5 < float(values.min()) / size
    assert float(values.max()) / size < 1.5


def test_clipping_scales_all_gradients_to_the_norm() -> None:
    model, _ = with_gradients()
    before = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    norm = clip_gradients(model, 0.0, ALONE)
    assert float(norm) == pytest.approx(float(before.double().norm()), rel=1e-6)
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), before)  # type: ignore[union-attr]
    clip_gradients(model, float(norm) / 4, ALONE)
    after = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    assert torch.allclose(after, before / 4, rtol=1e-4)
    clip_gradients(model, 10 * float(norm), ALONE)
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), after)  # type: ignore[union-attr]
