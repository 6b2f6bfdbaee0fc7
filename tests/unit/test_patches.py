"""Patches of one to three axes: strided convolutions, exact inverses, both orders of a token's numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ditkit.core.errors import DitkitError
from ditkit.nn.patches import PatchEmbed, patchify, unpatchify

CASES = [((12,), (3,)), ((6, 10), (2, 5)), ((4, 6, 4), (1, 2, 2)), ((4, 6, 9), (2, 3, 3))]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def data(sides: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("sides", "patch"), CASES)
@pytest.mark.parametrize("order", ["channels first", "channels last"])
def test_round_trip_is_exact(sides, patch, order) -> None:
    x = data(sides)
    tokens = patchify(x, patch, order)
    grid = tuple(s // p for s, p in zip(sides, patch))
    assert tokens.shape == (2, torch.Size(grid).numel(), 3 * torch.Size(patch).numel())
    assert torch.equal(unpatchify(tokens, grid, patch, order), x)


@pytest.mark.parametrize(("sides", "patch"), CASES)
def test_embedding_is_the_strided_convolution(sides, patch) -> None:
    """The weight of a convolution, flattened, is ours; tokens are row-major."""
    torch.manual_seed(0)
    embed, x = PatchEmbed(3, patch, 8), data(sides)
    conv = CONV[len(sides)](x, embed.weight.view(8, 3, *patch), embed.bias, stride=patch)
    torch.testing.assert_close(embed(x), conv.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert embed.grid(x) == conv.shape[2:]
    assert embed(x).is_contiguous()


def test_order_of_the_numbers_in_a_token() -> None:
    """The first token of a picture whose value says channel, row and column."""
    x = torch.tensor([[[[100 * c + 10 * i + j for j in range(4)] for i in range(2)] for c in range(2)]])
    assert patchify(x, 2)[0, 0].tolist() == [0, 1, 10, 11, 100, 101, 110, 111]
    assert patchify(x, 2, "channels last")[0, 0].tolist() == [0, 100, 1, 101, 10, 110, 11, 111]
    assert patchify(x, (2, 2))[0, 1].tolist() == [2, 3, 12, 13, 102, 103, 112, 113]


def test_one_number_is_for_all_axes() -> None:
    x = data((4, 6, 8))
    assert torch.equal(patchify(x, 2), patchify(x, (2, 2, 2)))
    assert PatchEmbed(3, 2, 8, axes=3).weight.shape == (8, 24)


def test_channels_last_embedding_permutes_the_weight() -> None:
    torch.manual_seed(0)
    first, last, x = PatchEmbed(3, (1, 2, 2), 8), PatchEmbed(3, (1, 2, 2), 8, order="channels last"), data((2, 4, 4))
    weight = first.weight.data.view(8, 3, 4).transpose(1, 2).flatten(1)
    last.load_state_dict({"weight": weight, "bias": first.bias.data})
    torch.testing.assert_close(last(x), first(x))


@pytest.mark.parametrize(
    ("patch", "sides", "message"),
    [(2, (5, 4), "height is 5"), ((1, 2, 2), (3, 4, 7), "width is 7"), ((2, 2, 2), (3, 4, 4), "frames is 3"), ((4,), (0,), "length is 0")],
)
def test_sides_that_do_not_fit_are_named(patch, sides, message) -> None:
    with pytest.raises(DitkitError, match=message):
        PatchEmbed(3, patch, 8).grid(torch.zeros(1, 3, *sides))


def test_own_names_of_axes() -> None:
    with pytest.raises(DitkitError, match="x is 3.*use 2 or 4"):
        PatchEmbed(1, 2, 8, axes=3, names=("x", "y", "z")).grid(torch.zeros(1, 1, 3, 4, 4))


def test_mistakes_are_named() -> None:
    with pytest.raises(DitkitError, match="for 2 axes"):
        patchify(torch.zeros(1, 1, 4, 4), (1, 2, 2))
    with pytest.raises(DitkitError, match="channels first"):
        patchify(torch.zeros(1, 1, 4, 4), 2, "rows first")
