"""Solvers: exact where the mathematics says so, the same for a picture in any batch, and strict about their options."""

import pytest
import torch

from ditkit.backbones.dit import DiT
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.run import Run
from ditkit.diffusion import noise
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.process import like
from ditkit.diffusion.solvers import SOLVERS

FIXED = Gaussian(variance="fixed_small")
DATA = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class StubRun:
    """As many steps, no model."""

    methods = ()

    def __init__(self, num_steps):
        self.num_steps = num_steps

    def steps(self):
        yield from range(self.num_steps)


def oracle(process, x0):
    """The network that knows x0."""

    def denoise(x, t):
        alpha, sigma = (like(c, x) for c in process.coefficients(t))
        eps = (x - alpha * x0) / sigma
        return eps - x0 if process.name == "flow" else eps

    return denoise


def solve(name, process, denoise, num_steps, x=None, seeds=(0, 1), **options):
    x = torch.empty_like(DATA) if x is None else x
    draw = noise.source(list(seeds), x)
    return SOLVERS[name](denoise, process.start(draw(0, "start")), process, StubRun(num_steps), draw, **options)


def ways(process, numbers):
    """Every spacing of the process with each of these numbers of steps that it has."""
    for spacing in process.spacings:
        for n in numbers:
            try:
                process.times(n, spacing)
            except DitkitError:
                assert spacing == "ddim"  # integer strides do not give every number
                continue
            yield spacing, n


@pytest.mark.parametrize(
    ("name", "options", "numbers"),
    [("ddim", {}, range(1, 51)), ("ddim", {"eta": 1.0}, (1, 7, 25)), ("ddpm", {}, (1, 2, 13, 50))],
)
def test_a04_an_oracle_returns_its_data(name, options, numbers):
    for spacing, n in ways(FIXED, numbers):
        got = solve(name, FIXED, oracle(FIXED, DATA), n, spacing=spacing, **options)
        assert (got - DATA).abs().max() < 1e-5, (spacing, n)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_an_oracle_returns_its_data_in_float32(name):
    data = DATA.float()
    for n in (1, 10, 50):
        got = solve(name, FIXED, oracle(FIXED, data), n, torch.empty_like(data))
        assert (got - data).abs().max() < 1e-4


def test_a04_the_previous_time_is_the_next_entry():
    process = Gaussian(num_train_steps=100, variance="fixed_small")
    seen = []

    def denoise(x, t):
        seen.append(int(process.network_time(t)))
        return torch.zeros_like(x)

    solve("ddim", process, denoise, 5)
    assert seen == [99, 74, 50, 25, 0]


