"""Solvers over several predictions: exact integrals, order of convergence, the law of what a stochastic one ends with, refusals."""

import math

import numpy as np
import pytest
import torch

from ditkit.core.errors import ConfigError
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.interpolant import Interpolant
from ditkit.diffusion.multistep import Past, integral
from ditkit.diffusion.process import like
from ditkit.diffusion.sa import weights
from ditkit.diffusion.solvers import SOLVERS

MEAN, DEVIATION = 2.0, 0.5
GVP, FLOW, FIXED = Interpolant(path="gvp"), Flow(), Gaussian(variance="fixed_small")


class StubRun:
    """As many steps, no model."""

    methods = ()

    def __init__(self, num_steps):
        self.num_steps = num_steps

    def steps(self):
        yield from range(self.num_steps)


def best_network(process):
    """For data N(MEAN, DEVIATION^2)."""

    def denoise(x, t):
        alpha, sigma = (like(c, x) for c in process.coefficients(t))
        total = alpha**2 * DEVIATION**2 + sigma**2
        eps, x0 = sigma * (x - alpha * MEAN) / total, MEAN + alpha * DEVIATION**2 * (x - alpha * MEAN) / total
        if not process.continuous:
            return eps
        rates = process.rates(t)
        velocity = like(rates.alpha, x) * x0 + like(rates.sigma, x) * eps
        return velocity if process.name == "flow" else -velocity

    return denoise


def solve(name, process, x, times, noise_seed=0, **options):
    g = torch.Generator().manual_seed(noise_seed)

    def draw(step, purpose):
        return torch.randn(x.shape, dtype=x.dtype, generator=g)

    return SOLVERS[name](best_network(process), x, process, StubRun(len(times) - 1), draw, times=times, **options)


def error_of_the_ode(name, process, num_steps, **options):
    """Against the closed form, an affine map. Steps are short at both ends, where they are of lower order."""
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    times = 0.9 - 0.8 * (3 - 2 * u) * u**2
    (a1, a0), (s1, s0) = (c.tolist() for c in process.coefficients(times[[0, -1]]))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[None]
    spread = math.sqrt((a0**2 * DEVIATION**2 + s0**2) / (a1**2 * DEVIATION**2 + s1**2))
    want = a0 * MEAN + spread * (x - a1 * MEAN)
    return float((solve(name, process, x, times, **options) - want).abs().max())


SA = {"tau": 0.0}


@pytest.mark.parametrize("process", [GVP, FLOW], ids=["gvp", "flow"])
@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("dpm++2m", {}, 2),
        ("dpm++3m", {}, 2),
        ("dpm++3m", {"exact": True}, 3),
        ("sa", {**SA, "predictor_order": 1, "corrector_order": 0}, 1),
        ("sa", {**SA, "predictor_order": 2, "corrector_order": 0}, 2),
        ("sa", {**SA, "predictor_order": 2, "corrector_order": 2}, 2),
        ("sa", {**SA, "predictor_order": 3, "corrector_order": 0}, 3),
        ("sa", {**SA, "predictor_order": 3, "corrector_order": 3}, 3),
    ],
    ids=["2m", "3m", "3m-exact", "sa-1-0", "sa-2-0", "sa-2-2", "sa-3-0", "sa-3-3"],
)
def test_the_error_of_the_ode_falls_with_the_order(name, options, order, process):
    coarse, fine = (error_of_the_ode(name, process, n, **options) for n in (80, 160))
    assert fine < 0.02
    assert coarse / fine == pytest.approx(2**order, rel=0.25)


