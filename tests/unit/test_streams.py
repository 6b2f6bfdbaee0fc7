"""Streams: everything that travels with the tokens moves in one call."""

from __future__ import annotations

import pytest
import torch

from ditkit.core.masks import padding, render
from ditkit.core.streams import Layout, Stream, concatenate, grid_layout, rows
from ditkit.nn.positions import Rope


def stream(grid: tuple[int, ...] = (3, 4), batch: int = 2, seed: int = 0) -> Stream:
    g = torch.Generator().manual_seed(seed)
    layout = grid_layout(grid)
    n = layout.total
    layout = layout._replace(segment=torch.arange(n)[None], valid=torch.rand(batch, n, generator=g) > 0.2)
    c = torch.randn(batch, n, 3, generator=g)
    return Stream(torch.randn(batch, n, 5, generator=g), layout, c, (torch.randn(1, n, 4, generator=g), torch.randn(1, n, 4, generator=g)))


def test_take_moves_everything() -> None:
    s = stream()
    idx = torch.tensor([[5, 1, 7], [0, 2, 11]])
    t = s.take(idx)
    for b in range(2):
        assert torch.equal(t.x[b], s.x[b, idx[b]])
        assert torch.equal(t.c[b], s.c[b, idx[b]])
        assert torch.equal(t.layout.coords[b], s.layout.coords[0, idx[b]])
        assert torch.equal(t.layout.segment[b], s.layout.segment[0, idx[b]])
        assert torch.equal(t.layout.valid[b], s.layout.valid[b, idx[b]])
        assert torch.equal(t.rope[0][b], s.rope[0][0, idx[b]])
    assert t.layout.grid is None
    assert t.layout.total == s.layout.total


def test_taking_twice_gives_rows_of_the_whole() -> None:
    s = stream()
    t = s.take(torch.tensor([[5, 1, 7], [0, 2, 11]])).take(torch.tensor([[2, 0], [1, 2]]))
    assert t.layout.idx.tolist() == [[7, 5], [2, 11]]


def test_put_after_take_is_the_identity() -> None:
    s = stream()
    idx = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(b))[:7] for b in range(2)])
    assert torch.equal(s.take(idx).put(s.x), s.x)
    changed = s.take(idx).put(s.x, torch.zeros(2, 7, 5))
    assert torch.equal(rows(changed, idx), torch.zeros(2, 7, 5))


def test_resizing_up_and_pooling_back_is_the_identity() -> None:
    s = Stream(torch.randn(2, 12, 5), grid_layout((3, 4)))
    assert torch.allclose(s.resize((6, 8), "nearest").resize((3, 4), "mean").x, s.x)


@pytest.mark.parametrize(("grid", "fewer"), [((4, 6), (2, 2)), ((5, 7), (3, 4)), ((3, 5, 4), (2, 3, 3)), ((40,), (3,))])
def test_pooled_tokens_are_turned_by_the_middle_of_their_cells(grid: tuple[int, ...], fewer: tuple[int, ...]) -> None:
    """Not by the mean of the turns, which is none. Coordinates of the pooled layout are those middles."""
    rope = Rope((4,) * len(grid))
    s = Stream(torch.zeros(1, torch.Size(grid).numel(), 2), grid_layout(grid), rope=rope.table(grid))
    pooled = s.resize(fewer, "mean")
    assert pooled.rope is not None
    for got, want in zip(pooled.rope, rope.at(pooled.layout.coords)):
        assert torch.allclose(got, want, atol=1e-5)
    assert s.resize(grid, "mean") is s


def test_resizing_part_of_a_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="full grid"):
        stream().take(torch.zeros(2, 3, dtype=torch.long)).resize((2, 2), "mean")


def test_concatenation_fills_in_what_only_some_have() -> None:
    a, b = stream(), Stream(torch.randn(2, 6, 5), grid_layout((2, 3, 1)))
    s = concatenate(a, b)
    assert s.x.shape == (2, 18, 5)
    assert s.layout.coords.shape == (1, 18, 3) or s.layout.coords.shape == (2, 18, 3)
    assert s.layout.valid[:, 12:].all()
    assert torch.equal(s.layout.valid[:, :12], a.layout.valid)
    assert torch.equal(s.rope[0][:, 12:], torch.ones_like(s.rope[0][:, 12:]))
    assert torch.equal(s.rope[1][:, 12:], torch.zeros_like(s.rope[1][:, 12:]))


def test_concatenating_selections_keeps_rows_of_the_whole() -> None:
    a = stream().take(torch.tensor([[1, 3], [0, 2]]))
    s = concatenate(a, stream(grid=(2, 2)))
    assert s.layout.idx.tolist() == [[1, 3, 12, 13, 14, 15], [0, 2, 12, 13, 14, 15]]


def test_equal_grids_share_one_layout() -> None:
    assert grid_layout((3, 4)) is grid_layout((3, 4))


def test_masks_are_anded_over_segments_and_no_row_is_empty() -> None:
    q = grid_layout((2, 2))
    k = Layout(torch.zeros(1, 3, 2), 3, valid=torch.tensor([[True, False, True], [False, False, False]]))

    def causal(a: Layout, b: Layout, i: str, j: str) -> torch.Tensor | None:
        return torch.tensor([[[True, True, False]]]).expand(1, 4, 3) if j == "text" else None

    mask = render([padding, causal], {"img": q}, {"img": q, "text": k})
    assert mask.shape == (2, 1, 4, 7)
    assert mask[0, 0, 0].tolist() == [True] * 4 + [True, False, False]
    assert mask[1, 0, 0].tolist() == [True] * 4 + [False] * 3
    alone = render([padding], {"img": q}, {"text": k})
    assert alone[1].all(), "a query that may look nowhere looks everywhere, so that nothing is NaN"
    assert render([padding], {"img": q}, {"img": q}) is None
