"""FLUX: published counts, and what its mathematics implies."""

import pytest
import torch

from ditkit.backbones.flux import Flux, FluxConfig, finite_half
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.seams import Seam
from ditkit.core.streams import concatenate
from ditkit.eval.counters import count_forward
from ditkit.interop.flux import diffusers_table
from ditkit.nn.positions import Axis
from ditkit.testing.trajectory import relative

PUBLISHED = {"FLUX.1-dev": (11_901_408_320, 1160), "FLUX.1-schnell": (11_891_178_560, 1156)}  # parameters; tensors of diffusers' file


def on_meta(name):
    with torch.device("meta"):
        return Flux(**Flux.sizes[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_tensors_are_the_published_ones(name):
    model = on_meta(name)
    links = diffusers_table(model.config).links()
    assert (sum(p.numel() for p in model.parameters()), sum(len(link.theirs) for link in links.values())) == PUBLISHED[name]
    assert links.keys() == model.state_dict().keys()
    assert set(Flux.sizes) == set(PUBLISHED)


def test_multiply_adds_at_1024_pixels():
    """About 37.2 T with 512 text tokens: 57 blocks of joint attention over 4,096 + 512 tokens. All blocks of a kind cost the same."""

    def cost(depth, single_depth):
        with torch.device("meta"):
            model = Flux(guidance=None, depth=depth, single_depth=single_depth)
            cond = {"text": torch.empty(1, 512, 4096), "pooled": torch.empty(1, 768)}
            return count_forward(model, inputs=(torch.empty(1, 16, 128, 128), torch.empty(1), cond))

    one, two, more = cost(1, 0), cost(2, 0), cost(1, 1)
    double, single = two.macs - one.macs, more.macs - one.macs
    assert one.attention_macs == 2 * 3072 * 4608**2
    assert two.attention_macs == more.attention_macs == 2 * one.attention_macs
    assert (one.macs + 18 * double + 38 * single) / 1e12 == pytest.approx(37.2, abs=0.05)


@pytest.fixture(scope="module")
def tiny():
    return Flux.tiny()


def streams(model):
    x, t, cond = model.example()
    cond.pop("mask")
    return model.embed(x, t, model.prepare(**cond))


@torch.no_grad()
def test_a_fresh_network_is_silent_and_its_blocks_the_identity(tiny):
    model = Flux(tiny.config)
    x, t, cond = model.example()
    assert not model(x, t, **cond).any()
    s = streams(model)
    assert all(torch.equal(block(s, Seam())[n].x, s[n].x) for block in model.blocks for n in s)


@torch.no_grad()
def test_a_single_block_is_one_sequence_of_both_streams(tiny):
    s, block = streams(tiny), tiny.blocks[-1]
    two = block(s, Seam())
    block.streams, both = ("both",), concatenate(s["text"], s["img"])
    one = block({"both": both}, Seam())["both"].x
    block.streams = ("text", "img")
    assert relative(torch.cat([two["text"].x, two["img"].x], 1), one) <= 1e-6


def test_pieces_are_those_of_one_product():
    torch.manual_seed(0)
    module, x = torch.nn.Linear(8, 14), torch.randn(2, 3, 8)
    whole = module(x).split((6, 8), -1)
    learning = Seam().pieces("both.fc1", module, x, (6, 8))
    with torch.no_grad():
        sampling = Seam().pieces("both.fc1", module, x, (6, 8))
    assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(learning, whole))
    assert all(relative(a, b.detach()) <= 1e-6 and a.is_contiguous() for a, b in zip(sampling, whole))


@torch.no_grad()
def test_text_has_no_order_and_padding_is_never_seen(tiny):
    x, t, cond = tiny.example()
    cond["mask"], text = torch.tensor([[1, 1, 1, 0, 0]] * 2), cond["text"]
    masked = tiny(x, t, **cond)
    del cond["mask"]
    whole = tiny(x, t, **cond)
    assert relative(tiny(x, t, **{**cond, "text": text[:, torch.randperm(5)]}), whole) <= 1e-5
    assert relative(masked, tiny(x, t, **{**cond, "text": text[:, :3]})) <= 1e-5
    assert relative(masked, whole) > 1e-3


@torch.no_grad()
def test_only_distances_between_patches_count(tiny):
    """Without text, moving all patches changes nothing; with it, they move away from its place."""
    s, block = streams(tiny), tiny.blocks[-1]
    moved = s["img"]._replace(rope=tiny.rope.table((Axis(1, 3.0), Axis(4, 10.0), Axis(4, -5.0))))
    alone = block({"img": s["img"]}, Seam())["img"].x
    assert relative(block({"img": moved}, Seam())["img"].x, alone) <= 1e-5
    assert relative(block({**s, "img": moved}, Seam())["img"].x, block(s, Seam())["img"].x) > 1e-4


@torch.no_grad()
def test_the_modulation_of_shared_conditioning_is_made_once(tiny):
    calls = []

    class Watch(Seam):
        def linear(self, name, module, x, part=None):
            calls.append(name)
            return super().linear(name, module, x, part)

    s = streams(tiny)
    once = tiny.blocks[-1](s, Watch())
    assert calls.count("both.ada") == 1
    apart = tiny.blocks[-1]({**s, "text": s["text"]._replace(c=s["text"].c.clone())}, Watch())
    assert calls.count("both.ada") == 3
    assert torch.equal(once["img"].x, apart["img"].x)


def test_fp16_stays_finite(tiny):
    s = streams(tiny)
    large = {n: st._replace(x=torch.full_like(st.x, 7e4).half()) for n, st in s.items()}
    assert not large["text"].x.isfinite().any()
    kept = finite_half(large, ("text",))
    assert (kept["text"].x == 65504).all()
    assert kept["img"] is large["img"]
    assert finite_half(s, ("text",)) is s


@torch.no_grad()
def test_each_patch_may_have_its_own_time(tiny):
    x, t, cond = tiny.example()
    assert relative(tiny(x, t[:, None].expand(-1, 16), **cond), tiny(x, t, **cond)) <= 1e-6


@torch.no_grad()
def test_guidance_is_a_number_or_one_for_each_picture(tiny):
    x, t, cond = tiny.example()
    told = {k: v for k, v in cond.items() if k != "guidance"}
    assert torch.equal(tiny(x, t, **told, guidance=3.5), tiny(x, t, **told, guidance=torch.tensor([3.5, 3.5])))
    assert relative(tiny(x, t, **told, guidance=1.0), tiny(x, t, **told, guidance=3.5)) > 1e-3
    assert torch.equal(tiny(x, t, **told), tiny(x, t, **told, guidance=3.5))
    with pytest.raises(DitkitError, match="guidance is 3.5; allowed: none"):
        Flux(tiny.config.model_copy(update={"guidance": None}))(x, t, **told, guidance=3.5)


def test_no_caption_is_zeros_at_the_same_guidance(tiny):
    _, _, cond = tiny.example()
    null = tiny.null(**cond)
    assert null.keys() == cond.keys()
    assert not null["text"].any()
    assert torch.equal(null["guidance"], cond["guidance"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_widths": (16, 56, 58)}, "sum 128"),
        ({"rope_widths": (15, 57, 56)}, "even"),
        ({"input_size": (7, 8)}, "no multiple of patch_size"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        FluxConfig(**change)
