"""TaylorSeer: exact where the series is, FORA at order 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.backbones.dit import DiT
from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.methods.efficiency.fora import FORA
from ditkit.methods.efficiency.taylorseer import TaylorSeer
from ditkit.testing.trajectory import sample


class Polynomial(Method):
    """Replaces every branch's output by a polynomial of the step; records what comes out of the cache around it."""

    name, stage = "polynomial", "numbers"

    def __init__(self, *coefficients: float) -> None:
        super().__init__()
        self.coefficients = coefficients

    def value(self, step: int) -> float:
        return sum(c * step**i for i, c in enumerate(self.coefficients))

    def feed(self, at: Any) -> dict[str, Tensor]:
        return {"value": torch.tensor(self.value(at.step))}

    def branch(self, nxt: Any, h: dict[str, Tensor], site: Any) -> dict[str, Tensor]:
        return {k: torch.full_like(u, 1.0) * site.given["value"] for k, u in h.items()}


class Record(Method):
    """Outermost: what the branch gives, at each step."""

    name, stage = "record", "structure"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def branch(self, nxt: Any, h: dict[str, Tensor], site: Any) -> dict[str, Tensor]:
        out = nxt(h)
        if site.branch == "mlp":
            self.seen.append(float(out["img"].mean()))
        return out


@pytest.mark.parametrize(("order", "coefficients"), [(1, (2.0, -0.5)), (0, (3.0,))])
def test_exact_on_polynomials_of_its_order(order: int, coefficients: tuple[float, ...]) -> None:
    record, truth = Record(), Polynomial(*coefficients)
    view = with_methods(DiT.tiny(), TaylorSeer(interval=4, order=order), truth, record)
    sample(view, num_steps=12)
    per_step = record.seen[:: len(view.blocks)]
    assert per_step == pytest.approx([truth.value(s) for s in range(12)], abs=1e-4)


def test_order_zero_is_fora() -> None:
    """With one warm-up step, order 0 reuses at the same steps."""
    base = DiT.tiny()
    assert torch.equal(sample(with_methods(base, TaylorSeer(interval=3, order=0, warmup=1))), sample(with_methods(base, FORA(interval=3))))


def test_second_difference_by_hand() -> None:
    """Outputs 0, 1, 9 at steps 0, 1, 3: D1 = 4, D2 = (4 - 1) / 2; two steps on: 9 + 4*2 + 1.5*2^2/2 = 20."""
    values = {0: 0.0, 1: 1.0, 3: 9.0}

    class Given(Polynomial):
        def value(self, step: int) -> float:
            return values.get(step, 1e9)

    record = Record()
    view = with_methods(DiT.tiny(), TaylorSeer(interval=3, order=2), Given(), record)
    run = Run(view, 7)  # full at 0 and 1 (warm-up), then s = 6 - step in {3, 0}: 3 and 6
    x, t, cond = view.example()
    with torch.no_grad():
        for step in run.steps():
            if step == 6:
                break
            view(x, t, run=run, **cond)
    per_step = record.seen[:: len(view.blocks)]
    assert per_step[5] == pytest.approx(20.0, rel=1e-5)


def test_report_counts_full_steps() -> None:
    run = Run(with_methods(DiT.tiny(), TaylorSeer(interval=5)), 20)
    assert run.finish() == {"taylorseer": {"full_steps": 6, "hits": 14}}
