"""TinyFusion: the mathematics of its gates, what pruning leaves, the sizes of its family, a search and a recovery that learn."""

from __future__ import annotations

from functools import lru_cache
from math import comb
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.backbones.dit import DiT
from ditkit.backbones.flux import Flux
from ditkit.backbones.lumina import Lumina
from ditkit.backbones.mmdit import MMDiT
from ditkit.backbones.pixart import PixArt
from ditkit.bundle import Part
from ditkit.core.backbone import Backbone
from ditkit.core.errors import ConfigError, Conflict, DitkitError
from ditkit.core.run import Run
from ditkit.core.view import keep_blocks, with_methods
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.gaussian import Gaussian
from ditkit.eval.counters import count_forward, parameters
from ditkit.loading import empty_model
from ditkit.methods.adaptation.lora import LoRA
from ditkit.methods.efficiency.int8 import Int8
from ditkit.methods.efficiency.tinyfusion import FAMILY, TinyFusion, fill_groups, find, gumbel_noise, options, prune
from ditkit.methods.pruning import (
    block_similarity,
    by_loss,
    least_needed,
    most_sensitive,
    prune_pipeline,
    random_blocks,
    sensitivity,
    shorten,
)
from ditkit.testing.training import tiny_recipe
from ditkit.train import train
from ditkit.train.tinyfusion import PRESETS, MaskedKD, MaskedKDConfig, even_layers, feature_loss, line

#: The sheet's counts, position table included: 28 blocks, then those of the family.
COUNTS = {"TinyDiT-D14": 340_457_504, "TinyDiT-D19": 459_983_264, "TinyDiT-D7": 173_121_440}


def searched(model: Backbone, groups: list[list[int]], batch: int, tau: float = 1.0, seed: int = 0) -> tuple[Backbone, TinyFusion, Run]:
    """A view with gates, and a run in which ``batch`` samples draw their patterns."""
    method = TinyFusion(groups=groups)
    view = with_methods(model, method)
    run = Run(view)
    u = torch.rand(batch, method.num_options, generator=torch.Generator().manual_seed(seed))
    method.sample(run, gumbel_noise(u), tau)
    return view, method, run


def plant_identity(model: DiT, *blocks: int) -> DiT:
    """These blocks change nothing: their gates are zero."""
    for i in blocks:
        ada = model.blocks[i].parts["img"].ada  # type: ignore[union-attr,index]
        torch.nn.init.zeros_(ada.weight)  # type: ignore[arg-type]
        torch.nn.init.zeros_(ada.bias)  # type: ignore[arg-type]
    return model


# ---- patterns and gates ----


