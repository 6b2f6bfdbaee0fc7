"""TaylorSeer: exact where the series is, FORA at order 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.backbones.dit import DiT
from ditkit.core.errors import DitkitError
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


class Output(Method):
    """Replaces the network's output by the value for the step; counts its calls."""

    name, stage = "output", "numbers"

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values, self.calls = values, 0

    def predict(self, nxt: Any, x: Tensor, run: Run) -> Tensor:
        self.calls += 1
        return torch.full_like(nxt(x), self.values[run.step])


def outputs(values: list[float], **settings: Any) -> tuple[list[float], int]:
    """What a network that says ``values`` seems to say behind a TaylorSeer of its output, and how often it was asked."""
    truth = Output(values)
    view = with_methods(DiT.tiny(), TaylorSeer(of="network", **settings), truth)
    x, t, cond = view.example()
    run = Run(view, len(values))
    with torch.no_grad():
        return [float(view(x, t, run=run, **cond).mean()) for _ in run.steps()], truth.calls


@pytest.mark.parametrize(("order", "coefficients"), [(0, (3.0,)), (1, (2.0, -0.5)), (2, (2.0, -0.5))])
def test_the_networks_output_is_exact_on_lines(order: int, coefficients: tuple[float, ...]) -> None:
    values = [sum(c * s**i for i, c in enumerate(coefficients)) for s in range(12)]
    seen, calls = outputs(values, interval=4, order=order)
    assert seen == pytest.approx(values, abs=1e-4)
    assert calls == 5  # 0 and 1, then 3, 7 and 11


def test_the_networks_second_difference_by_hand() -> None:
    """As for branches above: 20 at two steps after 9."""
    seen, calls = outputs([0.0, 1.0, 1e9, 9.0, 1e9, 1e9, 0.0], interval=3, order=2)
    assert seen[5] == pytest.approx(20.0, rel=1e-5)
    assert calls == 4


def test_a_pass_that_paused_starts_anew() -> None:
    """Guidance on an interval: the null pass leaves out steps 2 to 4, and what it kept before them is not used after."""
    truth = Output([float(s) for s in range(8)])
    view = with_methods(DiT.tiny(), TaylorSeer(of="network", interval=8, warmup=1), truth)
    x, t, cond = view.example()
    run = Run(view, 8)
    seen = {}
    with torch.no_grad():
        for step in run.steps():
            if step not in (2, 3, 4):
                seen[step] = float(view(x, t, run=run, guidance_pass="null", **cond).mean())
    assert seen == {0: 0.0, 1: 0.0, 5: 5.0, 6: 5.0, 7: 7.0}


def test_another_batch_in_the_same_pass_is_refused() -> None:
    view = with_methods(DiT.tiny(), TaylorSeer(of="network"))
    run = Run(view, 9)
    with torch.no_grad():
        for step in run.steps():
            x, t, cond = view.example(3 if step == 3 else 2)
            if step == 3:
                with pytest.raises(DitkitError, match="batch of 2, this one has 3"):
                    view(x, t, run=run, **cond)
                return
            view(x, t, run=run, **cond)
