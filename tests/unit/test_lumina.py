"""Flag-DiT and Next-DiT: published counts, and what their mathematics implies."""

import math

import pytest
import torch

from ditkit.backbones.lumina import Lumina, LuminaConfig
from ditkit.conditioning.inputs import takes_text
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.seams import Seam
from ditkit.eval.counters import count_forward
from ditkit.nn.extrapolation import Extrapolation, turns
from ditkit.nn.positions import Rope, apply_rope, frequencies, time_aware
from ditkit.nn.separators import FRAME, LINE, insert, places, remove
from ditkit.testing.trajectory import relative

#: counted on the released code; class networks have 1,001 labels
PARAMETERS = {
    "Flag-DiT-600M": 609_836_576,
    "Flag-DiT-3B": 4_237_824_032,
    "Flag-DiT-7B": 7_293_819_936,
    "Lumina-T2I-5B": 5_046_643_744,
    "Next-DiT-600M": 559_455_776,
    "Next-DiT-2B": 1_763_043_104,
    "Next-DiT-3B": 4_036_300_832,
    "Next-DiT-7B": 7_025_122_336,
    "Lumina-Next-2B": 1_988_524_576,
    "Lumina-Next-2B-GQA": 1_627_386_400,
}
KINDS = {
    "flag text": {"variant": "flag"},
    "flag classes": {"variant": "flag", "text_dim": None, "num_classes": 5},
    "next text": {"num_kv_heads": 2},
    "next classes": {"text_dim": None, "num_classes": 5},
}
TEXTS = [name for name in KINDS if name.endswith("text")]


def small(name, **more):
    return Lumina._small(**{**KINDS[name], **more})


def meta(**values):
    with torch.device("meta"):
        return Lumina(**values)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name):
    assert sum(p.numel() for p in meta(**Lumina.sizes[name]).parameters()) == PARAMETERS[name]
    assert set(Lumina.sizes) == set(PARAMETERS)