def test_patterns_are_the_combinations_in_lexicographic_order() -> None:
    assert options(1, 2).tolist() == [[1, 0], [0, 1]]
    assert options(2, 4).tolist() == [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
    big = options(7, 14)
    assert len(big) == comb(14, 7) == 3432
    assert (big.sum(1) == 7).all()
    assert len(big.unique(dim=0)) == 3432


def test_groups_fill_the_depth_or_are_refused() -> None:
    assert fill_groups(((1, 2),), 28) == FAMILY["TinyDiT-D14"]
    with pytest.raises(Conflict, match="28 blocks"):  # the released setting "2:4 x 7" on 14 blocks
        fill_groups(((2, 4),) * 7, 14)
    for wrong in ([[3, 2]], [[0, 2]], [[20, 40]], []):
        with pytest.raises(ConfigError, match="groups"):
            TinyFusion(groups=wrong)


@pytest.mark.parametrize("groups", [[[1, 2], [1, 2]], [[2, 4]], [[1, 1], [2, 3]]])
def test_each_sample_keeps_n_of_each_group(groups: list[list[int]]) -> None:
    _, method, run = searched(DiT.tiny(), groups, batch=16)
    drawn = [method.masks(g, run.memory[method.label]) for g in range(len(groups))]
    for mask, (n, m) in zip(drawn, groups):
        assert mask.shape == (16, m)
        assert torch.equal(mask.sum(1), torch.full((16,), float(n)))
    assert any(len(mask.unique(dim=0)) > 1 for mask in drawn)  # samples draw for themselves


def test_a_large_gap_leaves_nothing_to_chance() -> None:
    view, method, run = searched(DiT.tiny(), [[1, 2]], batch=64, tau=0.1)
    for theta in method.gates:
        theta.data.copy_(torch.tensor([0.0, 1.0]))  # logits 0 and 100
    assert torch.equal(method.masks(0, run.memory[method.label]), torch.tensor([[0.0, 1.0]]).expand(64, 2))
    assert method.decide().keep == (1, 3)
    assert method.entropy() < 1e-6


def test_a_tie_goes_to_the_first_pattern() -> None:
    view = with_methods(DiT.tiny(), method := TinyFusion())
    assert method.decide().keep == (0, 2)
    assert method.decide().confidence == (0.5, 0.5)
    assert len(prune(view).blocks) == 2


def test_gates_learn_from_both_patterns_and_dropped_samples_teach_no_block() -> None:
    model = DiT.tiny()
    view, method, run = searched(model, [[1, 2]], batch=2, seed=1)
    x, t, cond = model.example(2)
    kept = torch.cat([method.masks(g, run.memory[method.label]) for g in range(2)], 1)
    for row in range(2):
        model.zero_grad()
        method.zero_grad()
        run.step = 0
        view(x, t, run=run, **cond)[row].square().sum().backward()
        for i, block in enumerate(model.blocks):
            total = sum(float(p.grad.abs().sum()) for p in block.parameters() if p.grad is not None)
            assert (total > 0) == bool(kept[row, i])
        for theta in method.gates:
            assert theta.grad is not None
            assert theta.grad.abs().min() > 0
            assert float(theta.grad.sum().abs()) < 1e-5 * float(theta.grad.abs().sum())


def test_all_of_a_group_is_the_base_and_its_gates_learn_nothing() -> None:
    model = DiT.tiny()
    view, method, run = searched(model, [[2, 2]], batch=2)
    x, t, cond = model.example(2)
    out = view(x, t, run=run, **cond)
    assert torch.equal(out, model(x, t, **cond))
    out.square().sum().backward()
    assert all(theta.grad is not None and not theta.grad.any() for theta in method.gates)


def test_noise_must_fit() -> None:
    view = with_methods(DiT.tiny(), method := TinyFusion())
    x, t, cond = view.example(2)
    with pytest.raises(DitkitError, match=r"\(B, 4\)"):
        method.sample(Run(view), torch.zeros(2, 3), 1.0)
    run = Run(view)
    method.sample(run, torch.zeros(3, 4), 1.0)
    with pytest.raises(DitkitError, match="noise for 3 samples"):
        view(x, t, run=run, **cond)


# ---- LoRA beside it ----


def test_lora_beside_the_gates_starts_as_the_base() -> None:
    model = DiT.tiny()
    view = with_methods(model, TinyFusion(groups=[[1, 1]]), LoRA(rank=2, alpha=4.0))
    x, t, cond = model.example()
    assert torch.equal(view(x, t, **cond), model(x, t, **cond))


def test_lora_of_xl_is_the_published_size_but_for_what_stands_outside_the_blocks() -> None:
    """The released LoRA takes time MLP and head too, 8 (fan in + fan out) numbers each: 66,816 of 6,001,920."""
    with_methods(xl(1), lora := LoRA(rank=8, alpha=16.0))
    d = 1152
    outside = 8 * ((256 + d) + 2 * d + (d + 32) + (d + 2 * d))
    assert 28 * parameters(lora) + outside == 6_001_920


# ---- what pruning leaves ----


def test_pruned_equals_gated_bit_for_bit() -> None:
    view, method, _ = searched(DiT.tiny(), [[2, 4]], batch=2)
    method.gates[0].data[4] += 1  # the pattern 0 1 0 1
    x, t, cond = view.example()
    with torch.no_grad():
        small = prune(view)
        assert torch.equal(small(x, t, **cond), view(x, t, **cond))
        assert torch.equal(small(x, t, **cond), keep_blocks(DiT.tiny(), [1, 3])(x, t, **cond))
    assert small.config.depth == 2
    assert not small.methods
    mine = {p.data_ptr() for p in small.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in view.parameters())


@pytest.mark.parametrize("cls", [Flux, PixArt, Lumina, MMDiT])
def test_other_backbones_are_shortened(cls: type[Backbone]) -> None:
    model = cls.tiny()
    keep = [len(model.blocks) - 1]
    x, t, cond = model.example()
    with torch.no_grad():
        if cls is Flux:  # needs a double-stream block
            keep = [0]
        assert relative(shorten(model, keep)(x, t, **cond), keep_blocks(model, keep)(x, t, **cond)) < 1e-6


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_block_that_cannot_take_the_place_of_the_last_is_refused() -> None:
    with pytest.raises(Conflict, match="block 0 of mmdit cannot be block 0 of 1"):
        shorten(MMDiT.tiny(), [0])


def test_pruning_what_is_quantised_is_refused() -> None:
    with pytest.raises(Conflict, match="prune first"):
        prune(with_methods(DiT.tiny(), Int8(), TinyFusion()))


def test_pruning_without_a_search_is_refused() -> None:
    with pytest.raises(DitkitError, match="no tinyfusion"):
        prune(DiT.tiny())


@lru_cache
def xl(depth: int) -> DiT:
    """DiT-XL/2 with ``depth`` blocks, without memory."""
    model = empty_model(Part(name="dit", config={**DiT.sizes["DiT-XL/2"], "depth": depth}))
    assert isinstance(model, DiT)
    return model


@pytest.mark.parametrize("name", FAMILY)
def test_sizes_of_the_family(name: str) -> None:
    depth = 14 if name == "TinyDiT-D7" else 28
    small = xl(sum(n for n, _ in fill_groups(FAMILY[name], depth)))
    assert parameters(small) + small.table_parameters() == COUNTS[name]
    assert len(small.blocks) == int(name.rpartition("D")[2])


def test_half_the_blocks_are_half_the_work() -> None:
    """A block has 12 N D^2 + 2 N^2 D + 6 D^2 multiply-adds (N = 256, D = 1152); what is outside is below 1 % of 28 blocks."""
    n, d = 256, 1152
    block = 12 * n * d * d + 2 * n * n * d + 6 * d * d
    small, one = (count_forward(xl(depth)).macs for depth in (2, 1))
    assert small - one == block
    assert one - block < 0.01 * 28 * block


# ---- the search learns ----


def test_the_search_cuts_out_blocks_that_do_nothing() -> None:
    """Two of four blocks are planted as identities: against the whole network's output, the loss falls to 0 and they go."""
    model = plant_identity(DiT.tiny(), 0, 3).requires_grad_(False)
    view, method, _ = searched(model, [[1, 2]], batch=4)
    x, t, cond = model.example(4)
    want = model(x, t, **cond)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    losses = []
    before = method.entropy()
    for step in range(25):
        run = Run(view)
        u = torch.rand(4, method.num_options, generator=torch.Generator().manual_seed(step))
        method.sample(run, gumbel_noise(u), line((4.0, 0.1), step / 24))
        loss = (view(x, t, run=run, **cond) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])
    assert method.entropy() < 0.5 * before
    assert method.decide().keep == (1, 2)


