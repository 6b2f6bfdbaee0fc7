"""Windows: every way to compute one is the dense mask; nothing leaks in from outside; cost is linear in the tokens."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.core.backbone import block_kind, count_graphs
from ditkit.core.errors import DitkitError
from ditkit.core.masks import Within, render
from ditkit.core.method import Method
from ditkit.core.seams import Attn, sdpa
from ditkit.core.sparse import Blocks, Gathered, blocks, tile_order
from ditkit.core.streams import Layout, grid_layout
from ditkit.core.view import with_methods
from ditkit.core.windows import Ball, Box, Cells, Window
from ditkit.eval.counters import count
from ditkit.nn.windows import Windows
from ditkit.testing.trajectory import Counted, relative, sample

CASES: list[tuple[tuple[int, ...], Any]] = [
    ((40,), lambda how: Ball(radius=3.5, how=how)),
    ((10, 13), lambda how: Ball(radius=3, how=how)),
    ((10, 13), lambda how: Box(reach=(1, 2), how=how)),
    ((10, 13), lambda how: Box(reach=(0, None), how=how)),
    ((10, 13), lambda how: Cells(sides=(4, 5), how=how)),
    ((10, 13), lambda how: Cells(sides=(4, 5), shift=(2, 1), how=how)),
    ((4, 6, 9), lambda how: Ball(radius=2.5, how=how)),
    ((4, 6, 9), lambda how: Box(reach=(None, 0, 0), how=how)),
    ((4, 6, 9), lambda how: Box(reach=(1, 2, 1), how=how)),
    ((4, 6, 9), lambda how: Cells(sides=(2, 3, 4), shift=(0, 1, 2), how=how)),
]


@lru_cache
def brute(window: Window, grid: tuple[int, ...]) -> Tensor:
    """Independent: token by token, in Python."""
    places = [tuple(int(v) for v in row) for row in grid_layout(grid).coords[0]]

    def near(q: tuple[int, ...], k: tuple[int, ...]) -> bool:
        if isinstance(window, Ball):
            return sum((a - b) ** 2 for a, b in zip(q, k)) < window.radius**2
        if isinstance(window, Box):
            return all(r is None or abs(a - b) <= r for a, b, r in zip(q, k, window.reach))
        assert isinstance(window, Cells)
        return all((a - s) // n == (b - s) // n for a, b, n, s in zip(q, k, window.sides, window.shift))

    return torch.tensor([[near(q, k) for k in places] for q in places])


def attn(n: int, texts: tuple[int, ...] = (), mask: Any = None, first: bool = False, heads: int = 2, key_heads: int = 0) -> Attn:
    """Queries, keys and values of a segment ``img`` of n tokens and of others; ``first``: those stand before it."""
    g = torch.Generator().manual_seed(0)
    others = {f"text{i}": m for i, m in enumerate(texts)}
    sizes = {**others, "img": n} if first else {"img": n, **others}

    def draw(h: int) -> dict[str, Tensor]:
        return {name: torch.randn(2, h, m, 8, generator=g) for name, m in sizes.items()}

    return Attn("attn", draw(heads), draw(key_heads or heads), draw(key_heads or heads), {}, {}, mask)


def layouts(grid: tuple[int, ...], a: Attn) -> dict[str, Layout]:
    return {n: grid_layout(grid) if n == "img" else Layout(torch.zeros(1, u.shape[2], len(grid)), u.shape[2]) for n, u in a.k.items()}


def rendered(make: Any, how: str, grid: tuple[int, ...], a: Attn) -> Any:
    where = layouts(grid, a)
    return render([Within(make(how))], where, where)


@pytest.mark.parametrize(("grid", "make"), CASES)
@pytest.mark.parametrize("first", [None, True, False])
def test_gathered_is_dense_is_brute_force(grid, make, first) -> None:
    texts = () if first is None else (3, 2)
    n = torch.Size(grid).numel()
    a = attn(n, texts, first=bool(first))
    dense, tiles = rendered(make, "dense", grid, a), rendered(make, "gathered", grid, a)
    assert isinstance(tiles, Gathered)
    start = sum(texts) if first else 0
    assert torch.equal(dense[0, 0, start : start + n, start : start + n], brute(make("dense"), grid))
    assert dense.sum() == brute(make("dense"), grid).sum() + (n + sum(texts)) ** 2 - n * n, "other segments see and are seen everywhere"
    want, got = sdpa(a._replace(mask=dense)), sdpa(a._replace(mask=tiles))
    assert list(got) == list(want)
    for name in want:
        assert relative(got[name], want[name]) < 1e-6


BLOCKED: list[tuple[tuple[int, ...], Any]] = [
    ((8, 64), lambda how: Ball(radius=2, how=how)),  # in tiles
    ((12, 10), lambda how: Ball(radius=3, how=how)),
    ((12, 10), lambda how: Cells(sides=(4, 5), shift=(2, 1), how=how)),
    ((5, 4, 6), lambda how: Box(reach=(None, 2, 1), how=how)),
]


@pytest.mark.parametrize(("grid", "make"), BLOCKED)
def test_blocks_are_dense(grid, make) -> None:
    """FlexAttention as dynamo captures it, over the tokens of a grid and text before them, in whole blocks."""
    total = math.prod(grid)
    a = attn(total, (-total % 128 or 128,), first=True)
    mask = rendered(make, "blocks", grid, a)
    assert isinstance(mask, Blocks)
    assert torch.equal(mask.dense, rendered(make, "dense", grid, a)[0, 0])
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(sdpa, backend="eager", fullgraph=True, dynamic=False)(a._replace(mask=mask))
        eager = sdpa(a._replace(mask=mask))
    want = sdpa(a._replace(mask=rendered(make, "dense", grid, a)))
    for name in want:
        assert relative(got[name], want[name]) < 1e-6
        assert relative(eager[name], want[name]) < 1e-6


def test_blocks_on_the_cpu_are_dense_where_its_kernel_is_wrong() -> None:
    layout = {"img": grid_layout((12, 10))}
    assert isinstance(render([Within(Ball(radius=3, how="blocks"))], layout, layout), Tensor)


def test_blocks_skip_what_is_hidden() -> None:
    """On a grid 64 wide a block is two rows, and a ball of radius 4 reaches 3 rows: two blocks to either side."""
    mask = render([Within(Ball(radius=4, how="blocks"))], {"img": grid_layout((16, 64))}, {"img": grid_layout((16, 64))})
    assert isinstance(mask, Blocks)
    per_row = mask.mask.kv_num_blocks[0, 0] + mask.mask.full_kv_num_blocks[0, 0]
    assert per_row.tolist() == [3, 4, 5, 5, 5, 5, 4, 3]
    whole = render([Within(Box(reach=(15, 0), how="blocks"))], {"img": grid_layout((16, 64))}, {"img": grid_layout((16, 64))})
    assert isinstance(whole, Blocks)
    assert whole.mask.full_kv_num_blocks.sum() == 0


def test_blocks_are_tiles_where_these_are_fewer() -> None:
    """On rows of 128 tokens a ball of radius 8 reaches 15 rows of one block each, and at most 3 x 3 tiles of 8 x 16."""
    mask = blocks(Ball(radius=8, how="blocks"), (24, 128), 0, 24 * 128, 0, 24 * 128, torch.device("cpu"))
    per_block = (mask.mask.kv_num_blocks + mask.mask.full_kv_num_blocks)[0, 0]
    assert mask.orders is not None
    assert per_block.max() == 9
    assert per_block.float().mean() == (3 + 2 * 2) / 3 * (6 * 3 + 2 * 2) / 8


def test_tiles_are_whole_and_each_token_is_in_one() -> None:
    order = tile_order((16, 32), torch.device("cpu"))
    assert order.sort().values.tolist() == list(range(512))
    first = order[:128]
    assert (first // 32).max() == 7
    assert (first % 32).max() == 15
    for grid in ((5, 7), (300,), (6, 10, 9)):
        assert tile_order(grid, torch.device("cpu")).sort().values.tolist() == list(range(math.prod(grid)))


@pytest.mark.parametrize("how", ["dense", "gathered"])
@pytest.mark.parametrize(("grid", "make"), CASES)
def test_gradients_are_zero_outside_and_equal_inside(grid, make, how) -> None:
    a = attn(torch.Size(grid).numel())
    query = torch.Size(grid).numel() // 3
    seen = brute(make("dense"), grid)[query]
    grads = []
    for mask in (rendered(make, how, grid, a), brute(make("dense"), grid)):
        k, v = (u["img"].clone().requires_grad_() for u in (a.k, a.v))
        out = sdpa(a._replace(k={"img": k}, v={"img": v}, mask=mask))["img"][:, :, query].square().sum()
        grads.append(torch.autograd.grad(out, (k, v)))
    for got, want in zip(*grads):
        assert (got[:, :, ~seen] == 0).all()
        assert relative(got, want) < 1e-6


def test_grouped_queries() -> None:
    a = attn(40, (3,), heads=4, key_heads=2)
    dense, tiles = (rendered(lambda how: Ball(radius=4, how=how), how, (40,), a) for how in ("dense", "gathered"))
    want, got = sdpa(a._replace(mask=dense)), sdpa(a._replace(mask=tiles))
    assert relative(got["img"], want["img"]) < 1e-6
    assert relative(got["text0"], want["text0"]) < 1e-6


@pytest.mark.parametrize(
    "window", [Ball(radius=8, how="gathered"), Cells(sides=(8, 8), how="gathered"), Box(reach=(0, None), how="gathered")]
)
def test_cost_is_linear_in_tokens(window) -> None:
    """Counted, not timed: four times the tokens, four times the multiply-adds (a whole row: two times four), at 32 x 32 and 64 x 64."""
    macs = []
    for side in (32, 64):
        a = attn(side * side)
        mask = rendered(lambda how: window, "", (side, side), a)
        macs.append(count(lambda a=a, mask=mask: sdpa(a._replace(mask=mask))).macs)
        sizes = [u.numel() for u in mask if isinstance(u, Tensor)]
        assert max(sizes) < 600 * side * side
    assert macs[1] == macs[0] * (8 if isinstance(window, Box) else 4)
    assert macs[1] == 4 * 64 * 64 * window.tiling((64, 64)).keys * 8 * 2  # batch and heads, queries, keys, width, two products


def test_auto_is_dense_where_tiles_would_not_pay_and_for_whatever_is_no_single_window_over_a_full_grid() -> None:
    window, large, small = Within(Ball(radius=4)), grid_layout((32, 32)), grid_layout((8, 8))

    def kind(functions: Any, q: Layout, k: Layout | None = None) -> type:
        return type(render(functions, {"img": q}, {"img": q if k is None else k}))

    def left(q: Layout, k: Layout, q_name: str, k_name: str) -> Tensor:
        return (k.coords[..., 1] < 2)[:, None]

    some = large.take(torch.arange(0, 1024, 2)[None])
    assert kind([window], large) is Gathered
    assert kind([window], small) is Tensor
    assert kind([window, left], large) is Tensor
    assert kind([window], some) is Tensor
    assert kind([window], some, large) is Tensor
    assert kind([window], large._replace(coords=large.coords * 2)) is Tensor
    assert kind([window], large._replace(coords=large.coords.clone())) is Gathered
    assert kind([], large) is type(None)
    both = render([window, left], {"img": large}, {"img": large})
    seen = brute_ball(large) & (large.coords[0, :, 1] < 2)
    assert torch.equal(both[0, 0], seen | ~seen.any(-1, keepdim=True))  # type: ignore[index]


def brute_ball(layout: Layout) -> Tensor:
    return torch.cdist(layout.coords, layout.coords)[0] < 4


def test_windows_under_token_selection_are_those_of_the_whole() -> None:
    """Half of the queries see, of all keys, what they would see in the full grid."""
    large = grid_layout((16, 16))
    rows = torch.arange(0, 256, 2)[None]
    mask = render([Within(Ball(radius=4))], {"img": large.take(rows)}, {"img": large})
    assert torch.equal(mask[0, 0], brute_ball(large)[rows[0]])  # type: ignore[index]


@pytest.mark.parametrize(("sizes", "neighbours"), [((8,), 193), ((16,), 793), ((32,), 3205)])
def test_clears_neighbours(sizes, neighbours) -> None:
    """The published numbers of keys in a disc of radius 8, 16, 32; the token in the middle of a 65 x 65 grid."""
    layout = grid_layout((65, 65))
    middle = layout.take(torch.tensor([[32 * 65 + 32]]))
    mask = render([Within(Ball(radius=sizes[0]))], {"img": middle}, {"img": layout})
    assert mask.sum() == neighbours  # type: ignore[union-attr]


def test_a_block_may_have_windows_of_its_own() -> None:
    """As in DiT-3D: every second block sees its cell. Blocks with other masks are another kind; the graphs are as counted."""
    model = DiT.tiny()
    plain = sample(model)
    for i in (1, 3):
        model.blocks[i].masks = (Within(Cells(sides=(2, 3), how="gathered")),)
    windowed = sample(model)
    assert not torch.equal(windowed, plain)
    assert block_kind(model.blocks[0]) != block_kind(model.blocks[1]) == block_kind(model.blocks[3])
    torch._dynamo.reset()
    counted = Counted(model, "block")
    assert torch.equal(sample(counted.model), windowed)
    assert counted.graphs == count_graphs(model, 6) == 2
    for i in (1, 3):
        model.blocks[i].masks = (Within(Cells(sides=(4, 6))),)
    assert torch.equal(sample(model), plain)


class Near(Method):
    """A window of any kind."""

    name, stage = "near", "attention"

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def mask(self, q: Layout, k: Layout, q_name: str, k_name: str) -> Window | None:
        return Within(self.window)(q, k, q_name, k_name)


def test_blocks_in_a_backbone_capture_full_graph() -> None:
    """FlexAttention in compiled blocks: as many graphs as computed, none added by a second run."""
    base = draw_parameters(DiT(input_size=(16, 32), in_channels=3, out_channels=3, dim=32, depth=2, num_heads=4, num_classes=5)).eval()
    view = with_methods(base, Near(Ball(radius=2, how="blocks")))
    torch._dynamo.reset()
    counted = Counted(view, "block")
    want = sample(with_methods(base, Near(Ball(radius=2, how="dense"))))
    assert relative(sample(counted.model), want) < 1e-6
    assert counted.graphs == count_graphs(view, 6)
    sample(counted.model, seed=1)
    assert counted.graphs == count_graphs(view, 6)
    assert relative(sample(view), want) < 1e-6


def test_mistakes_are_named() -> None:
    layout = {"img": grid_layout((4, 4))}
    with pytest.raises(DitkitError, match="3 axes"):
        render([Within(Box(reach=(1, 1, 1)))], layout, layout)
    with pytest.raises(DitkitError, match="3 axes"):
        render([Within(Cells(sides=(1, 1, 1), how="gathered"))], layout, layout)
    for make in (
        lambda: Ball(radius=0),
        lambda: Box(reach=(None, None)),
        lambda: Box(reach=(-1, 2)),
        lambda: Cells(sides=(2, 2), shift=(2, 0)),
    ):
        with pytest.raises(DitkitError):
            make()


# ---- partition and reverse ---------------------------------------------------------------------------------------------------

PARTITIONS = [
    ((12,), (4,), ()),
    ((7, 10), (4, 5), ()),
    ((8, 10), (4, 5), (2, 1)),
    ((7, 9), (4, 5), (1, 2)),
    ((3, 6, 7), (2, 3, 2), (1, 0, 1)),
]


@pytest.mark.parametrize(("grid", "sides", "shift"), PARTITIONS)
@pytest.mark.parametrize("inner", [(), (3,), (2, 3)])
def test_partition_and_back_is_the_identity(grid, sides, shift, inner) -> None:
    windows = Windows(grid, sides, shift)
    x = torch.randn(2, torch.Size(grid).numel(), *inner)
    parts = windows.partition(x)
    assert parts.shape == (2 * torch.Size(windows.counts).numel(), torch.Size(sides).numel(), *inner)
    assert torch.equal(windows.reverse(parts), x)
    assert torch.equal(windows.partition(x[1:]), parts[len(parts) // 2 :]), "windows of one sample stand together"


def test_which_tokens_are_in_a_window() -> None:
    x = torch.arange(16)[None, :, None]
    assert Windows((4, 4), (2, 2)).partition(x)[..., 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert Windows((4, 4), (2, 2), (1, 1)).partition(x)[0, :, 0].tolist() == [5, 6, 9, 10]


@pytest.mark.parametrize(("grid", "sides", "shift"), PARTITIONS)
def test_attention_in_partitions_is_attention_in_cells(grid, sides, shift) -> None:
    """The Swin way (roll, cut, mask) and the mask by coordinates are the same attention."""
    windows, n = Windows(grid, sides, shift), torch.Size(grid).numel()
    q, k, v = (torch.randn(2, n, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = windows.mask()
    many = None if mask is None else mask.repeat(2, 1, 1)
    got = windows.reverse(F.scaled_dot_product_attention(*(windows.partition(u) for u in (q, k, v)), many))
    seen = brute(Cells(sides=sides, shift=shift), grid)
    assert relative(got, F.scaled_dot_product_attention(q, k, v, seen)) < 1e-6


def test_partition_mistakes_are_named() -> None:
    with pytest.raises(DitkitError, match="2 numbers each"):
        Windows((4, 4), (2, 2, 2))
    with pytest.raises(DitkitError, match="shift"):
        Windows((4, 4), (2, 2), (2, 0))
