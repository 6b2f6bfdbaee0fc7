"""LoRA: W x + (alpha / r) B A x at the seam ``linear``, alone, with FORA, with others of its kind, over files and graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditkit.backbones.dit import DiT
from ditkit.core.backbone import Backbone, count_graphs
from ditkit.core.errors import ConfigError, Conflict, DitkitError
from ditkit.core.files import read_tensors, write_tensors
from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.core.view import keep_blocks, with_methods
from ditkit.methods.adaptation.lora import LoRA, LoRAConfig, seam_projections
from ditkit.methods.efficiency.fora import FORA
from ditkit.testing.trajectory import STEPS, Counted, relative, sample, steps


@pytest.fixture
def dit() -> DiT:
    return DiT.tiny()


def drawn(lora: LoRA, model: Backbone, seed: int = 0) -> LoRA:
    """The LoRA built for ``model``, every number drawn."""
    lora.build(model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora.parameters():
            p.normal_(0, 0.3, generator=g)
    return lora


def by_hand(model: Backbone, lora: LoRA, strength: float = 1.0) -> Backbone:
    """A copy of the model with W + strength alpha / r B A written into its weights."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in seam_projections(twin).items():
            if name in lora.targets:
                pair, t = lora.pair(name), lora.targets[name]
                module.weight += strength * t.alpha / t.rank * pair.B @ pair.A  # type: ignore[operator]
    return twin


def forward(model: Backbone, **options: Any) -> Tensor:
    x, t, cond = model.example()
    with torch.no_grad():
        return model(x, t, **cond, **options)


# What it computes


@pytest.mark.parametrize(
    "values", [dict(rank=3), dict(rank=3, alpha=7.5), dict(rank=2, ranks={"qkv": 5}, alphas={"blocks.1.img.fc2": 9.0})]
)
def test_the_output_is_that_of_the_changed_weights(dit: DiT, values: dict[str, Any]) -> None:
    lora = drawn(LoRA(**values), dit)
    assert relative(sample(with_methods(dit, lora)), sample(by_hand(dit, lora))) < 1e-6


def test_a_fresh_one_and_strength_zero_are_the_base_bit_for_bit(dit: DiT) -> None:
    base = sample(dit)
    assert torch.equal(sample(with_methods(dit, LoRA(rank=4))), base)
    assert torch.equal(sample(with_methods(dit, drawn(LoRA(strength=0.0), dit))), base)
    view = with_methods(dit, drawn(LoRA(rank=4), dit))
    assert torch.equal(forward(view, run=Run(view, active=())), forward(dit))
    assert not torch.equal(sample(view), base)
    assert torch.equal(sample(dit), base)


def test_alpha_none_is_the_rank_of_each_target(dit: DiT) -> None:
    lora = LoRA(rank=4, ranks={"img.fc1": 2})
    lora.build(dit)
    assert {t.scale for t in lora.targets.values()} == {1.0}
    assert {t.rank for t in lora.targets.values()} == {2, 4}


def test_the_number_of_parameters_is_the_published_one() -> None:
    """TinyFusion's LoRA of every linear layer of DiT-XL/2 has 6,001,920 numbers at r = 8; time MLP and head have 8,352 r of them."""
    with torch.device("meta"):
        model = DiT(**DiT.sizes["DiT-XL/2"])
        lora = LoRA(rank=8)
        lora.build(model)
    assert sum(p.numel() for p in lora.parameters()) == 6_001_920 - 8 * 8_352


def test_a_half_precision_model_gets_half_precision_factors(dit: DiT) -> None:
    view = with_methods(dit.bfloat16(), LoRA(rank=2))
    assert {p.dtype for p in view.methods.parameters()} == {torch.bfloat16}


# Which projections


