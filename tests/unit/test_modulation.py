"""Modulation made ahead: exact, with whatever else acts on the projections, and only where times are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.backbones.dit import DiT
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.diffusion import noise
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.process import Process
from ditkit.diffusion.solvers import SOLVERS
from ditkit.eval.counters import count_run
from ditkit.methods import FORA, Int8, LoRA, Modulation
from ditkit.nn.int8 import has_onednn
from ditkit.testing.contract import draw
from ditkit.testing.trajectory import relative

INT8 = {"kernel": "onednn" if has_onednn() else "int_mm", "exclude": ""}  # modulation too


def multiplied(model: DiT) -> list[int]:
    """Filled with the rows that each projection ``ada`` of the model and its views multiplies."""
    rows: list[int] = []
    for b in model.blocks:
        b.parts["img"].ada.register_forward_hook(lambda m, args, y: rows.append(args[0].numel() // args[0].shape[-1]))
    return rows


@pytest.fixture
def base() -> DiT:
    return DiT.tiny(out_channels=3, depth=2)


@torch.no_grad()
def solve(
    model: Any, solver: str = "euler", steps: int = 5, process: Process | None = None, labels: tuple[int, ...] = (1, 3, 1), **guide: Any
) -> tuple[Tensor, dict[str, Any]]:
    y = torch.tensor(labels)
    run = Run(model, steps)
    process = process or Flow()
    seeds = list(range(len(labels)))
    denoise = guided(model, process, Guidance(**guide), run, {"y": y}, model.null(y))
    x = noise.normal(seeds, 0, "start", (3, 8, 12))
    x = SOLVERS[solver](denoise, x, process, run, noise.source(seeds, x))
    return x, run.finish()


OTHERS = {
    "alone": [],
    "fora": [lambda: FORA(interval=2)],
    "lora": [lambda: LoRA(rank=2)],
    "a LoRA that varies": [lambda: LoRA(rank=2, window=(0.3, 1.0), schedule=(0.5, 1.0))],
    "int8": [lambda: Int8(**INT8)],
    "all": [lambda: FORA(interval=2), lambda: LoRA(rank=2), lambda: Int8(**INT8)],
}


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("guide", [{}, {"scale": 2.0}, {"scale": 2.0, "batched": True}, {"scale": 2.0, "interval": (0.3, 0.7)}], ids=str)
def test_the_same_trajectory(base: DiT, others: str, guide: dict[str, Any]) -> None:
    want, _ = solve(draw(with_methods(base, *(make() for make in OTHERS[others]))), **guide)
    got, report = solve(draw(with_methods(base, *(make() for make in OTHERS[others]), Modulation(steps=3))), **guide)
    assert relative(got, want) < (1e-3 if others in ("int8", "all") else 1e-6)  # rounding to 8 bits makes steps of last bits
    assert report["modulation"] == {"hits": 3}


@pytest.mark.parametrize(
    ("solver", "process"), [("heun", Flow()), ("dpm++2m", Flow()), ("euler_maruyama", Flow()), ("ddpm", Gaussian(variance="fixed_small"))]
)
def test_other_solvers(base: DiT, solver: str, process: Process) -> None:
    want, _ = solve(base, solver, process=process, scale=2.0)
    got, _ = solve(with_methods(base, Modulation()), solver, process=process, scale=2.0)
    assert relative(got, want) < 1e-6


def test_rows_are_multiplied_once(base: DiT) -> None:
    """5 steps ahead of labels 1, 3, 1 are 2 x 5 rows, of no label 5; without, each step has 3 and 3."""
    rows = multiplied(base)
    solve(base, scale=2.0)
    assert rows == [3] * (2 * 2 * 5)
    rows.clear()
    solve(with_methods(base, Modulation()), scale=2.0)
    assert rows == [10, 10, 5, 5]


def test_windows_bound_what_is_kept(base: DiT) -> None:
    rows = multiplied(base)
    solve(with_methods(base, Modulation(steps=2)))
    assert rows == [4, 4, 4, 4, 2, 2]  # steps 0-1, 2-3, 4 of two labels, two blocks each


def test_where_times_are_not_known_it_is_absent(base: DiT) -> None:
    """An adaptive solver, a forward without a run, training: the base bit for bit, with gradients."""
    view = with_methods(base, Modulation())
    want, _ = solve(base, "dopri5", steps=60)
    with pytest.warns(UserWarning, match="modulation is on and reused nothing"):
        got, report = solve(view, "dopri5", steps=60)
    assert torch.equal(got, want)
    assert report["modulation"] == {"hits": 0}
    x, t, cond = base.example()
    assert torch.equal(view(x, t, **cond), base(x, t, **cond))
    view(x, t, **cond).sum().backward()
    assert base.blocks[0].parts["img"].ada.weight.grad.abs().sum() > 0
    base.zero_grad(set_to_none=True)


def test_other_times_than_announced_are_an_error(base: DiT) -> None:
    view = with_methods(base, Modulation())
    x, t, cond = base.example()
    run, prepared = Run(view, 3), view.prepare(**cond)
    run.times = torch.tensor([900.0, 600.0, 300.0])
    with torch.no_grad():
        for i in run.steps():
            view(x, torch.full((2,), [900.0, 500.0, 300.0][i]), prepared, run=run)
    with pytest.raises(DitkitError, match=r"step 1 was at network time \[500.0, 500.0\], announced was 600"):
        run.finish()


def test_a_time_for_each_token_is_computed_as_it_comes(base: DiT) -> None:
    view = with_methods(base, Modulation())
    x, _, cond = base.example()
    t = torch.rand(2, 24) * 999
    run = Run(view, 2)
    run.times = torch.tensor([1.0, 0.0])
    with torch.no_grad():
        assert torch.equal(view(x, t, run=run, **cond), base(x, t, **cond))


@pytest.mark.parametrize("conditioning", ["cross_attention", "in_context"])
def test_what_is_not_modulated_is_refused(conditioning: str) -> None:
    with pytest.raises(Conflict, match="no block of dit is modulated"):
        with_methods(DiT.tiny(conditioning=conditioning, depth=2), Modulation())


def test_weights_are_read_once(base: DiT) -> None:
    """6 (D^2 + D) numbers a block in fp32, read at the first step only; the work is the same, but for time, embedded once more."""
    model = base.to("meta")
    plain, ahead = count_run(model, 3, guided=True), count_run(with_methods(model, Modulation()), 3, guided=True)
    d, depth = 32, 2
    assert [a.weight_bytes - b.weight_bytes for a, b in zip(plain.steps, ahead.steps)] == [0] + [4 * depth * 6 * (d * d + d)] * 2
    assert ahead.macs - plain.macs == 2 * 3 * (256 * d + d * d)
    assert [a.macs - b.macs for a, b in zip(plain.steps, ahead.steps)][1:] == [2 * depth * 6 * d * d] * 2