@pytest.mark.parametrize("name", ["Flag-DiT-600M", "Lumina-T2I-5B", "Next-DiT-2B", "Lumina-Next-2B-GQA"])
def test_multiply_adds_of_a_block(name):
    """N (2 D^2 + 2 D K d + 3 D F) + 2 N^2 D; with L tokens of text 2 L D_text K d + 2 N L D more; modulation, once, m 4 D or m 6 D."""
    one, two = (meta(**{**Lumina.sizes[name], "input_size": (12, 20), "depth": depth}) for depth in (1, 2))
    cfg = one.config
    text, L = cfg.text_dim, 7
    with torch.device("meta"):
        cond = {"y": torch.empty(1, dtype=torch.int64)} if text is None else {"text": torch.empty(1, L, text)}
        inputs = (torch.empty(1, 4, *cfg.input_size), torch.empty(1), cond)
    a, b = (count_forward(model, inputs=inputs) for model in (one, two))
    n = 6 * (10 + cfg.separated)
    kv = cfg.dim * (cfg.num_kv_heads or cfg.num_heads) // cfg.num_heads
    linear = n * (2 * cfg.dim**2 + 2 * cfg.dim * kv + 3 * cfg.dim * cfg.hidden)
    linear += min(cfg.dim, 1024) * cfg.dim * (6 if cfg.variant == "flag" else 4) + (2 * L * text * kv if text else 0)
    assert b.linear_macs - a.linear_macs == linear
    assert b.attention_macs - a.attention_macs == 2 * cfg.dim * n * (n + (L if text else 0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_network_is_silent_and_its_blocks_the_identity(kind):
    """Only the last layer has a gradient."""
    model = small(kind)
    model.reset_parameters()
    torch.nn.init.normal_(model.patch_embed.bias)
    x, t, cond = model.example()
    s = model.embed(x, t, model.prepare(**cond))
    assert torch.equal(model.blocks[0](s, Seam())["img"].x, s["img"].x)
    out = model(x, t, **cond)
    assert not out.any()
    (out - 1).square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == {"final.proj.weight", "final.proj.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind):
    model = small(kind)
    x, t, cond = model.example(3)
    model(x, t, **cond).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_closed_gate_hides_the_text_and_has_a_gradient(kind):
    model = small(kind)
    torch.nn.init.zeros_(model.caption.proj.weight)  # the pooled text, which comes in beside the time
    for block in model.own_blocks():
        torch.nn.init.zeros_(block.text.gate)
    x, t, cond = model.example()
    out = model(x, t, **cond)
    assert torch.equal(model(x, t, **{**cond, "text": cond["text"].flip(0)}), out)
    out.square().mean().backward()
    text = model.own_blocks()[0].text
    assert text.gate.grad.any()
    assert not any(p.grad.any() for name, p in text.named_parameters() if name != "gate")


@torch.no_grad()
@pytest.mark.parametrize("kind", TEXTS)
def test_a20_padding_of_the_text_changes_nothing(kind):
    model = small(kind)
    x, t, cond = model.example()
    want = model(x, t, **cond)
    for length in (16, 64):
        more = length - cond["text"].shape[1]
        text = torch.nn.functional.pad(cond["text"], (0, 0, 0, more), value=9.0)
        mask = torch.nn.functional.pad(cond["mask"], (0, more))
        assert relative(model(x, t, text=text, mask=mask), want) <= 1e-5


@torch.no_grad()
def test_a_text_without_tokens_is_finite():
    model = small("next text")
    x, t, cond = model.example()
    assert model(x, t, text=cond["text"], mask=torch.zeros_like(cond["mask"])).isfinite().all()


# pictures of several sizes


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"rule": "switch", "scale": 1.5, "proportional": True}], ids=["plain", "scaled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_on_a_canvas_is_as_it_is_alone(kind, how):
    model = small(kind).extrapolating(**how)
    sizes = [(4, 10), (8, 6), (6, 2)]
    x, t, cond = model.example(3)
    x = torch.randn(3, 4, 8, 10, generator=torch.Generator().manual_seed(2))
    together = model(x, t, **cond, sizes=torch.tensor(sizes))
    for i, (h, w) in enumerate(sizes):
        one = model(x[i : i + 1, :, :h, :w], t[i : i + 1], **{k: v[i : i + 1] for k, v in cond.items()})
        assert relative(together[i, :, :h, :w], one[0]) <= 1e-5
        assert not together[i, :, h:].any()
        assert not together[i, :, :, w:].any()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (torch.tensor([[4, 5], [4, 4]]), "a picture of 4 x 5; allowed: multiples of 2"),
        (torch.tensor([[4, 4], [10, 4]]), "not larger than x"),
        (torch.tensor([[4, 4]]), "one for each sample"),
        (torch.tensor([[4.0, 4.0], [4.0, 4.0]]), "whole numbers"),
    ],
)
def test_wrong_sizes_are_named(sizes, message):
    model = small("next text")
    x, t, cond = model.example()
    with pytest.raises(DitkitError, match=message):
        model(x, t, **cond, sizes=sizes)


def test_a_scale_that_follows_the_picture_needs_one_size():
    model = small("next text").extrapolating(rule="ntk")
    with pytest.raises(DitkitError, match=r"give extrapolation\.scale"):
        model.prepare(text=torch.zeros(1, 2, 10), sizes=torch.tensor([[4, 4]]))


# tokens


@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (2, 3, 4)])
def test_separators_come_out_as_they_went_in(grid):
    n = math.prod(grid)
    tokens = torch.arange(2.0 * n).view(2, n, 1)
    line, frame = torch.tensor([-1.0]), torch.tensor([-2.0])
    whole = insert(tokens, grid, line, frame if len(grid) == 3 else None)
    assert torch.equal(remove(whole, grid), tokens)
    coords, role = places(grid)
    assert torch.equal(role[0] == LINE, whole[0, :, 0] == -1)
    assert torch.equal(role[0] == FRAME, whole[0, :, 0] == -2)
    assert whole.shape[1] == (grid[0] * (grid[1] + 1) if len(grid) == 2 else grid[0] * (grid[1] * (grid[2] + 1) + 1))
    assert len(coords[0].unique(dim=0)) == coords.shape[1]
    ordered = sorted(map(tuple, coords[0].tolist()))
    assert ordered == [tuple(c) for c in coords[0].tolist()]