@pytest.mark.parametrize(
    ("include", "count"),
    [("", 20), ("qkv", 4), (r"^img\.(qkv|proj)$", 8), (r"^blocks\.[01]\.", 10), (("qkv", "img.proj"), 8), (("blocks.2.img.fc1", "fc2"), 5)],
)
def test_targets_are_chosen_by_expression_or_name(dit: DiT, include: Any, count: int) -> None:
    lora = LoRA(include=include, rank=2)
    lora.build(dit)
    assert len(lora.targets) == count
    assert list(lora.targets) == [n for n in seam_projections(dit) if n in lora.targets]


@pytest.mark.parametrize("values", [dict(include="q_kv"), dict(include=("qkv", "to_q")), dict(include="proj", ranks={"qkv": 2})])
def test_what_matches_nothing_is_refused_with_what_there_is(dit: DiT, values: dict[str, Any]) -> None:
    with pytest.raises(Conflict, match=r"matches '(q_kv|to_q|qkv)'.*img\.proj"):
        with_methods(dit, LoRA(**values))


@pytest.mark.parametrize(
    "values",
    [
        dict(rank=0),
        dict(alpha=0.0),
        dict(include="(("),
        dict(include=()),
        dict(window=(0.5, 0.5)),
        dict(ranks={"qkv": 0}),
        dict(label="a.b"),
        dict(ranl=4),
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="|".join(values)):
        LoRA(**values)


# When and how strongly


def test_strength_follows_window_and_schedule() -> None:
    lora = LoRA(strength=2.0, schedule=(0.0, 1.0), window=(0.25, 1.0)).eval()
    assert [lora.strength(s, 5) for s in range(5)] == [0.0, 0.0, 1.0, 1.5, 2.0]
    halves = [LoRA(window=w).eval() for w in ((0.0, 0.5), (0.5, 1.0))]
    assert [[h.strength(s, 5) for s in range(5)] for h in halves] == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert lora.scheduled
    assert not LoRA(schedule=(0.5,)).scheduled


def test_outside_its_window_it_is_absent_inside_it_has_the_strength_of_the_step(dit: DiT) -> None:
    lora = drawn(LoRA(rank=2, schedule=(0.0, 2.0), window=(0.3, 1.0)), dit)
    view = with_methods(dit, lora)
    run = Run(view, STEPS)
    for step in run.steps():
        out, strength = forward(view, run=run), lora.strength(step, STEPS)
        assert strength == (2.0 * step / (STEPS - 1) if step >= 2 else 0)
        if not strength:
            assert torch.equal(out, forward(dit))
        assert relative(out, forward(by_hand(dit, lora, strength))) < 1e-6
    assert run.finish()["lora"] == {"active_steps": 4, "steps": STEPS}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("values", "graphs"),
    [
        (dict(schedule=(0.2, 1.0, 0.4)), 1),
        (dict(window=(0.5, 1.0), schedule=(0.2, 1.0)), 2),
        (dict(ranks={"blocks.0.img.qkv": 3}), 2),
    ],
)
def test_a_strength_that_varies_by_step_needs_no_graph_of_its_own(dit: DiT, values: dict[str, Any], graphs: int) -> None:
    """One graph for all blocks and steps; one more where it is absent; one more where a block has other ranks."""
    base = keep_blocks(dit, [0, 1])
    view = with_methods(base, drawn(LoRA(rank=2, **values), base))
    torch._dynamo.reset()
    counted = Counted(view, "block")
    assert count_graphs(counted.model, STEPS) == graphs
    assert torch.equal(sample(counted.model), sample(view))
    assert counted.graphs == graphs


def test_in_training_it_always_acts_at_its_strength(dit: DiT) -> None:
    lora = drawn(LoRA(rank=2, strength=0.5, window=(0.9, 1.0), schedule=(0.0, 1.0)), dit)
    view = with_methods(dit, lora)
    assert not lora.training, "it follows the mode of the view"
    assert relative(forward(view.train()), forward(by_hand(dit, lora, 0.5))) < 1e-6
    assert torch.equal(forward(view.eval()), forward(dit))