def test_more_predictions_make_smaller_errors():
    errors = [
        error_of_the_ode(name, GVP, 80, **options) for name, options in (("dpm++2m", {}), ("dpm++3m", {}), ("dpm++3m", {"exact": True}))
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("c", [1.0, 1.36, 2.0])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_weights_are_integrals_of_polynomials(count, ahead, c):
    """Exact for every polynomial through the places; of two, the slope's is that of the ODE's second order, h^2 / 2."""
    h = 0.7
    places = ([0.0, h, 1.1, 1.7] if ahead else [h, 1.1, 1.7, 2.4])[:count]
    u = np.polynomial.legendre.leggauss(40)
    nodes, measure = (u[0] + 1) * h / 2, u[1] * h / 2 * np.exp(-c * (u[0] + 1) * h / 2)
    for power in range(count):
        got = sum(w * (h - v) ** power for w, v in zip(weights(places, h, c), places))
        want = h**2 / 2 if (count, power) == (2, 1) else float((measure * (h - nodes) ** power).sum())
        assert got == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_a_parabola_is_integrated_exactly():
    start, h, curve = -0.3, 0.8, lambda lam: 2 - lam + 3 * lam**2
    past = [Past(torch.tensor([curve(lam)], dtype=torch.float64), lam) for lam in (start, start - 0.5, start - 1.2)]
    nodes, measure = np.polynomial.legendre.leggauss(40)
    lam = start + (nodes + 1) * h / 2
    want = float((measure * h / 2 * np.exp(lam - start - h) * curve(lam)).sum())
    assert float(integral(past, start + h)) == pytest.approx(want, rel=1e-12)
    plain = [Past(p.x0, p.log_ratio) for p in past[:1]]
    assert float(integral(plain, math.inf)) == float(past[0].x0)  # a step to data


@pytest.mark.parametrize(
    ("process", "tau"), [(FIXED, 1.0), (FLOW, 0.0), (FLOW, 1.5), (GVP, 0.5)], ids=["gaussian", "flow-0", "flow", "gvp"]
)
def test_sa_ends_with_the_data_whatever_tau(process, tau):
    """Every tau has the same marginals: mean 2 and deviation 0.5 of 10,000 samples, to their own error and that of 200 steps."""
    start = torch.randn(1, 10000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = solve("sa", process, start, process.times(200), tau=tau, tau_interval=(0.05, 0.95))
    assert float(got.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(got.std()) == pytest.approx(DEVIATION, rel=0.03)
    assert (tau == 0) == bool(torch.equal(got, solve("sa", process, start, process.times(200), 5, tau=tau, tau_interval=(0.05, 0.95))))


def test_sa_draws_only_where_it_adds_noise():
    steps, x = [], torch.zeros(1, 4, dtype=torch.float64)
    times = torch.linspace(1, 0, 11, dtype=torch.float64)

    def draw(step, purpose):
        steps.append((step, purpose))
        return torch.zeros_like(x)

    SOLVERS["sa"](best_network(FLOW), x, FLOW, StubRun(10), draw, times=times)
    assert steps == [(i, "step") for i in range(1, 8)]  # those that end at 0.8, 0.7, ... 0.2


@pytest.mark.parametrize("name", ["dpm++2m", "dpm++3m", "sa"])
def test_equal_steps_of_log_snr(name):
    times = FIXED.times(8, "logsnr")
    alpha, sigma = FIXED.coefficients(times)
    steps = (alpha / sigma).log().diff()
    assert float(times[0]) == 1
    assert float(times[-1]) == pytest.approx(0.001)
    assert torch.allclose(steps, steps.mean().expand(8), rtol=1e-9)
    got = solve(name, FIXED, torch.zeros(1, 3, dtype=torch.float64), times)
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sa", {"tau": -1.0}),
        ("sa", {"predictor_order": 0}),
        ("sa", {"predictor_order": 5}),
        ("sa", {"tau_interval": (0.8, 0.2)}),
        ("dpm++3m", {"tau": 1.0}),
    ],
)
def test_wrong_options_are_named(name, options):
    with pytest.raises(ConfigError, match=f"solver {name}".replace("+", r"\+")):
        solve(name, FLOW, torch.zeros(1, 2), FLOW.times(4), **options)
