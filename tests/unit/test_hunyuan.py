"""Hunyuan-DiT: counts, long skips, padding, positions, cutting blocks out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditkit.backbones.dit import draw_parameters
from ditkit.backbones.hunyuan import Hunyuan, HunyuanConfig
from ditkit.core.errors import ConfigError, Conflict, DitkitError
from ditkit.core.seams import Seam
from ditkit.core.view import keep_blocks, with_methods
from ditkit.eval.counters import count_forward
from ditkit.interop import hunyuan
from ditkit.methods.adaptation.lora import LoRA
from ditkit.nn.pooling import AttentionPool
from ditkit.nn.positions import coordinates, fitted
from ditkit.testing.trajectory import relative

PARAMETERS = {"HunyuanDiT-v1.1": 1_516_534_048, "HunyuanDiT-v1.2": 1_499_952_032}


def drawn(**more: Any) -> Hunyuan:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(in_channels=3, out_channels=3, patch_size=1, dim=16, depth=6, num_heads=2, mlp_ratio=2.0)
    sizes |= dict(input_size=(4, 6), position_base=4, text_dim=6, text_length=3, t5_dim=8, t5_length=4, pooled_dim=5)
    return draw_parameters(Hunyuan(**{**sizes, **more})).eval()


def parameters(name: str, depth: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Hunyuan(**{**Hunyuan.sizes[name], "depth": depth}).parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name: str) -> None:
    """Of 40 blocks; two more of them are one with a long skip and one without."""
    two, four = parameters(name, 2), parameters(name, 4)
    assert two + 19 * (four - two) == PARAMETERS[name]


def test_the_released_skips() -> None:
    """Blocks 0 to 18 give, 21 to 39 take, the last first."""
    assert HunyuanConfig().long_skips() == tuple(zip(range(19), range(39, 20, -1)))
    assert drawn().skips == ((0, 5), (1, 4))


def test_macs_are_the_formula() -> None:
    """Of one block with a skip and one without; 24 tokens of the picture, 7 of the text, one shift for all."""

    def macs(depth: int) -> int:
        model = drawn(depth=depth)
        return count_forward(model, inputs=model.example(1)).macs

    d, n, length = 16, 24, 7
    attention = 4 * n * d * d + 2 * n * n * d
    cross = 2 * n * d * d + 2 * length * 6 * d + 2 * n * length * d
    block = attention + cross + d * d + 2 * n * d * 2 * d
    assert macs(4) - macs(2) == 2 * block + n * 2 * d * d


@torch.no_grad()
def test_without_the_skip_half_early_outputs_do_not_return() -> None:
    """Zeroing what block 5 reads of block 0, nothing of block 0's output is left but what went through the blocks between."""
    model = drawn()
    x, t, cond = model.example()
    before = model(x, t, **cond)
    last = model.own_blocks()[5]
    assert last.skip is not None
    assert last.skip_norm is not None
    last.skip.weight[:, 16:] = 0
    assert relative(model(x, t, **cond), before) > 1e-3
    s = model.embed(x, t, model.prepare(**cond))
    skips = [{"img": torch.randn(2, 24, 16)} for _ in range(2)]
    # the norm is over both halves: what is left of the skip is the scale
    normed = [torch.nn.functional.layer_norm(u["img"], (16,)) for u in skips]
    outs = [
        last(s, Seam(), skip={"img": u * s["img"].x.std(-1, keepdim=True) + s["img"].x.mean(-1, keepdim=True)})["img"].x for u in normed
    ]
    assert relative(outs[0], outs[1]) < 1e-4


@torch.no_grad()
def test_padding_is_a_learned_vector() -> None:
    """What stands at masked places reaches the picture in no way but T5's, which are pooled, mask or not."""
    model = drawn()
    x, t, cond = model.example(3)
    y = model(x, t, **cond)
    noisy = torch.where(cond["mask"][..., None], cond["text"], 1e3)
    assert torch.equal(model(x, t, **{**cond, "text": noisy}), y)
    louder = torch.where(cond["t5_mask"][..., None], cond["t5"], cond["t5"] + 1)
    assert not cond["t5_mask"].all()
    assert relative(model(x, t, **{**cond, "t5": louder}), y) > 1e-4
    full = {**cond, "mask": torch.ones_like(cond["mask"])}
    del cond["mask"]
    assert torch.equal(model(x, t, **cond), model(x, t, **full))


@torch.no_grad()
def test_the_text_has_no_positions() -> None:
    """Its keys are not turned: the order of its tokens, with their paddings, does not matter."""
    model = drawn()
    x, t, cond = model.example()
    prepared = model.prepare(**cond)
    turned = prepared.shared["text"].flip(1)
    other = prepared._replace(shared={**prepared.shared, "text": turned}, blocks=tuple(b.cross.to_kv(turned) for b in model.own_blocks()))
    assert relative(model(x, t, other), model(x, t, prepared)) < 1e-5