# Training


def test_training_its_parameters_leaves_the_base_alone(dit: DiT) -> None:
    before = {n: p.clone() for n, p in dit.named_parameters()}
    lora = LoRA(rank=2)
    view = with_methods(dit, lora).train()
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2)
    x, t, cond = dit.example(4)
    losses = []
    for _ in range(8):
        loss = view(x, t, **cond).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            grads = {n: float(p.grad.abs().sum()) for n, p in lora.named_parameters()}  # type: ignore[union-attr]
            assert all((g > 0) == n.endswith(".B") for n, g in grads.items()), "B is zero, so A has no gradient yet"
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in dit.named_parameters())
    assert {n for n, _ in view.named_parameters()} == {*before, *(f"methods.lora.{n}" for n, _ in lora.named_parameters())}


# Merging


def test_merged_weights_are_the_same_model(dit: DiT) -> None:
    one, two = drawn(LoRA(rank=3, strength=0.7, schedule=(0.5,)), dit, 1), drawn(LoRA(rank=2, include="fc", label="two"), dit, 2)
    view, base = with_methods(dit, one, two, FORA(interval=2)), sample(dit)
    merged = one.merge(view)
    assert list(merged.methods) == ["fora", "two"]
    assert relative(sample(merged), sample(view)) < 1e-6
    assert relative(sample(two.merge(merged)), sample(view)) < 1e-6
    assert torch.equal(sample(dit), base)
    assert set(dict(one.merge(with_methods(dit, one)).state_dict())) == set(dit.state_dict())


def test_what_cannot_be_merged_is_refused(dit: DiT) -> None:
    with pytest.raises(DitkitError, match="is not attached"):
        LoRA().merge(dit)
    varying = LoRA(rank=2, window=(0.0, 0.5))
    with pytest.raises(Conflict, match="varies by step"):
        varying.merge(with_methods(dit, varying))
    lora = LoRA(rank=2)
    with pytest.raises(Conflict, match="is a Rounded"):
        lora.merge(with_methods(dit, lora, Rounding()))


