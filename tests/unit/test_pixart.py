"""PixArt: published counts, the start from a DiT, text, sizes, compressed keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ditkit_example.regions import Regions

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.backbones.pixart import PixArt, PixArtConfig, from_dit
from ditkit.bundle import Part
from ditkit.core.backbone import Backbone, Prepared
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.masks import Within, render
from ditkit.core.seams import Attn, Seam, sdpa
from ditkit.core.streams import grid_layout
from ditkit.core.view import with_methods
from ditkit.core.windows import Ball
from ditkit.eval.counters import count_forward
from ditkit.loading import empty_model
from ditkit.methods.adaptation.lora import LoRA
from ditkit.nn.adaln_single import SelfAttention
from ditkit.nn.kv_down import KVDown
from ditkit.nn.positions import sincos_table, stretched
from ditkit.testing.trajectory import relative

ALPHA = PixArtConfig(
    input_size=(8, 8), dim=24, depth=2, num_heads=3, mlp_ratio=2.0, text_dim=10, text_length=6, position_base=4, null_caption=True
)
PARAMETERS = {
    "PixArt-XL-2-256x256": 610_856_096,
    "PixArt-XL-2-512x512": 610_856_096,
    "PixArt-XL-2-1024-MS": 611_349_152,
    "PixArt-Sigma-XL-2-256x256": 610_856_096,
    "PixArt-Sigma-XL-2-512-MS": 610_856_096,
    "PixArt-Sigma-XL-2-1024-MS": 610_856_096,
    "PixArt-Sigma-XL-2-2K-MS": 610_856_096,
    "PixArt-Sigma-XL-2-1024-MS-KV": 610_856_096 + 112_896,
    "PixArt-Sigma-XL-2-2K-MS-KV": 610_856_096 + 112_896,
}
GMACS = {  # counted by hand from the papers' shapes
    "PixArt-XL-2-256x256": 149,
    "PixArt-XL-2-512x512": 618,
    "PixArt-XL-2-1024-MS": 3_255,
    "PixArt-Sigma-XL-2-1024-MS": 3_317,
    "PixArt-Sigma-XL-2-1024-MS-KV": 2_911,
    "PixArt-Sigma-XL-2-2K-MS": 26_183,
    "PixArt-Sigma-XL-2-2K-MS-KV": 19_689,
}


def on_meta(name: str, **more: object) -> Backbone:
    return empty_model(Part(name="pixart", config=PixArtConfig(**{**PixArt.sizes[name], **more}).to_dict()))


def drawn(**more: object) -> PixArt:
    torch.manual_seed(0)
    return draw_parameters(PixArt(ALPHA.model_copy(update=more))).eval()


def test_parameters_are_the_published_ones() -> None:
    assert {name: sum(p.numel() for p in on_meta(name).parameters()) for name in PixArt.sizes} == PARAMETERS


def macs(name: str, blocks: tuple[bool, ...]) -> int:
    """Of the network of that size with these blocks; True: it compresses."""
    kv = tuple(i for i, compresses in enumerate(blocks) if compresses)
    model = on_meta(name, depth=len(blocks), kv_blocks=kv, kv_ratio=2 if kv else 1)
    cond = {"text": torch.empty(1, model.config.text_length, 4096, device="meta")}
    if model.config.micro_conditions:
        cond["size"] = torch.empty(1, 2, device="meta")
    x, t = torch.empty(1, 4, *model.config.input_size, device="meta"), torch.empty(1, device="meta")
    return count_forward(model, inputs=(x, t, cond)).macs


@pytest.mark.parametrize("name", GMACS)
def test_macs(name: str) -> None:
    """Blocks of one kind cost the same: counted on three small networks."""
    deep = len(PixArt.sizes[name].get("kv_blocks", ()))
    one, plain, compressed = macs(name, (False,)), macs(name, (False, False)), macs(name, (False, True))
    whole = one + (27 - deep) * (plain - one) + deep * (compressed - one)
    assert whole / 1e9 == pytest.approx(GMACS[name], rel=4e-3)


def test_compression_adds_d_times_r_squared_plus_three() -> None:
    for ratio in (2, 3, 4):
        down = KVDown(12, ratio)
        assert sum(p.numel() for p in down.parameters()) == 12 * (ratio**2 + 3)


def test_a_fresh_network_says_nothing_and_hears_no_text() -> None:
    model = PixArt(ALPHA).eval()
    x, t, cond = model.example()
    assert not model(x, t, **cond).any()
    draw_parameters(model.final)
    other = {**cond, "text": cond["text"] + 1}
    assert torch.equal(model(x, t, **cond), model(x, t, **other))


@torch.no_grad()
@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("null_label", [False, True])
def test_it_starts_as_the_dit_without_a_class(micro: bool, null_label: bool) -> None:
    torch.manual_seed(0)
    dit = draw_parameters(
        DiT(input_size=(8, 8), dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=5, null_label=null_label, mlp_norm_eps=1e-6)
    ).eval()
    model = from_dit(dit, ALPHA.model_copy(update={"micro_conditions": micro})).eval()
    x, _, cond = model.example(3)
    t = torch.full((3,), 500.0)
    label = dit.label(torch.full((3,), 5))[:, None] if null_label else torch.zeros(3, 1, 24)
    want, got = dit.embed(x, t, Prepared({"label": label})), model.embed(x, t, model.prepare(**cond))
    for theirs, ours in zip(dit.blocks, model.own_blocks()):
        part = theirs.parts["img"]
        for a, b in zip(ours.modulation(got["img"].c), part.modulation(want["img"].c)):
            assert (a - b).abs().max() <= 1e-6
        want, got = theirs(want, Seam()), ours(got, Seam())
        assert relative(got["img"].x, want["img"].x) <= 1e-6
    assert relative(model(x, t, **cond), dit.unembed(dit.head(want), x)) <= 1e-6
    if null_label:  # elsewhere it is another network
        away = torch.full((3,), 100.0)
        assert relative(model(x, away, **cond), dit(x, away, **dit.null(torch.zeros(3, dtype=torch.int64)))) > 1e-3


@pytest.mark.parametrize("change", [{"dim": 48}, {"depth": 3}, {"mlp_ratio": 4.0}])
def test_a_dit_of_other_sizes_is_refused(change: dict[str, float]) -> None:
    dit = DiT(input_size=(8, 8), dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=5)
    with pytest.raises(DitkitError, match=next(iter(change))):
        from_dit(dit, ALPHA.model_copy(update=change))


@torch.no_grad()
def test_order_of_text_tokens_and_padding_do_not_matter() -> None:
    model = drawn()
    x, t, cond = model.example(3)
    y = model(x, t, **cond)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert relative(model(x, t, text=cond["text"][:, order], mask=cond["mask"][:, order]), y) < 1e-6
    noisy = torch.where(cond["mask"][..., None], cond["text"], 1e3)
    assert torch.equal(model(x, t, text=noisy, mask=cond["mask"]), y)
    longer = F.pad(cond["text"], (0, 0, 0, 4)), F.pad(cond["mask"], (0, 4))
    assert relative(model(x, t, text=longer[0], mask=longer[1]), y) < 1e-6


def test_masked_tokens_get_no_gradient() -> None:
    model = drawn()
    x, t, cond = model.example(3)
    text = cond["text"].requires_grad_()
    model(x, t, text=text, mask=cond["mask"]).square().sum().backward()
    assert text.grad is not None
    assert torch.equal(text.grad.abs().sum(-1) > 0, cond["mask"])


def test_keys_of_the_text_are_made_once_a_run_unless_something_acts_on_them() -> None:
    model = drawn()
    _, _, cond = model.example()
    lora = with_methods(model, LoRA(rank=1, include="text.kv"))
    with torch.no_grad():
        ahead = model.prepare(**cond).blocks
        assert [set(b) for b in ahead] == [{"k", "v"}] * 2
        assert ahead[0]["k"].shape == (2, 3, 6, 8)
        assert not lora.prepare(**cond).blocks
    assert not model.prepare(**cond).blocks  # in training they would all be kept


def test_a_lora_reaches_the_text() -> None:
    model = drawn()
    view = with_methods(model, LoRA(rank=2, include="text.kv"))
    draw_parameters(view.methods)
    x, t, cond = model.example()
    with torch.no_grad():
        merged = view.attached[0].merge(view)  # type: ignore[operator]
        assert relative(view(x, t, **cond), merged(x, t, **cond)) < 1e-5
        assert torch.equal(view(x, t, model.prepare(**cond)), view(x, t, **cond)), "keys made by the base are not used"
        assert not torch.equal(view(x, t, **cond), model(x, t, **cond))


@torch.no_grad()
def test_the_null_caption() -> None:
    """As released the caption's mask stands for both; as in diffusers the empty prompt has its own."""
    model, own = drawn(), drawn(null_tokens=1)
    _, _, cond = model.example(3)
    cond = {k: v[:, :4] for k, v in cond.items()}
    null = model.null(**cond)
    assert torch.equal(null["mask"], cond["mask"])
    assert torch.equal(null["text"], model.null_text[None, :4].expand(3, -1, -1))  # type: ignore[index]
    assert own.null(**cond)["mask"].sum(1).tolist() == [1, 1, 1]
    with pytest.raises(DitkitError, match="7 tokens; allowed: at most 6"):
        model.null(text=torch.zeros(1, 7, 10))
    with pytest.raises(DitkitError, match="no null caption"):
        drawn(null_caption=False).null(**cond)


