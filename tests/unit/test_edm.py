"""EDM: table 1 of the paper."""

import math

import pytest
import torch

from ditkit.core.errors import ConfigError
from ditkit.diffusion.edm import EDM
from ditkit.diffusion.noise import source
from ditkit.diffusion.process import like
from ditkit.diffusion.solvers import SOLVERS

X0, EPS = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.01, 0.5, 20.0], dtype=torch.float64)
PROCESS = EDM()


def test_a_silent_network_shrinks_its_input():
    """c_skip x: the best linear denoiser of data with deviation sigma_data."""
    x_t, t = PROCESS.add_noise(X0, EPS, SIGMA / 80), SIGMA / 80
    want = like(0.25 / (SIGMA**2 + 0.25), x_t) * x_t
    assert torch.allclose(PROCESS.predict(torch.zeros_like(x_t), x_t, t).x0, want)


def test_network_sees_unit_variance_and_a_quarter_of_the_log():
    data = 0.5 * X0 / X0.std()
    x_t = PROCESS.add_noise(data, EPS / EPS.std(), SIGMA / 80)
    assert (PROCESS.network_input(x_t, SIGMA / 80).flatten(1).std(1) - 1).abs().max() < 0.5
    assert PROCESS.network_time(SIGMA / 80).tolist() == pytest.approx([math.log(s) / 4 for s in SIGMA.tolist()])


def test_the_loss_is_the_weighted_error_of_the_denoiser():
    output, t = torch.randn_like(X0), SIGMA / 80
    denoised = PROCESS.predict(output, PROCESS.add_noise(X0, EPS, t), t).x0
    weight = (SIGMA**2 + 0.25) / (0.5 * SIGMA) ** 2
    want = weight * ((denoised - X0) ** 2).flatten(1).mean(1)
    assert torch.allclose(PROCESS.loss(output, X0, EPS, t).loss, want)


def test_training_noise():
    u = (torch.arange(10_000) + 0.5) / 10_000
    log_sigma = (80 * PROCESS.sample_time(u).double()).log()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=1e-2)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=1e-2)
    assert float(PROCESS.sample_time(torch.tensor(1 - 2**-24))) <= 1


def test_schedules():
    karras, exponential = (80 * PROCESS.times(18, spacing) for spacing in ("karras", "exponential"))
    for sigma in (karras, exponential):
        assert sigma[[0, -2, -1]].tolist() == pytest.approx([80, 0.002, 0])
    i = torch.arange(18) / 17
    want = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(karras[:-1].float(), want, rtol=1e-5)
    assert exponential[:-1].log().diff().std() < 1e-9


def best(x, t):
    """The network output that is best for data N(0, sigma_data^2) is zero."""
    return torch.zeros_like(x)


class Steps:
    methods = ()

    def __init__(self, num_steps):
        self.num_steps = num_steps

    def steps(self):
        yield from range(self.num_steps)


@pytest.mark.parametrize(("name", "error"), [("heun", 2e-2), ("dpm++2m", 2e-2), ("ddim", 0.1), ("euler", 0.1)])
def test_gaussian_data_are_reached(name, error):
    """The ODE carries sigma_max noise to noise * sd sigma_max / sqrt(sigma_max^2 + sd^2)."""
    start = PROCESS.start(source([0], X0[:1])(0, "start"))
    got = SOLVERS[name](best, start, PROCESS, Steps(40), None)
    want = start * 0.5 / math.sqrt(80**2 + 0.25)
    assert (got - want).norm() <= error * want.norm()


@pytest.mark.parametrize(("name", "evaluations"), [("heun", 4 * 2 + 1), ("midpoint", 5 * 2), ("rk4", 4 * 4 + 2)])
def test_the_last_step_needs_no_velocity_at_its_end(name, evaluations):
    seen = []

    def watched(x, t):
        seen.append(float(t))
        return best(x, t)

    SOLVERS[name](watched, PROCESS.start(X0), PROCESS, Steps(5), None)
    assert len(seen) == evaluations
    assert min(seen) > 0


def test_sigma_min_is_below_sigma_max():
    with pytest.raises(ConfigError, match="is not below sigma_max"):
        EDM(sigma_min=100.0)