def test_a_search_and_a_recovery_by_recipes(tmp_path: Path) -> None:
    """From a bundle to a searched one, to a pruned one that loads without any of this, to a recovered one."""
    found, pruned, recovered = (tmp_path / n for n in ("found", "pruned", "recovered"))
    sections = {"base": "digits", "backbone": None, "process": None, "methods": [{"name": "tinyfusion"}, {"name": "lora"}]}
    recipe = tiny_recipe({**sections, "trainable": ["methods.*"], "objective": {"name": "tinyfusion"}}, steps=2)
    train(recipe, found, progress=False)
    pipe = ditkit.from_pretrained(found)
    method = find(pipe.eager)
    assert not torch.equal(method.gates[0], torch.full((2,), 0.02))
    prune_pipeline(pipe, method.decide().keep).save_pretrained(pruned)
    small = ditkit.from_pretrained(pruned).eager
    assert small.config.depth == 3
    assert not small.methods
    x, t, cond = small.example()
    with torch.no_grad():
        want = keep_blocks(ditkit.from_pretrained("digits").eager, method.decide().keep)(x, t, **cond)
        assert torch.equal(small(x, t, **cond), want)
    recipe = tiny_recipe(
        {"base": str(pruned), "backbone": None, "process": None, "objective": {"name": "masked_kd", "config": {"teacher": "digits"}}},
        steps=2,
    )
    assert train(recipe, recovered, progress=False).finished
    assert ditkit.from_pretrained(recovered).eager.config.depth == 3


# ---- the recovery ----


def test_layers_are_paired_as_published() -> None:
    assert even_layers(14, 28) == tuple((i, 2 * i + 1) for i in range(14))
    assert even_layers(7, 14) == tuple((i, 2 * i + 1) for i in range(7))
    ends = [sum(n for n, _ in FAMILY["TinyDiT-D19"][: g + 1]) - 1 for g in range(7)]  # the last kept block of each group
    assert PRESETS["TinyDiT-D19"]["layers"] == tuple((s, 4 * g + 3) for g, s in enumerate(ends))


