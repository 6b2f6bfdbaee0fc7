"""MM-DiT: published counts, and what its mathematics implies."""

import pytest
import torch

from ditkit.backbones.dit import draw_parameters
from ditkit.backbones.mmdit import MMDiT, MMDiTConfig
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.seams import Seam
from ditkit.core.streams import concatenate
from ditkit.eval.counters import count_forward
from ditkit.interop.mmdit import diffusers_table
from ditkit.nn.adaln import AdaLNBlock, AdaLNPart
from ditkit.testing.trajectory import relative

PUBLISHED = {  # parameters; tensors of diffusers' file
    "SD3-medium": (2_028_328_000, 683),
    "SD3.5-medium": (2_243_171_520, 909),
    "SD3.5-large": (8_056_627_520, 1227),
}


def on_meta(name):
    with torch.device("meta"):
        return MMDiT(**MMDiT.sizes[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_tensors_are_the_published_ones(name):
    model = on_meta(name)
    theirs = [n for link in diffusers_table(model.config).links().values() for n in link.theirs]
    assert (sum(p.numel() for p in model.parameters()), len(set(theirs))) == PUBLISHED[name]
    assert diffusers_table(model.config).links().keys() == model.state_dict().keys()
    assert set(MMDiT.sizes) == set(PUBLISHED)


def test_multiply_adds_at_1024_pixels():
    """About 4.4 T with 333 text tokens: 24 blocks of joint attention over 4,096 + 333 tokens."""
    model = on_meta("SD3-medium")
    with torch.device("meta"):
        cond = {"text": torch.empty(1, 333, 4096), "pooled": torch.empty(1, 2048)}
        cost = count_forward(model, inputs=(torch.empty(1, 16, 128, 128), torch.empty(1), cond))
    n, text, d = 4096, 333, 1536
    queries = 23 * (n + text) + n  # the last block's text asks nothing
    assert cost.attention_macs == 2 * d * (n + text) * queries
    assert cost.macs / 1e12 == pytest.approx(4.4, abs=0.05)


@pytest.fixture(scope="module")
def tiny():
    return MMDiT.tiny()


@torch.no_grad()
def test_a_fresh_network_is_silent_and_its_blocks_the_identity(tiny):
    model = MMDiT(tiny.config)
    x, t, cond = model.example()
    assert not model(x, t, **cond).any()
    s = model.embed(x, t, model.prepare(**cond))
    assert all(torch.equal(block(s, Seam())[n].x, s[n].x) for block in model.blocks for n in s)


@torch.no_grad()
def test_with_equal_weights_two_streams_are_one():
    torch.manual_seed(0)
    part = draw_parameters(AdaLNPart(24, 3, qk_norm=True))
    model = MMDiT.tiny()
    x, t, cond = model.example()
    s = model.embed(x, t, model.prepare(text=cond["text"], pooled=cond["pooled"]))
    two = AdaLNBlock({"img": part, "text": part})(s, Seam())
    one = AdaLNBlock({"both": part})({"both": concatenate(s["img"], s["text"])}, Seam())["both"].x
    assert relative(torch.cat([two["img"].x, two["text"].x], 1), one) <= 1e-6


@torch.no_grad()
def test_text_has_no_order_and_padding_is_never_seen(tiny):
    x, t, cond = tiny.example()
    text, pooled, mask = cond["text"], cond["pooled"], torch.tensor([[1, 1, 1, 0, 0]] * 2)
    whole = tiny(x, t, text=text, pooled=pooled)
    assert relative(tiny(x, t, text=text[:, torch.randperm(5)], pooled=pooled), whole) <= 1e-5
    short = tiny(x, t, text=text[:, :3], pooled=pooled)
    assert relative(tiny(x, t, text=text, pooled=pooled, mask=mask), short) <= 1e-5
    assert relative(short, whole) > 1e-3


@torch.no_grad()
def test_dual_attention_sees_the_blocks_input(tiny):
    """Without the joint attention's and the MLP's gates, what it adds is what a plain self-attention block adds."""
    x, t, cond = tiny.example()
    s = tiny.embed(x, t, tiny.prepare(**cond))
    block = MMDiT.tiny().blocks[0]
    d = tiny.config.dim
    dual, plain = block.parts["img"], AdaLNPart(d, tiny.config.num_heads, qk_norm=True)
    for chunk in (2, 5):  # both gates
        dual.ada.weight[chunk * d : (chunk + 1) * d] = 0
        dual.ada.bias[chunk * d : (chunk + 1) * d] = 0
    plain.ada.weight.zero_()
    plain.ada.bias.zero_()
    plain.ada.weight[: 3 * d], plain.ada.bias[: 3 * d] = dual.ada.weight[6 * d :], dual.ada.bias[6 * d :]
    for mine, theirs in ((plain.qkv, dual.qkv2), (plain.proj, dual.proj2), (plain.q_norm, dual.q_norm2), (plain.k_norm, dual.k_norm2)):
        mine.load_state_dict(theirs.state_dict())
    want = AdaLNBlock({"img": plain})({"img": s["img"]}, Seam())["img"].x
    assert relative(block(s, Seam())["img"].x, want) <= 1e-6


def test_a_grid_has_the_middle_of_the_table(tiny):
    large, small = tiny.crop(5, 7).unflatten(1, (5, 7)), tiny.crop(3, 5).unflatten(1, (3, 5))
    assert torch.equal(large[:, 1:-1, 1:-1], small)
    with pytest.raises(DitkitError, match="at most 7 a side"):
        tiny.crop(3, 8)


@torch.no_grad()
def test_each_patch_may_have_its_own_time(tiny):
    x, t, cond = tiny.example()
    assert relative(tiny(x, t[:, None].expand(-1, 16), **cond), tiny(x, t, **cond)) <= 1e-6


def test_no_caption_is_zeros_of_the_same_form(tiny):
    x, t, cond = tiny.example()
    null = tiny.null(**cond)
    assert null.keys() == cond.keys()
    assert not null["text"].any()
    assert tiny(x, t, **null).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(2, 5, 9)}, r"text is \(2, 5, 9\); allowed: \(B, L, 10\)"),
        ({"pooled": torch.zeros(2, 5)}, r"pooled is \(2, 5\); allowed: \(2, 6\)"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask is \(2, 4\)"),
        ({"text": torch.zeros(1, 5, 10), "pooled": torch.zeros(1, 6), "mask": None}, "2 pictures and 1 texts"),
    ],
)
def test_wrong_conditioning_is_named(tiny, change, message):
    x, t, cond = tiny.example()
    with pytest.raises(DitkitError, match=message):
        tiny(x, t, **{**cond, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 25}, "no multiple of num_heads"),
        ({"dual_attention": (24,)}, "dual_attention"),
        ({"input_size": (512, 512)}, "larger than the position table"),
        ({"input_size": (33, 32)}, "no multiple of patch_size"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        MMDiTConfig(**change)
