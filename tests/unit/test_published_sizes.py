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


def test_the_table_is_complete() -> None:
    assert set(DiT.sizes) == set(PARAMETERS)