class Rounded(nn.Module):
    """A projection without a floating-point weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", (linear.weight.detach() * 64).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias)


class Rounding(Method):
    """Replaces every projection of the blocks."""

    name, stage = "rounding", "numbers"

    def replace(self, path: str, module: nn.Module) -> nn.Module | None:
        return Rounded(module) if path.startswith("blocks") and isinstance(module, nn.Linear) else None


def test_it_stands_outside_quantised_projections_in_either_order(dit: DiT) -> None:
    lora = drawn(LoRA(rank=2), dit)
    first, second = with_methods(with_methods(dit, lora), Rounding()), with_methods(with_methods(dit, Rounding()), lora)
    assert torch.equal(sample(first), sample(second))
    late = with_methods(with_methods(dit, Rounding()), LoRA(rank=2, label="late"))
    assert torch.equal(sample(late), sample(with_methods(dit, Rounding())))
    assert {p.dtype for p in late.methods["late"].parameters()} == {torch.float32}


# Together


def test_several_add_up_and_need_labels(dit: DiT) -> None:
    style, subject = drawn(LoRA(rank=2, label="style"), dit, 1), drawn(LoRA(rank=3, include="attn|qkv", label="subject"), dit, 2)
    view = with_methods(dit, style, subject)
    assert torch.equal(sample(view), sample(with_methods(with_methods(dit, subject), style)))
    assert relative(sample(view), sample(by_hand(by_hand(dit, style), subject))) < 1e-6
    assert relative(forward(view, run=Run(view, active=("style",))), forward(by_hand(dit, style))) < 1e-6
    with pytest.raises(Conflict, match="attached twice"):
        with_methods(dit, LoRA(), LoRA(rank=2))


@pytest.mark.compile
@pytest.mark.parametrize(
    ("values", "grain"), [(dict(), "block"), (dict(), "step"), (dict(window=(0.5, 1.0), schedule=(0.2, 1.0)), "block")]
)
def test_with_fora(dit: DiT, values: dict[str, Any], grain: str) -> None:
    """Any order of attaching; compiled equals eager bit for bit; as many graphs as computed; a second run adds none."""
    base = keep_blocks(dit, [0, 1])
    lora, fora = drawn(LoRA(rank=2, **values), base), FORA(interval=2)
    view = with_methods(with_methods(base, lora), fora)
    out = sample(view)
    assert torch.equal(sample(with_methods(base, fora, lora)), out)
    torch._dynamo.reset()
    counted = Counted(view, grain)
    expected = count_graphs(counted.model, STEPS)
    assert torch.equal(sample(counted.model), out)
    assert counted.graphs == expected
    sample(counted.model, seed=1)
    assert counted.graphs == expected


def test_under_fora_the_reused_steps_equal_those_of_the_changed_weights(dit: DiT) -> None:
    lora = drawn(LoRA(rank=2), dit)
    pairs = zip(steps(with_methods(dit, lora, FORA(interval=3))), steps(with_methods(by_hand(dit, lora), FORA(interval=3))))
    with torch.no_grad():
        assert all(relative(a, b) < 1e-6 for a, b in pairs)


# State


def test_config_and_state_make_it_again(dit: DiT, tmp_path: Any) -> None:
    """Ranks per target included: what a bundle stores."""
    lora = drawn(LoRA(rank=2, ranks={"qkv": 3, "blocks.1.img.qkv": 5}, alphas={"fc1": 4.0}, schedule=(0.1, 0.9), label="style"), dit)
    write_tensors(tmp_path / "style.safetensors", lora.state_dict())
    again = LoRA(LoRAConfig.parse(lora.config.to_dict()))
    view = with_methods(dit, again)
    again.load_state_dict(read_tensors(tmp_path / "style.safetensors", {n: tuple(p.shape) for n, p in again.state_dict().items()}))
    assert again.targets == lora.targets
    assert again.targets["blocks.1.img.qkv"].rank == 5
    assert torch.equal(sample(view), sample(with_methods(dit, lora)))


def test_one_of_another_size_is_refused(dit: DiT) -> None:
    lora = LoRA(rank=2)
    lora.build(dit)
    with pytest.raises(Conflict, match="other sizes"):
        with_methods(DiT(input_size=(8, 12), in_channels=3, dim=16, depth=4, num_heads=4, num_classes=5), lora)


def test_the_description_gives_rank_alpha_scale_and_change(dit: DiT) -> None:
    lora = drawn(LoRA(rank=2, alpha=3.0, include="proj"), dit)
    told = lora.describe()
    assert [t.name for t in told] == [f"blocks.{i}.img.proj" for i in range(4)]
    for t in told:
        pair = lora.pair(t.name)
        assert (t.rank, t.alpha, t.scale) == (2, 3.0, 1.5)
        assert t.max_delta == pytest.approx(1.5 * float((pair.B @ pair.A).detach().abs().max()), rel=1e-6)
    assert "rank 2, alpha 3, scale 1.5" in str(told[0])


# Swapping


@pytest.mark.compile
def test_another_takes_its_place_without_a_new_graph(dit: DiT) -> None:
    lora = drawn(LoRA(rank=4, alpha=2.0), dit, 1)
    small = drawn(LoRA(rank=3, alpha=9.0, include=("qkv", "fc1")), dit, 2)
    view = with_methods(dit, lora)
    torch._dynamo.reset()
    counted = Counted(view, "block")
    sample(counted.model)
    lora.swap(small)
    assert relative(sample(counted.model), sample(with_methods(dit, small))) < 1e-6
    assert counted.graphs == 1
    with pytest.raises(Conflict, match=r"style adapts blocks\.0\.img\.ada at rank 5"):
        lora.swap(drawn(LoRA(rank=5, label="style"), dit))