def test_masks_of_features_by_hand() -> None:
    """One of 16 numbers is an outlier (0.97 of the deviation is its own): 5 against 0; the others differ by 1."""
    s, t = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    s[0, 0, 0], t[0, 0, 0] = 50.0, 1.0
    t[0, 1, 1] = 1.5
    separate = feature_loss([s], [t])  # t's own outlier 1.5 is masked there, and s is 0 at that place; at s's outlier t's 1 counts
    assert float(separate) == pytest.approx(15 / 16)
    assert float(feature_loss([s], [t], mask="intersection")) == pytest.approx(1.0)  # 14 left, each 1
    assert float(feature_loss([s], [t], sigmas=None)) == pytest.approx((49**2 + 14 + 1.5**2) / 16)
    assert float(feature_loss([t], [t])) == 0


@pytest.mark.parametrize("process", [Gaussian(), Flow()])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(process: Gaussian | Flow) -> None:
    out = 6 if isinstance(process, Gaussian) else 3
    model = DiT.tiny(depth=2, out_channels=out)
    objective = MaskedKD(process, MaskedKDConfig(teacher="given", alpha=1.0, label_dropout=1.0))
    objective.learn_from(DiT.tiny(depth=2, out_channels=out), 2)
    x, _, cond = model.example(2)
    batch = {"x": x, "noise": x.flip(0), "time": torch.tensor([0.2, 0.7]), "drop": torch.zeros(2), **cond}
    parts = objective.loss(model, batch).parts
    assert not parts["kd_mse"].any()
    assert not parts["features"].any()
    if "kd_vb" in parts:
        assert parts["kd_vb"].abs().max() < 1e-5
    # as released without features, the teacher keeps the labels that the student lost
    objective.config = MaskedKDConfig(teacher="given", label_dropout=1.0, **PRESETS["released-output-kd"])
    assert (objective.loss(model, batch).parts["kd_mse"] > 0).all()


def test_beta_falls_to_nothing_at_the_last_step() -> None:
    model, process = DiT.tiny(depth=2), Gaussian()
    objective = MaskedKD(process, MaskedKDConfig(teacher="given"))
    objective.learn_from(DiT.tiny(), 2)
    x, _, cond = model.example(2)
    batch = {"x": x, "noise": x.flip(0), "time": torch.tensor([0.2, 0.7]), "drop": torch.ones(2), **cond}
    for progress, beta in ((0.0, 0.01), (0.5, 0.005), (1.0, 0.0)):
        objective.progress = progress
        found = objective.loss(model, batch)
        want = 0.9 * found.parts["teacher"] + 0.1 * found.parts["data"] + beta * found.parts["features"]
        assert torch.allclose(found.loss, want)


def test_layers_that_do_not_exist_are_named() -> None:
    objective = MaskedKD(Gaussian(), MaskedKDConfig(teacher="given", layers=[[0, 9]]))
    with pytest.raises(DitkitError, match="teacher below 4"):
        objective.learn_from(DiT.tiny(), 2)


# ---- the baselines ----


def test_criteria_find_planted_identities() -> None:
    model = plant_identity(DiT.tiny(), 1, 2)
    x, t, cond = model.example(4)
    with torch.no_grad():
        want = model(x, t, **cond)
    similar = block_similarity(model, x, t, **cond)
    assert torch.allclose(similar[[1, 2]], torch.ones(2))
    assert least_needed(similar, 2) == (0, 3)

    def loss(m: Backbone) -> float:
        return float((m(x, t, **cond) - want).square().mean())

    scores = sensitivity(model, loss)
    assert scores[[1, 2]].abs().max() == 0
    assert most_sensitive(scores, 2) == (0, 3)
    found = by_loss(model, 2, loss)
    assert len(found) == comb(4, 2)
    assert found[0].keep == (0, 3)
    assert found[0].loss == 0
    assert [c.loss for c in found] == sorted(c.loss for c in found)


def test_the_last_block_always_stays_by_similarity() -> None:
    assert least_needed(torch.tensor([0.1, 0.9, 0.2, 1.0]), 1) == (0, 2, 3)


def test_random_blocks_follow_the_seed() -> None:
    assert random_blocks(28, 14, 3) == random_blocks(28, 14, 3)
    assert len({random_blocks(28, 14, seed) for seed in range(20)}) == 20
    with pytest.raises(DitkitError, match="1 to 4"):
        random_blocks(4, 5, 0)


def test_a_base_part_is_what_the_pruned_config_says() -> None:
    small = shorten(DiT.tiny(), [0, 3])
    assert Part(name="dit", config=small.config.to_dict()).config["depth"] == 2
