"""PT-DiT: counts, what sees what, proxies against their definition, clips and pictures, the released layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.backbones.dit import draw_parameters
from ditkit.backbones.pixart import PixArt
from ditkit.backbones.pt_dit import PTDiT, PTDiTConfig, with_shifted
from ditkit.bundle import BundleConfig, DataCard, EncoderPart, Part, write_bundle
from ditkit.conditioning.encoders.bytes import ByteEncoder
from ditkit.core.errors import ConfigError, DitkitError, WeightsError
from ditkit.core.seams import Seam
from ditkit.core.streams import Streams, grid_layout
from ditkit.core.windows import Cells
from ditkit.eval.counters import count_forward
from ditkit.interop import pt_dit
from ditkit.interop.convert import convert, open_any
from ditkit.interop.hints import Hints
from ditkit.interop.tables import Renamed, load_all
from ditkit.nn.adaln_single import AdaLNSingleBlock
from ditkit.nn.proxy import Proxies
from ditkit.nn.windows import Windows
from ditkit.pipeline import Pipeline
from ditkit.testing.trajectory import relative

#: by the released module list; the paper prints 144, 605, 1142 and 1795 million
MILLIONS = {"PT-DiT/B": 153.8, "PT-DiT/L": 637.7, "PT-DiT/XL": 1131.6, "PT-DiT/H": 1890.7}
SMALL: dict[str, Any] = dict(
    input_size=(8, 8), patch_size=1, in_channels=3, out_channels=3, dim=16, depth=1, num_heads=2, mlp_ratio=2.0, text_dim=6, window=(4, 4)
)


def drawn(**more: Any) -> PTDiT:
    torch.manual_seed(0)
    return draw_parameters(PTDiT(**{**SMALL, "position_scale": 1.0, **more})).eval()


def parameters(name: str, depth: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in PTDiT(**{**PTDiT.sizes[name], "depth": depth}).parameters())


def test_parameters_are_the_published_ones() -> None:
    found = {}
    for name, values in PTDiT.sizes.items():
        one, two = parameters(name, 1), parameters(name, 2)
        found[name] = one + (values["depth"] - 1) * (two - one)
        if name == "PT-DiT/XL":
            assert (two - one, found[name]) == (39_854_592, 1_131_629_216)
    assert {name: round(n / 1e6, 1) for name, n in found.items()} == MILLIONS


@pytest.mark.parametrize("side", [8, 16])
def test_macs_are_the_formula(side: int) -> None:
    """Of one block: proxies, their injection, windows, shifted windows, text, MLP. P proxies, n tokens of a window, L of the text."""
    d, tokens, n, length = 16, side**2, 16, 4
    p = tokens // n
    block = 4 * p * d**2 + 2 * p**2 * d
    block += 3 * tokens * d**2 + 2 * p * d**2 + 2 * tokens * p * d
    block += 4 * tokens * d**2 + 2 * tokens * n * d
    shifted = 5 * tokens * d**2 + 2 * (p + side // 2 + 1) * n * n * d  # windows that reach beyond the border are computed whole
    text = 2 * tokens * d**2 + 2 * length * d**2 + 2 * tokens * length * d
    mlp = 4 * tokens * d**2  # mlp_ratio 2

    def macs(depth: int) -> int:
        model = drawn(depth=depth)
        x, cond = torch.zeros(1, 3, side, side), {"text": torch.zeros(1, length, 6)}
        return count_forward(model, inputs=(x, torch.zeros(1), cond)).macs

    assert macs(2) - macs(1) == block + shifted + text + mlp


def test_a_block_costs_what_pixarts_costs_near_4000_tokens() -> None:
    """At equal width and 1024 pixels: 1.06 to 1.09 times, by the counts of both."""
    side = 128

    def block(cls: Any, **more: Any) -> int:
        found = []
        for depth in (1, 2):
            with torch.device("meta"):
                model = cls(input_size=(side, side), depth=depth, **more)
                inputs = torch.empty(1, 4, side, side), torch.empty(1), {"text": torch.empty(1, 120, 4096)}
            found.append(count_forward(model, inputs=inputs).macs)
        return found[1] - found[0]

    assert 1.06 <= block(PTDiT) / block(PixArt) <= 1.09


def gradient(model: PTDiT) -> Tensor:
    """|d output token (0, 0) / d input|, (H, W)."""
    x, t, cond = model.example(1)
    x.requires_grad_()
    model(x, t, **cond)[0, :, 0, 0].sum().backward()
    assert x.grad is not None
    return x.grad.abs().sum((0, 1))


def test_windows_alone_see_nothing_beyond_and_proxies_see_all() -> None:
    model = drawn(shifted=False)
    assert (gradient(model) > 0).all()
    model.own_blocks()[0].silence()
    seen = gradient(model) > 0
    assert seen[:4, :4].all()
    assert seen.sum() == 16


def test_shifted_windows_do_not_see_over_the_border() -> None:
    model = drawn()
    nn_zero(model.own_blocks()[0].visual_out)
    seen = gradient(model) > 0
    assert seen[:4, :4].all()
    assert not seen[6:].any()
    assert not seen[:, 6:].any()


def nn_zero(layer: torch.nn.Linear) -> None:
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)


@torch.no_grad()
def test_one_window_without_proxies_is_a_pixart_block() -> None:
    model = drawn(window=(8, 8), shifted=False)
    block = model.own_blocks()[0]
    nn_zero(block.visual_out)
    plain = AdaLNSingleBlock(16, 2, 2.0)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith(("proxy", "visual"))})
    x, t, cond = model.example()
    del cond["mask"]
    s = model.embed(x, t, model.prepare(**cond))
    assert relative(one(block, s), one(plain, s)) < 1e-6


def one(block: AdaLNSingleBlock, s: Streams) -> Tensor:
    return block(s, Seam())["img"].x


@pytest.mark.parametrize(("grid", "sides", "counts"), [((4, 6), (2, 3), (1, 1)), ((8, 8), (4, 4), (2, 4)), ((5, 7), (4, 2), (2, 1))])
@pytest.mark.parametrize("groups", ["strided", "contiguous"])
def test_proxies_are_what_they_are_said_to_be(grid: Any, sides: Any, counts: Any, groups: Any) -> None:
    """Token by token: the mean over the tokens of a window whose place within it is of the group."""
    x = torch.randn(2, grid[0] * grid[1], 3)
    pool = Proxies(sides, counts, "mean", groups)
    want, there = [], []
    for window in itertools.product(*(range(-(-n // side)) for n, side in zip(grid, sides))):
        for group in itertools.product(*map(range, counts)):
            rows = []
            for r, c in itertools.product(*map(range, grid)):
                inside = (r // sides[0], c // sides[1]) == window
                places = (r % sides[0], c % sides[1])
                of = [p % n if groups == "strided" else p // (side // n) for p, n, side in zip(places, counts, sides)]
                rows += [r * grid[1] + c] if inside and tuple(of) == group else []
            want.append(x[:, rows].mean(1) if rows else torch.zeros(2, 3))
            there.append(bool(rows))
    assert torch.allclose(pool.pool(x, grid), torch.stack(want, 1), atol=1e-6)
    layout = pool.layout(grid)
    assert layout.total == len(want)
    assert all(there) if layout.valid is None else layout.valid[0].tolist() == there


def test_means_of_windows_are_average_pooling() -> None:
    x = torch.randn(2, 4 * 6 * 8, 5)
    want = F.avg_pool3d(x.transpose(1, 2).unflatten(2, (4, 6, 8)), (2, 3, 4)).flatten(2).transpose(1, 2)
    assert torch.allclose(Proxies((2, 3, 4), (1, 1, 1)).pool(x, (4, 6, 8)), want, atol=1e-6)
    parts = F.avg_pool3d(x.transpose(1, 2).unflatten(2, (4, 6, 8)), (2, 3, 2)).flatten(2).transpose(1, 2)
    order = grid_layout((2, 2, 4)).coords[0].long() @ torch.tensor([4 * 2, 4, 1])
    rows = Windows((2, 2, 4), (1, 1, 2)).partition(order[None, :, None]).flatten()  # of a window, one after the other
    assert torch.allclose(Proxies((2, 3, 4), (1, 1, 2), groups="contiguous").pool(x, (4, 6, 8)), parts[:, rows], atol=1e-6)


def test_the_first_token_stands_for_its_window() -> None:
    x = torch.arange(24.0).view(1, 24, 1)
    assert Proxies((2, 3), (1, 1), "first").pool(x, (4, 6)).flatten().tolist() == [0, 3, 12, 15]


@torch.no_grad()
def test_a_picture_is_a_clip_of_one_frame() -> None:
    picture = drawn(window=(2, 4))
    clip = PTDiT(**{**SMALL, "position_scale": 1.0, "input_size": (1, 8, 8), "window": (1, 2, 4)}).eval()
    clip.load_state_dict(picture.state_dict())
    x, t, cond = picture.example()
    assert relative(clip(x[:, :, None], t, **cond)[:, :, 0], picture(x, t, **cond)) < 1e-6


@torch.no_grad()
def test_positions() -> None:
    """Frames, columns, rows; the released table is another on grids that are no squares, and the same on squares."""
    cfg = {**SMALL, "input_size": (3, 4, 6), "window": (1, 2, 2), "position_scale": 2.0}
    table = PTDiT(**cfg).table((3, 4, 6)).view(3, 4, 6, 16)
    assert (table[:, :, 1:, :4] == table[:, :, :1, :4]).all()
    assert (table[1:, :, :, 4:] == table[:1, :, :, 4:]).all()
    assert torch.allclose(table[0, 0, 3, 4], torch.tensor(1.5).sin())
    assert torch.allclose(table[0, 3, 0, 10], torch.tensor(1.5).sin())
    released = PTDiT(**cfg, positions="released")
    assert torch.equal(released.table((3, 4, 4)), PTDiT(**cfg).table((3, 4, 4)))
    n = 2 * 6 + 1  # 13 = 3 x 4 + 1: column 1 of a grid of height 4, row 3
    assert torch.allclose(released.table((1, 4, 6))[0, n, [4, 10]], torch.tensor([0.5, 1.5]).sin())


@torch.no_grad()
def test_shifted_windows_added_to_a_trained_network_change_nothing() -> None:
    model = drawn(shifted=False)
    x, t, cond = model.example()
    new = with_shifted(model)
    assert torch.equal(new(x, t, **cond), model(x, t, **cond))
    assert sum(p.numel() for p in new.parameters()) - sum(p.numel() for p in model.parameters()) == 5 * (16 * 16 + 16) + 3 * 16
    with pytest.raises(DitkitError, match="shifted windows already"):
        with_shifted(new)


def test_a_fresh_network_says_nothing_and_has_windows_alone() -> None:
    model = PTDiT(**SMALL).eval()
    x, t, cond = model.example()
    assert not model(x, t, **cond).any()
    draw_parameters(model.final)
    assert (gradient(model) > 0).sum() == 16


@torch.no_grad()
def test_padding_of_text_does_not_matter() -> None:
    model = drawn()
    x, t, cond = model.example(3)
    noisy = torch.where(cond["mask"][..., None], cond["text"], 1e3)
    assert torch.equal(model(x, t, text=noisy, mask=cond["mask"]), model(x, t, **cond))


def test_wrong_shapes_are_named() -> None:
    for values, words in (
        ({"dim": 24}, "dim 24"),
        ({"window": (4,)}, "window"),
        ({"proxies": (3, 1)}, "divisor of the window's side"),
        ({"input_size": (7, 8), "patch_size": 2}, "input_size"),
    ):
        with pytest.raises(ConfigError, match=words):
            PTDiT(**{**SMALL, **values})
    model = drawn()
    with pytest.raises(DitkitError, match=r"2 pictures and 3 texts"):
        model(torch.zeros(2, 3, 8, 8), torch.zeros(2), text=torch.zeros(3, 4, 6))


def test_shifted_cells_are_half_a_window_further() -> None:
    (within,) = drawn(window=(4, 2)).own_blocks()[0].masks["shift"]  # type: ignore[union-attr]
    assert within.window == Cells(sides=(4, 2), shift=(2, 1), how="gathered")  # type: ignore[union-attr]


# ---- the released layout ----------------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "picture": dict(position_scale=1.0),
    "wide": dict(input_size=(8, 16), position_scale=1.5, positions="released", shifted=False),
    "clip": dict(input_size=(4, 8, 8), window=(2, 4, 4), proxies=(1, 2, 2), proxy_groups="contiguous", proxy_how="first"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_configurations_come_back(name: str) -> None:
    model = drawn(**SHAPES[name])
    config = model.config.model_copy(update={"proxies": model.config.pool().counts})
    assert pt_dit.constructor_of(config).to_ours(pt_dit.ours_of(config)) == config


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip_is_bit_exact_and_strict(name: str) -> None:
    model = drawn(**SHAPES[name])
    table, ours = pt_dit.official_table(model.config), model.state_dict()
    weights = table.export(ours)
    assert pt_dit.is_official(weights)
    assert ("transformer_blocks.0.attn3.to_q.weight" in weights) == model.config.shifted

    def read() -> dict[str, Tensor]:
        shapes = {k: tuple(v.shape) for k, v in weights.items()}
        return load_all(Renamed("w", shapes, weights.__getitem__, table, {k: tuple(v.shape) for k, v in ours.items()}))

    assert all(torch.equal(v, ours[k]) for k, v in read().items())
    del weights["transformer_blocks.0.linear_1_visual.bias"]
    with pytest.raises(WeightsError, match="linear_1_visual"):
        read()


def test_a_released_file_says_its_shape() -> None:
    with torch.device("meta"):
        model = PTDiT(**{**PTDiT.sizes["PT-DiT/XL"], "depth": 1})
    shapes = {k: tuple(v.shape) for k, v in pt_dit.official_table(model.config).export(model.state_dict()).items()}
    assert pt_dit.config_from_official(shapes, Hints()) == model.config
    small = pt_dit.config_from_official(shapes, Hints(input_size=(64, 64)))
    assert (small.window, small.position_scale) == ((4, 4), 1.0)
    with pytest.raises(DitkitError, match="--num-heads"):
        pt_dit.config_from_official({**shapes, "pos_embed.proj.weight": (16, 4, 2, 2)}, Hints())


def test_a_bundle_becomes_a_released_file_and_returns(tmp_path: Any) -> None:
    model = drawn()
    process, sampling = pt_dit.released_defaults("qihoo-t2x", model.config)
    card = DataCard(name="d", shape=(3, 8, 8))
    part = Part(name="pt_dit", config=model.config.to_dict())
    codec = Part(name="identity", config={"channels": 3})
    bundle = BundleConfig(backbone=part, process=process, codec=codec, data=card, sampling=sampling)
    write_bundle(tmp_path / "a", bundle, model.state_dict())
    convert(tmp_path / "a", tmp_path / "b.safetensors", "official")
    opened = open_any(tmp_path / "b.safetensors")
    assert PTDiTConfig(**opened.config.backbone.config).pool() == model.config.pool()
    assert opened.config.process.config["backward"]
    assert all(torch.equal(opened.tensors.read(k), v) for k, v in model.state_dict().items())
    with pytest.raises(DitkitError, match="diffusers has no PT-DiT"):
        convert(tmp_path / "a", tmp_path / "c", "diffusers")


def test_a_prompt_becomes_a_picture() -> None:
    """With the released process and a byte encoder: the network says x0 - eps, and prompts matter."""
    model = drawn()
    torch.manual_seed(1)
    model.encoder = ByteEncoder(dim=6, depth=1, num_heads=2, max_length=8)
    process, sampling = pt_dit.released_defaults("qihoo-t2x", model.config)
    config = BundleConfig(
        backbone=Part(name="pt_dit", config=model.config.to_dict()),
        process=process,
        encoder=EncoderPart(**model.encoder.card()),
        data=DataCard(name="d", shape=(3, 8, 8), captions=("a", "b")),
        sampling=sampling.model_copy(update={"num_inference_steps": 2}),
    )
    red, blue = (Pipeline(model, config)(prompt=prompt, progress=False).x for prompt in ("red", "blue"))
    assert red.shape == (1, 3, 8, 8)
    assert not torch.equal(red, blue)
