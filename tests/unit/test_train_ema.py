"""The averaged weights: float32, in a model of their own (case A12)."""

import pytest
import torch
from torch import nn

from ditkit.backbones.dit import DiT
from ditkit.core.view import with_methods
from ditkit.methods.efficiency.fora import FORA
from ditkit.train.ema import EMA, second_model


class One(nn.Module):
    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), value, dtype=dtype))


def follow(model: One, start: float, decay: float, steps: int) -> torch.Tensor:
    twin = second_model(model)
    twin.w.data.fill_(start)
    ema = EMA(twin, model, decay)
    for _ in range(steps):
        ema.update()
    return ema.shadow["w"]


def test_a12_the_average_moves() -> None:
    shadow = follow(One(1.01), 1.0, 0.9999, 1000)[0].item()
    # 1 + 0.01 (1 - 0.9999^1000) = 1.0009517; each step adds about 1e-6, which float32 rounds to 8 of its units (2^-23)
    assert shadow == pytest.approx(1.00095, abs=5e-6)
    assert shadow == 1 + 1000 * 8 * 2.0**-23


def test_a12_in_float32_whatever_the_model_is() -> None:
    model = One(1.01, torch.bfloat16)
    shadow = follow(model, 1.0, 0.9999, 1000)
    assert shadow.dtype == torch.float32
    rounded = model.w[0].item()  # 1.01 in bfloat16 is 1.0078125
    assert shadow[0].item() - 1 == pytest.approx((rounded - 1) * (1 - 0.9999**1000), rel=0.05)


def test_n_equal_steps_decay_geometrically() -> None:
    assert follow(One(2.0), 5.0, 0.9, 7)[0].item() == pytest.approx(2 + 0.9**7 * 3, rel=1e-6)


def test_a_step_that_was_skipped_on_the_device_changes_nothing() -> None:
    model = One(2.0)
    ema = EMA(second_model(model), model, 0.5)
    model.w.data.fill_(4.0)
    ema.update(torch.tensor(0.0))
    assert ema.shadow["w"].tolist() == [2.0] * 3
    ema.update(torch.tensor(1.0))
    assert ema.shadow["w"].tolist() == [3.0] * 3


def test_what_is_frozen_is_shared_and_what_is_trained_is_not() -> None:
    base = DiT.tiny()
    view = with_methods(base, FORA(interval=2))
    for name, p in view.named_parameters():
        p.requires_grad_(name.startswith("final."))
    twin = second_model(view)
    mine, theirs = dict(twin.named_parameters()), dict(view.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all((mine[n] is theirs[n]) is not n.startswith("final.") for n in mine)
    assert list(EMA(twin, view, 0.9).shadow) == [n for n in mine if n.startswith("final.")]
    assert [m.label for m in twin.attached] == ["fora"]
    assert not twin.training


def test_the_distance_is_relative() -> None:
    model = One(4.0)
    ema = EMA(second_model(model), model, 0.5)
    ema.shadow["w"].fill_(3.0)
    assert ema.distance() == pytest.approx(0.25)