def test_pooling_is_clips() -> None:
    """Against torch's own multi-head attention with the same weights."""
    torch.manual_seed(0)
    pool = AttentionPool(4, 16, 8, 5)
    x = torch.randn(2, 4, 16)
    whole = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positions
    k, v = pool.kv.weight.chunk(2)
    k_bias, v_bias = pool.kv.bias.chunk(2)
    q = whole[:, :1].transpose(0, 1)
    want, _ = torch.nn.functional.multi_head_attention_forward(
        q,
        whole.transpose(0, 1),
        whole.transpose(0, 1),
        16,
        8,
        None,
        torch.cat([pool.q.bias, k_bias, v_bias]),
        None,
        None,
        False,
        0.0,
        pool.proj.weight,
        pool.proj.bias,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q.weight,
        k_proj_weight=k,
        v_proj_weight=v,
        need_weights=False,
    )
    assert torch.allclose(pool(x), want[0], atol=1e-6)


def test_positions_of_a_picture_of_1024_pixels() -> None:
    """Every grid is fitted into 32 x 32: of 64 x 64 tokens, 0, 0.5, ..., 31.5, the column in the first half of a head."""
    places = coordinates(fitted((64, 64), (32, 32)))[0]
    assert torch.allclose(places[:64, 1], torch.arange(64, dtype=torch.float64) / 2)
    model = drawn()
    x, t, cond = model.example(1)
    cos, _ = model.embed(x, t, model.prepare(**cond))["img"].rope or (torch.empty(0), None)
    row = cos[0].unflatten(0, (4, 6))
    assert torch.equal(row[0, :, 4:], row[0, :1, 4:].expand(6, -1))
    assert not torch.equal(row[0, 0, :4], row[0, 1, :4])


@torch.no_grad()
def test_blocks_are_cut_out_in_pairs() -> None:
    model = drawn()
    with pytest.raises(Conflict, match="long skip"):
        keep_blocks(model, [0, 2, 3, 4, 5])
    keep = [0, 2, 3, 5]
    view = keep_blocks(model, keep)
    assert view.skips == ((0, 3),)
    small = Hunyuan(model.config.model_copy(update=model.shorter(keep))).eval()
    names = {f"blocks.{new}.": f"blocks.{old}." for new, old in enumerate(keep)}
    state = model.state_dict()
    small.load_state_dict({n: state[next((n.replace(a, b) for a, b in names.items() if n.startswith(a)), n)] for n in small.state_dict()})
    x, t, cond = model.example()
    assert torch.equal(small(x, t, **cond), view(x, t, **cond))


@torch.no_grad()
def test_a_lora_reaches_text_and_skips() -> None:
    model = drawn()
    x, t, cond = model.example()
    view = with_methods(model, LoRA(rank=2, include=("text.kv", "img.skip")))
    for p in view.methods.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(1))
    y = view(x, t, **cond)
    assert relative(y, model(x, t, **cond)) > 1e-3
    assert relative(view.attached[0].merge(view)(x, t, **cond), y) < 1e-5  # type: ignore[operator]
    assert torch.equal(view(x, t, model.prepare(**cond)), y), "keys made by the base are not used"


def test_sizes() -> None:
    model = drawn(size_and_style=True)
    x, t, cond = model.example()
    two = cond["size"][:, :2]
    six = torch.cat([two, two, torch.zeros(2, 2)], 1)
    assert torch.equal(model(x, t, **{**cond, "size": two}), model(x, t, **{**cond, "size": six}))
    with pytest.raises(DitkitError, match="size is not given"):
        model(x, t, **{n: u for n, u in cond.items() if n != "size"})
    with pytest.raises(DitkitError, match="size is given"):
        drawn()(x, t, **cond)


def test_no_text_is_all_padding() -> None:
    model = drawn()
    x, t, cond = model.example(3)
    none = model.null(**cond)
    assert none.keys() == cond.keys()
    tokens = model.prepare(**none).shared["text"]
    assert torch.equal(tokens, model.padding.expand(3, -1, -1))


def test_wrong_calls_are_named() -> None:
    model = drawn()
    x, t, cond = model.example()
    for change, words in (
        ({"t5": None}, "t5 is not given"),
        ({"text": cond["text"][:, :2]}, r"text is \(2, 2, 6\)"),
        ({"t5": cond["t5"][:1]}, "1 texts"),
        ({"mask": cond["mask"].float()}, "mask"),
    ):
        with pytest.raises(DitkitError, match=words):
            model(x, t, **{**cond, **change})
    for values, words in (({"depth": 5}, "odd"), ({"skips": ((4, 1),)}, "skips"), ({"dim": 18, "num_heads": 3}, "multiples of 4")):
        with pytest.raises(ConfigError, match=words):
            HunyuanConfig(**values)  # type: ignore[arg-type]


def test_released_samplers() -> None:
    """Version 1.2 ends its betas at 0.018, the others at 0.03; all predict v."""
    for name, end in (("HunyuanDiT-v1.1", 0.03), ("HunyuanDiT-v1.2", 0.018)):
        process, _ = hunyuan.released_defaults("hunyuan-dit", HunyuanConfig(**Hunyuan.sizes[name]))
        assert (process.config["beta_range"][1], process.config["prediction"]) == (end, "v")