@torch.no_grad()
def test_a_row_of_one_more_column_has_the_positions_of_its_sequence():
    """Flag-DiT counts along rows and their ends."""
    model = small("flag text")
    x, t, cond = model.example()
    s = model.embed(x, t, model.prepare(**cond))["img"]
    table = Rope((8,)).table((4 * 7,))
    assert all(torch.equal(a, b) for a, b in zip(s.rope, table))
    assert torch.equal(s.x[:, 6::7], model.separators.line.expand(2, 4, -1))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["flag", "next"])
@pytest.mark.parametrize(("size", "tokens"), [((3, 4, 6), (3 * (2 * 4 + 1), 3 * 2 * 3)), ((10,), (5, 5))], ids=["clip", "sound"])
def test_clips_and_sound(variant, size, tokens):
    model = Lumina._small(variant=variant, input_size=size, dim=48)
    x, t, cond = model.example()
    s = model.embed(x, t, model.prepare(**cond))["img"]
    assert s.x.shape[1] == tokens[variant == "next"]
    assert model(x, t, **cond).shape == (2, 8, *size)
    per_patch = torch.stack([t] * math.prod(model.config.grid), 1)
    assert relative(model(x, per_patch, **cond), model(x, t, **cond)) <= 1e-5


def test_the_end_of_a_frame_is_learned():
    model = Lumina._small(variant="flag", input_size=(2, 4, 4))
    x, t, cond = model.example()
    model(x, t, **cond).square().mean().backward()
    assert model.separators.frame.grad.any()


# attention


@torch.no_grad()
def test_grouped_queries_are_all_heads_with_repeated_keys():
    grouped = small("next text", qk_norm=False)
    whole = small("next text", qk_norm=False, num_kv_heads=None)
    state = grouped.state_dict()
    for name in [n for n in state if n.endswith(".kv.weight")]:
        state[name] = state[name].unflatten(0, (2, 2, 8)).repeat_interleave(2, 1).flatten(0, 2)
    whole.load_state_dict(state)
    x, t, cond = grouped.example()
    assert relative(whole(x, t, **cond), grouped(x, t, **cond)) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_proportional_attention_is_plain_at_the_trained_size(kind):
    model = small(kind)
    x, t, cond = model.example()
    sharp = model.extrapolating(proportional=True)
    assert torch.equal(sharp(x, t, **cond), model(x, t, **cond))
    large = torch.cat([x, x], 2)
    assert relative(sharp(large, t, **cond), model(large, t, **cond)) > 1e-5
    assert not any(b.base_tokens for b in model.own_blocks()), "the base is left alone"


def test_positions_are_relative_by_row_and_column():
    rope = Rope((8, 8), mix="alternating")
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=g) for _ in range(2))

    def score(a, b):
        turned = [apply_rope(u, rope.at(torch.tensor([[p]], dtype=torch.float64))) for u, p in ((q, a), (k, b))]
        return float((turned[0] * turned[1]).sum())

    assert score((5.0, 9.0), (2.0, 11.0)) == pytest.approx(score((3.0, -2.0), (0.0, 0.0)), abs=1e-5)
    assert score((5.0, 9.0), (2.0, 11.0)) != pytest.approx(score((3.0, 2.0), (0.0, 0.0)), abs=1e-2)


# larger pictures

RULES = ("interpolation", "ntk", "switch", "time_aware", "frequency_aware")