def test_size_and_aspect() -> None:
    model = drawn(micro_conditions=True)
    x, t, cond = model.example()
    size = torch.tensor([[64.0, 32.0], [96.0, 48.0]])
    text = {"text": cond["text"], "mask": cond["mask"]}
    with torch.no_grad():
        y = model(x, t, **text, size=size)
        assert torch.equal(model(x, t, **text, size=size, aspect=torch.tensor([[2.0], [2.0]])), y)
        assert not torch.equal(model(x, t, **text, size=size.flip(1)), y)
    for wrong, what in (
        ({}, "size is not given"),
        ({"size": size[0]}, r"size is \(2,\)"),
        ({"size": size, "aspect": torch.ones(3, 1)}, "aspect is"),
    ):
        with pytest.raises(DitkitError, match=what):
            model.prepare(**text, **wrong)
    with pytest.raises(DitkitError, match="no micro-conditions, and size is given"):
        drawn().prepare(**text, size=size)


@pytest.mark.parametrize(
    ("text", "mask", "what"),
    [
        (torch.zeros(2, 6, 11), None, r"text is \(2, 6, 11\)"),
        (torch.zeros(2, 1, 6, 10), None, r"text is \(2, 1, 6, 10\)"),
        (torch.zeros(2, 0, 10), None, r"text is \(2, 0, 10\)"),
        (torch.zeros(2, 6, 10), torch.ones(2, 5, dtype=torch.bool), r"mask is \(2, 5\)"),
        (torch.zeros(2, 6, 10), torch.ones(2, 6), r"mask is \(2, 6\) of torch.float32"),
    ],
)
def test_wrong_captions_are_named(text: torch.Tensor, mask: torch.Tensor | None, what: str) -> None:
    with pytest.raises(DitkitError, match=what):
        drawn().prepare(text=text, mask=mask)


