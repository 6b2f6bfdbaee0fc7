"""Published parameter counts, exactly, and MACs by the paper's table and the sheet's formula."""

from __future__ import annotations

import pytest
import torch

from ditkit.backbones.dit import DiT

PARAMETERS = {
    "DiT-S/2": 32_963_360,
    "DiT-S/4": 32_945_024,
    "DiT-S/8": 33_148_160,
    "DiT-B/2": 130_512_416,
    "DiT-B/4": 130_475_648,
    "DiT-B/8": 130_881_536,
    "DiT-L/2": 458_102_816,
    "DiT-L/4": 458_053_760,
    "DiT-L/8": 458_594_816,
    "DiT-XL/2": 675_129_632,
    "DiT-XL/4": 675_074_432,
    "DiT-XL/8": 675_683_072,
}


#: DiT-XL/2 by conditioning (section 3.2). The paper prints 449, 598, 600 and 675 million.
CONDITIONING = {"in_context": 449_457_440, "cross_attention": 598_286_624, "adaln": 600_747_296, "adaln_zero": 675_129_632}


def on_meta(name: str, **more: object) -> DiT:
    with torch.device("meta"):
        return DiT(**{**DiT.sizes[name], **more})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name: str) -> None:
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) + model.table_parameters() == PARAMETERS[name]


def test_parameters_at_512_pixels() -> None:
    model = on_meta("DiT-XL/2", input_size=(64, 64))
    assert sum(p.numel() for p in model.parameters()) + model.table_parameters() == 676_014_368


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_parameters_by_conditioning(conditioning: str) -> None:
    """Plain blocks have 12 D^2 + 13 D numbers, cross-attention 4 D^2 + 6 D more; modulation has 6 (D^2 + D), without gates 4, for 4 D."""
    model = on_meta("DiT-XL/2", conditioning=conditioning)
    total = sum(p.numel() for p in model.parameters()) + model.table_parameters()
    d, depth = 1152, 28
    ends = 16 * d + d + 256 * d + d * d + 2 * d + 1001 * d + 32 * d + 32 + 256 * d
    linear = 12 * d * d + 9 * d
    block, head = {
        "in_context": (linear + 4 * d, 2 * d),
        "cross_attention": (linear + 4 * d + 4 * d * d + 6 * d, 2 * d),
        "adaln": (linear + 4 * (d * d + d), 2 * (d * d + d)),
        "adaln_zero": (linear + 6 * (d * d + d), 2 * (d * d + d)),
    }[conditioning]
    assert total == ends + depth * block + head == CONDITIONING[conditioning]


def test_rotary_positions_add_none() -> None:
    model = on_meta("DiT-S/2", positions="rope")
    assert sum(p.numel() for p in model.parameters()) + model.table_parameters() == PARAMETERS["DiT-S/2"] - 256 * 384


def test_the_table_is_complete() -> None:
    assert set(DiT.sizes) == set(PARAMETERS)