def test_ntk_leaves_the_first_frequency_and_divides_the_last():
    """By r^((d - 4) / d), d the head's width, of which each axis has a half."""
    d, r = 16, 3.0
    (plain,), (scaled,) = (turns(Rope((d // 2,)), Extrapolation(rule=rule), r, (64,)) for rule in ("none", "ntk"))
    assert scaled[0] == plain[0]
    assert float(plain[-1] / scaled[-1]) == pytest.approx(r ** ((d - 4) / d))


@pytest.mark.parametrize("rule", RULES)
def test_a_scale_of_one_changes_nothing(rule):
    t = torch.tensor([0.1, 0.9])
    (got,) = turns(Rope((8,)), Extrapolation(rule=rule), 1.0, (64,), t)
    assert (got - frequencies(8)).abs().max() < 1e-12


def test_time_goes_from_interpolation_at_noise_to_ntk_at_data():
    rope, t = Rope((16,)), torch.tensor([0.0, 0.299, 0.3, 1.0])
    interpolated, ntk = frequencies(16, linear=2.0), frequencies(16, ntk=2.0)
    (switched,) = turns(rope, Extrapolation(rule="switch"), 2.0, (64,), t)
    assert torch.equal(switched[:, 0], torch.stack([interpolated, interpolated, ntk, ntk]))
    (smooth,) = turns(rope, Extrapolation(rule="time_aware"), 2.0, (64,), t)
    assert (smooth[0, 0, 1:] - interpolated[1:]).abs().max() < 1e-12
    assert (smooth[3, 0] - ntk).abs().max() < 1e-12
    assert (smooth[1, 0] - time_aware(16, 2.0, float(1 - t[1]))).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_larger_picture_is_the_same_in_any_batch_and_the_trained_size_is_as_before(kind, rule):
    """Each sample has positions for its own time."""
    model = small(kind)
    larger = model.extrapolating(rule=rule)
    x, _, cond = model.example()
    t = torch.tensor([0.1, 0.8])
    assert torch.equal(larger(x, t, **cond), model(x, t, **cond))
    big = torch.cat([x, x.flip(2)], 2)
    together = larger(big, t, **cond)
    assert relative(together, model(big, t, **cond)) > 1e-5
    alone = [larger(big[i : i + 1], t[i : i + 1], **{k: v[i : i + 1] for k, v in cond.items()}) for i in range(2)]
    assert relative(torch.cat(alone), together) <= 1e-5


# errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads 3: each must divide"),
        ({"dim": 2336}, "heads of width 73"),
        ({"dim": 64}, "heads of width 2: rotary positions on 2 axes need a multiple of 4"),
        ({"input_size": (8, 9)}, r"no multiple of the patch \(2, 2\)"),
        ({"extrapolation": {"rule": "yarn"}}, "extrapolation.rule"),
        ({"variants": "flag"}, "did you mean 'variant'"),
    ],
)
def test_configurations_that_cannot_be_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LuminaConfig.parse(values)


@pytest.mark.parametrize(
    ("kind", "cond", "message"),
    [
        ("next text", {}, r"conditioning is \[\]; allowed: \['text'\]"),
        ("next text", {"y": torch.zeros(2, dtype=torch.int64)}, r"conditioning is \['y'\]; allowed: \['text'\]"),
        ("flag classes", {"text": torch.zeros(2, 3, 10)}, r"allowed: \['y'\]"),
        ("flag classes", {"y": torch.tensor([0, 6])}, "class label 6"),
        ("flag text", {"text": torch.zeros(2, 3, 9)}, r"text is \(2, 3, 9\)"),
        ("flag text", {"text": torch.zeros(3, 3, 10)}, "2 pictures and 3 texts"),
    ],
)
def test_wrong_conditioning_is_named(kind, cond, message):
    model = small(kind)
    x, t, _ = model.example()
    with pytest.raises(DitkitError, match=message):
        model(x, t, **cond)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_said_by_null(kind):
    model = small(kind)
    x, t, cond = model.example()
    null = model.null(**cond)
    assert null.keys() == cond.keys()
    name = next(iter(cond))
    other = {**cond, name: cond[name].flip(0)}
    assert torch.equal(model(x, t, **model.null(**other)), model(x, t, **null))


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_says_whether_it_is_told_captions(kind):
    assert takes_text(small(kind)) == (kind in TEXTS)