def test_as_many_captions_as_pictures() -> None:
    model = drawn()
    x, t, cond = model.example(3)
    with pytest.raises(DitkitError, match="2 pictures and 3 texts"):
        model(x[:2], t[:2], **cond)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dim": 20, "num_heads": 2, "micro_conditions": True}, "no multiple of 3"),
        ({"kv_blocks": (2,), "kv_ratio": 2}, "kv_blocks has 2, the blocks are 0 to 1"),
        ({"kv_blocks": (1,)}, "belong together"),
        ({"kv_ratio": 2}, "belong together"),
        ({"null_tokens": 7}, "more than text_length 6"),
        ({"dim": 26, "num_heads": 2}, "no multiple of num_heads"),
        ({"input_size": (8, 9)}, "no multiple of patch_size"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change: dict[str, object], what: str) -> None:
    with pytest.raises(DitkitError, match=what):
        PixArt(**{**ALPHA.to_dict(), **change})


def test_positions() -> None:
    """Scale 1 on the base grid is DiT's table; doubling size, base and scale leaves even places where they were."""
    assert torch.equal(sincos_table(24, stretched((4, 4), 4)), sincos_table(24, (4, 4)))
    small, large = (sincos_table(24, stretched((n, n), n, s)) for n, s in ((4, 1.0), (8, 2.0)))
    assert torch.allclose(large.view(8, 8, 24)[::2, ::2], small.view(4, 4, 24), atol=1e-6)