@pytest.mark.parametrize("name", ["euler", "ddim"])
@pytest.mark.parametrize("n", [1, 3, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_straight_paths_are_solved_exactly(name, n, shift):
    flow = Flow(shift=shift)
    for spacing in flow.spacings:
        assert (solve(name, flow, oracle(flow, DATA), n, spacing=spacing) - DATA).abs().max() < 1e-12


def gaussian_toy(process, mean, deviation):
    """The best network for data N(mean, deviation^2)."""

    def denoise(x, t):
        alpha, sigma = (like(c, x) for c in process.coefficients(t))
        eps = sigma * (x - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)
        x0 = mean + alpha * deviation**2 * (x - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)
        return eps - x0 if process.name == "flow" else eps

    return denoise


def error_of_the_ode(name, process, num_steps):
    """Against the closed form: the probability-flow ODE carries a Gaussian to a Gaussian by an affine map."""
    mean, deviation = 2.0, 0.5
    x = torch.empty(2, 100, dtype=torch.float64)
    start = process.start(noise.source([0, 1], x)(0, "start"))
    alpha, sigma = process.coefficients(process.times(num_steps)[0])
    want = mean + deviation * (start - alpha * mean) / (alpha**2 * deviation**2 + sigma**2).sqrt()
    return float((solve(name, process, gaussian_toy(process, mean, deviation), num_steps, x) - want).abs().max())


@pytest.mark.parametrize(("name", "process", "order"), [("ddim", FIXED, 1), ("euler", Flow(), 1)], ids=["ddim", "euler"])
def test_the_error_of_the_ode_falls_with_the_order_of_the_solver(name, process, order):
    coarse, fine = (error_of_the_ode(name, process, n) for n in (100, 200))
    assert fine < 0.05
    assert coarse / fine == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("n", [1, 10])
def test_ancestral_sampling_of_unit_data_is_exact_with_the_large_variance(n):
    """DDPM, section 3.2: beta is the right variance for data N(0, 1), for any number of steps."""
    process = Gaussian(variance="fixed_large")
    x = torch.empty(20, 2000, dtype=torch.float64)
    got = solve("ddpm", process, gaussian_toy(process, 0.0, 1.0), n, x, range(20))
    sure = float(process.coefficients(process.times(n)[-2]).sigma) ** 2  # the last step adds no noise
    assert float(got.mean()) == pytest.approx(0, abs=0.03)
    assert float(got.var()) == pytest.approx(1 - sure, rel=0.03)


def test_ddim_with_eta_one_is_ddpm_with_the_posterior_variance():
    denoise = gaussian_toy(FIXED, 0.3, 0.7)
    a, b = solve("ddim", FIXED, denoise, 20, eta=1.0), solve("ddpm", FIXED, denoise, 20)
    assert (a - b).abs().max() < 1e-9


def test_clipping_keeps_pixels_in_range():
    big = oracle(FIXED, 3 * torch.ones_like(DATA))
    for name in ("ddpm", "ddim"):
        assert (solve(name, FIXED, big, 10, clip=True) <= 1 + 1e-9).all()


def test_explicit_times_are_visited():
    seen = []

    def denoise(x, t):
        seen.append(float(t))
        return torch.zeros_like(x)

    solve("euler", Flow(shift=3.0), denoise, 2, times=[0.8, 0.5, 0.1])
    assert seen == [0.8, 0.5]


@pytest.mark.parametrize(
    ("name", "process", "options", "message"),
    [
        ("ddim", FIXED, {"ets": 0.5}, "unknown key 'ets'.*did you mean 'eta'"),
        ("ddim", FIXED, {"eta": -1.0}, "'eta' is -1.0"),
        ("ddim", FIXED, {"eta": "1"}, "'eta' is '1'"),
        ("ddpm", FIXED, {"eta": 0.5}, "unknown key 'eta'"),
        ("euler", FIXED, {}, "solver euler with the gaussian process, which has no dx"),
        ("ddim", FIXED, {"spacing": "even"}, "no spacing 'even'"),
        ("ddim", FIXED, {"spacing": "10,15,20"}, "has 45 steps, not 4"),
        ("ddim", FIXED, {"times": [1.0, 0.0]}, "2 times for 4 steps"),
        ("ddim", FIXED, {"times": [1.0, 0.7, 0.5, 0.1, 0.0], "spacing": "linspace"}, "one of them"),
    ],
)
def test_refusals(name, process, options, message):
    with pytest.raises(DitkitError, match=message):
        solve(name, process, oracle(process, DATA), 4, **options)


def test_options_carry_their_help():
    fields = SOLVERS["ddim"].options.model_fields
    assert set(fields) == {"eta", "clip"}
    assert all(f.description for f in fields.values())
    with pytest.raises(ConfigError, match="solver ddim"):
        SOLVERS["ddim"].options.parse({"eta": None}, "solver ddim")


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a21_a_picture_does_not_depend_on_its_batch(name):
    model, process = DiT.tiny(), Gaussian()
    x, _, _ = model.example(4)
    y = torch.tensor([0, 1, 2, 3])

    def pictures(seeds):
        cond = {"y": y[seeds]}
        run, draw = Run(model, 10), noise.source(seeds, x[seeds])
        with torch.inference_mode():
            denoise = guided(model, process, Guidance(scale=2.0), run, cond, model.null(cond["y"]))
            return SOLVERS[name](denoise, process.start(draw(0, "start")), process, run, draw)

    together = pictures([0, 1, 2, 3])
    for parts in ([[0, 1], [2, 3]], [[0], [1], [2], [3]]):
        apart = torch.cat([pictures(p) for p in parts])
        assert (apart - together).abs().max() <= 1e-5 * together.abs().max()
