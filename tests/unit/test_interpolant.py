"""Interpolants: conversions between velocity, noise and score, and the losses."""

import math

import pytest
import torch

from ditkit.core.errors import ConfigError, DitkitError
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.interpolant import Interpolant
from ditkit.diffusion.process import like
from ditkit.diffusion.sde import diffusion

PATHS = ["linear", "gvp", "vp"]
X0, EPS = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["velocity", "eps", "score"])
def test_the_truth_is_read_back(path, prediction):
    process, t = Interpolant(path=path, prediction=prediction), torch.tensor([0.1, 0.3, 0.7, 0.9])
    rates, sigma = process.rates(t), like(process.coefficients(t).sigma, X0)
    velocity = like(rates.alpha, X0) * X0 + like(rates.sigma, X0) * EPS
    output = {"velocity": -velocity, "eps": EPS, "score": -EPS / sigma}[prediction]
    p = process.predict(output, process.add_noise(X0, EPS, t), t)
    for got, want in ((p.x0, X0), (p.eps, EPS), (p.velocity, velocity)):
        assert (got - want).abs().max() < 1e-9
    assert (process.loss(output, X0, EPS, t).loss < 1e-20).all()


@pytest.mark.parametrize("path", PATHS)
def test_noise_to_score_to_velocity_and_back(path):
    t, x, eps = 0.3, X0.float(), EPS.float()
    sigma = float(Interpolant(path=path).coefficients(t).sigma)
    velocity = -Interpolant(path=path, prediction="score").predict(-eps / sigma, x, t).velocity
    assert (Interpolant(path=path).predict(velocity, x, t).eps - eps).abs().max() < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_the_rates_are_the_derivatives(path):
    process, h = Interpolant(path=path), 1e-6
    for t in (0.2, 0.6, 0.95):
        before, after, rates = process.coefficients(t - h), process.coefficients(t + h), process.rates(t)
        for low, high, rate in zip(before, after, rates):
            assert float((high - low) / (2 * h)) == pytest.approx(float(rate), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(("path", "want"), [("linear", 2.0), ("gvp", math.pi**2 / 4)])
def test_a_silent_network_on_unit_data(path, want):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 16, 4, 16, 16, generator=g)
    loss = Interpolant(path=path).loss(torch.zeros_like(x0), x0, eps, torch.rand(16, generator=g)).loss
    assert float(loss.mean()) == pytest.approx(want, rel=0.05)


def test_linear_velocity_is_the_flow_with_the_sit_convention():
    one, other = Interpolant(discard_half=True), Flow(network_time="sit", discard_half=True)
    output, t = torch.randn(4, 6, 2, 2, dtype=torch.float64), torch.tensor([0.1, 0.3, 0.7, 0.9])
    for a, b in zip(*(vars(p.predict(output, X0, t)).values() for p in (one, other))):
        assert a is b is None or (a - b).abs().max() < 1e-6
    assert torch.allclose(one.loss(output, X0, EPS, t).loss, other.loss(output, X0, EPS, t).loss)
    assert torch.equal(one.times(7), other.times(7))
    assert one.network_time(0.25) == other.network_time(0.25) == 0.75


@pytest.mark.parametrize(("weighting", "power"), [("none", 0), ("velocity", 2), ("likelihood", 1)])
@pytest.mark.parametrize("prediction", ["eps", "score"])
def test_weights(weighting, power, prediction):
    """(D / sigma)^2 and D / sigma^2; on the linear path D = sigma / (1 - sigma)."""
    t = torch.tensor([0.1, 0.3, 0.7, 0.9], dtype=torch.float64)
    plain, weighted = (Interpolant(prediction=prediction, weighting=w).loss(X0, EPS, X0, t).loss for w in ("none", weighting))
    want = {0: torch.ones(4), 1: 1 / (t * (1 - t)), 2: 1 / (1 - t) ** 2}[power]
    assert torch.allclose(weighted, plain * want)


def test_margins():
    """Released defaults; what a user gives for sampling holds without a training margin."""
    assert Interpolant().times(1).tolist() == [1, 0]
    assert Interpolant(prediction="score").times(1).tolist() == pytest.approx([0.999, 0.001])
    assert Interpolant(path="vp").times(1).tolist() == pytest.approx([1, 0.001])
    assert Interpolant(path="vp", sample_margin=0.01).times(1).tolist() == pytest.approx([1, 0.01])
    u = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert Interpolant(path="vp").sample_time(u).tolist() == pytest.approx([1, 1e-5])
    assert Interpolant(prediction="eps", train_margin=0.02).sample_time(u).tolist() == pytest.approx([0.98, 0.02])


def test_forms_of_the_diffusion():
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    linear = Interpolant()
    want = {
        "sbdm": [1 / 3, 1.0],  # t / (1 - t)
        "constant": [1, 1],
        "sigma": [0.25, 0.5],
        "linear": [0.25, 0.5],
        "decreasing": [0.25 * (1 - 0.5**0.5) ** 2, 0.25],
        "increasing-decreasing": [0.5, 1],
    }
    for form, values in want.items():
        assert diffusion(linear, form, 1.0, t).tolist() == pytest.approx(values)
    assert diffusion(Interpolant(path="vp"), "sbdm", 2.0, 0.25) == pytest.approx(0.25 * 19.9 + 0.1)  # the path's beta


def test_refusals():
    with pytest.raises(ConfigError, match="has no meaning for a velocity"):
        Interpolant(weighting="velocity")
    with pytest.raises(ConfigError, match="'path' is 'Linear'"):
        Interpolant(path="Linear")
    with pytest.raises(DitkitError, match="no spacing 'linspace'"):
        Interpolant().times(3, "linspace")