@pytest.mark.parametrize(("name", "side", "scale"), [("256x256", 16, 0.5), ("512-MS", 32, 1.0), ("1024-MS", 64, 2.0)])
def test_a08_positions_have_the_scale_of_their_checkpoint(name: str, side: int, scale: float) -> None:
    """The scale is stored, not an integer division that ends at 1: Sigma's 256-pixel network is at 0.5."""
    config = PixArtConfig(**PixArt.sizes[f"PixArt-Sigma-XL-2-{name}"])
    assert (config.position_scale, config.position_base) == (scale, side)
    dim, places = 24, np.arange(side) / scale
    angles = places[:, None] / 10_000 ** (np.arange(dim // 4) / (dim / 4))
    one = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    across, down = np.broadcast_to(one[None], (side, side, dim // 2)), np.broadcast_to(one[:, None], (side, side, dim // 2))
    official = np.concatenate([across, down], 2).reshape(1, side * side, dim)
    table = sincos_table(dim, stretched((side, side), config.position_base, config.position_scale))
    assert np.abs(table.numpy() - official).max() < 1e-6


# compressed keys


def maps(u: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return u.transpose(1, 2).unflatten(2, grid)


@torch.no_grad()
@pytest.mark.parametrize(("grid", "ratio"), [((4, 6), 2), ((5, 7), 2), ((7, 8), 3)])
def test_at_the_start_a_key_is_the_mean_of_its_cell_normalised(grid: tuple[int, int], ratio: int) -> None:
    u = torch.randn(2, grid[0] * grid[1], 8)
    mean = F.avg_pool2d(maps(u, grid), ratio).flatten(2).transpose(1, 2)
    assert relative(KVDown(8, ratio)(u, grid), F.layer_norm(mean, (8,))) < 1e-6
    first = maps(u, grid)[..., : grid[0] // ratio * ratio : ratio, : grid[1] // ratio * ratio : ratio]
    assert torch.equal(KVDown(8, ratio, "first")(u, grid), first.flatten(2).transpose(1, 2))
    assert torch.equal(KVDown(8, ratio, "every")(u, grid), u[:, ::ratio])


@torch.no_grad()
def test_equal_keys_in_each_cell_change_nothing() -> None:
    """R^2 equal keys with equal values attract as one key does, since all cells count alike."""
    grid, attention = (4, 6), SelfAttention(12, 3, down=KVDown(12, 2, "first"))
    q = torch.randn(2, 3, 24, 4)
    cells = torch.randn(2, 12, 2, 3).repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2)
    whole = cells.unflatten(-1, (3, 4)).transpose(1, 2)
    few = attention.down(cells, grid).unflatten(-1, (3, 4)).transpose(1, 2)  # type: ignore[misc]
    layout = {"img": grid_layout(grid)}
    a, b = (sdpa(Attn("attn", {"img": q}, {"img": k}, {"img": k}, layout, layout))["img"] for k in (whole, few))
    assert few.shape[2] == 6
    assert relative(b, a) < 1e-6


def test_gradients_reach_the_tokens_of_full_cells_only() -> None:
    u = torch.randn(1, 35, 8, requires_grad=True)
    KVDown(8, 2)(u, (5, 7)).pow(3).sum().backward()
    assert u.grad is not None
    reached = (u.grad.abs().sum(-1) > 0).view(5, 7)
    assert reached[:4, :6].all()
    assert not reached[4:].any()
    assert not reached[:, 6:].any()


@torch.no_grad()
def test_compressed_keys_have_places_so_that_windows_hold() -> None:
    """A window over the grid, asked of compressed keys, is by the centres of their cells."""
    grid, down = grid_layout((4, 6)), KVDown(8, 2)
    few = down.cached_layout(grid)
    assert few.coords[0].tolist() == [[y + 0.5, x + 0.5] for y in (0, 2) for x in (0, 2, 4)]
    assert down.cached_layout(grid) is few
    mask = render([Within(Ball(radius=1.0))], {"img": grid}, {"img": few})
    assert isinstance(mask, torch.Tensor)
    near = torch.cdist(grid.coords[0], few.coords[0]) < 1.0  # four tokens about each centre, none at distance 1
    assert torch.equal(mask[0, 0], near)


def test_grids_without_a_cell_are_named() -> None:
    model = drawn(kv_ratio=4, kv_blocks=(1,))
    x, t, cond = model.example()
    with pytest.raises(DitkitError, match=r"a grid of \(2, 2\) tokens holds no cell of 4 x 4"):
        model(x[:, :, :4, :4], t, **cond)


def test_token_selection_needs_tokens_that_are_not_compressed() -> None:
    plain: Backbone = drawn()
    assert with_methods(plain, Regions()).attached
    with pytest.raises(Conflict, match="pixart needs grid, which regions takes away"):
        with_methods(drawn(kv_ratio=2, kv_blocks=(1,)), Regions())
