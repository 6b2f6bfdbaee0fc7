"""The Gaussian process: values printed in the DiT sheet, identities of its equations."""

import math

import pytest
import torch

from ditkit.core.errors import ConfigError, DitkitError
from ditkit.diffusion.gaussian import Gaussian, make_betas
from ditkit.diffusion.process import like, process_from
from ditkit.diffusion.respacing import respace


@pytest.fixture(scope="module")
def dit():
    return Gaussian()


def test_ends_of_the_linear_table(dit):
    t = dit.tables
    assert float(t.alphas_cumprod[0]) == pytest.approx(0.9999, abs=1e-12)
    assert float(t.alphas_cumprod[-1]) == pytest.approx(4.036e-5, rel=1e-3)
    assert t.posterior_log_variance_clipped[:3].tolist() == pytest.approx([-9.8167, -9.8167, -9.3671], abs=1e-4)
    assert t.betas.dtype == torch.float64


def test_ends_scale_with_the_number_of_steps():
    betas = make_betas("linear", 250)
    assert float(betas[0]) == pytest.approx(4e-4)
    assert float(betas[-1]) == pytest.approx(0.08)


def test_cosine_table():
    betas = make_betas("squaredcos_cap_v2", 1000)
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    assert betas[:999].tolist() == pytest.approx([1 - f[i + 1] / f[i] for i in range(999)], rel=1e-9)
    assert float(betas[999]) == 0.999


def test_a_table_that_is_none():
    with pytest.raises(DitkitError, match="allowed: all between 0 and 1"):
        Gaussian(num_train_steps=10)  # the ends, scaled by 100, would leave (0, 1)
    assert Gaussian(num_train_steps=10, beta_range=(1e-4, 0.5)).tables.betas.shape == (10,)


def test_respacings_of_the_sheet():
    assert respace(1000, "250")[:6] == [0, 4, 8, 12, 16, 20]
    assert respace(1000, "250")[-3:] == [991, 995, 999]
    assert respace(1000, "50")[:4] == [0, 20, 41, 61]
    assert respace(1000, "50")[-2:] == [979, 999]
    assert respace(1000, "ddim50") == list(range(0, 1000, 20))
    assert respace(1000, "1") == [0]
    assert respace(300, [10, 15, 20])[:2] == [0, 11]  # section of 100: stride 99 / 9
    assert respace(1000, "leading4") == [0, 250, 500, 750]
    assert respace(1000, "trailing4") == [249, 499, 749, 999]


@pytest.mark.parametrize("spec", ["ddim300", "", "0", "1001", "ddim10,10", "abc", "600,600", [-1]])
def test_respacings_that_are_none(spec):
    with pytest.raises(DitkitError, match="allowed"):
        respace(1000, spec)


def test_respaced_to_ten(dit):
    t = dit.tables.respaced(respace(1000, "10"))
    assert t.index.tolist() == [111 * i for i in range(10)]
    betas = [0.0001, 0.126308, 0.316844, 0.466119, 0.583005, 0.674481, 0.746030, 0.801963, 0.845663, 0.879788]
    coef1 = [1, 0.999259, 0.734499, 0.52848, 0.379512, 0.256966, 0.156872, 0.084233, 0.039455, 0.016121]
    coef2 = [0, 0.00074, 0.259107, 0.432361, 0.507417, 0.517103, 0.487513, 0.441085, 0.392134, 0.346613]
    assert t.betas.tolist() == pytest.approx(betas, abs=1e-6)
    assert t.posterior_mean_coef1.tolist() == pytest.approx(coef1, abs=1e-6)
    assert t.posterior_mean_coef2.tolist() == pytest.approx(coef2, abs=1e-6)
    assert t.posterior_log_variance_clipped[:4].tolist() == pytest.approx([-9.211032, -9.211032, -2.309346, -1.288016], abs=1e-6)


def test_keeping_all_steps_changes_nothing(dit):
    again = dit.tables.respaced(respace(1000, "1000"))
    for name in ("betas", "alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance"):
        assert (getattr(again, name) - getattr(dit.tables, name)).abs().max() < 1e-12


@pytest.mark.parametrize("spec", ["250", "ddim25", "10,15,20"])
def test_respaced_levels_are_the_base_levels(dit, spec):
    t = dit.tables.respaced(respace(1000, spec))
    assert torch.equal(t.alphas_cumprod, dit.tables.alphas_cumprod[t.index])
    assert (1 - t.betas).cumprod(0).tolist() == pytest.approx(t.alphas_cumprod.tolist(), rel=1e-9)


def test_max_beta_of_250_steps(dit):
    assert float(dit.tables.respaced(respace(1000, "250")).betas.max()) == pytest.approx(0.0807, abs=5e-5)


def test_public_time_and_index(dit):
    n = torch.tensor([0, 1, 500, 999])
    for t in ((n + 1) / 1000, (n + 1).double() / 1000):
        assert dit.index(t).tolist() == n.tolist()
        assert dit.network_time(t).tolist() == n.tolist()
        assert torch.allclose(dit.coefficients(t).alpha ** 2, dit.tables.alphas_cumprod[n], rtol=1e-12)
    alpha, sigma = dit.coefficients(0.0)
    assert (float(alpha), float(sigma)) == (1, 0)


def test_between_levels_log_abar_is_linear(dit):
    low, high = (math.log(float(dit.coefficients(t).alpha)) for t in (0.5, 0.501))
    assert math.log(float(dit.coefficients(0.50025).alpha)) == pytest.approx(0.75 * low + 0.25 * high, rel=1e-12)
    assert float(dit.network_time(0.50025)) == pytest.approx(499.25, abs=1e-4)


def test_training_times_cover_every_level_equally(dit):
    u = (torch.arange(4000) + 0.5) / 4000
    assert dit.index(dit.sample_time(u)).bincount().tolist() == [4] * 1000
    assert dit.index(dit.sample_time(torch.tensor([0.0, 1 - 2**-24]))).tolist() == [0, 999]


def waves():
    """The inputs of the sheet's loss values."""
    k = torch.arange(24, dtype=torch.float32)
    x0 = torch.linspace(-1.2, 1.2, 8).repeat(3).reshape(3, 2, 2, 2)
    eps, model_eps, v = (f.reshape(3, 2, 2, 2) for f in (k.sin(), k.cos(), 0.5 * (2 * k).sin()))
    return x0, eps, torch.cat([model_eps, v], 1)


def test_losses_of_the_sheet(dit):
    x0, eps, output = waves()
    losses = dit.loss(output, x0, eps, torch.tensor([1, 2, 501]) / 1000)
    assert losses.parts["mse"].tolist() == pytest.approx([0.903444, 1.124368, 0.858352], abs=1e-5)
    assert losses.parts["vb"].tolist() == pytest.approx([1.984626, 0.782271, 0.006827], abs=1e-5)
    assert torch.equal(losses.loss, losses.parts["mse"] + losses.parts["vb"])


def test_a_silent_network_on_unit_data(dit):
    g = torch.Generator().manual_seed(0)
    indices = torch.tensor([0, 1, 10, 100, 500, 999])
    x0, eps = (torch.randn(6, 4, 32, 32, generator=g) for _ in range(2))
    losses = dit.loss(torch.zeros(6, 8, 32, 32), x0, eps, (indices + 1) / 1000)
    assert losses.parts["mse"].tolist() == pytest.approx([1.0] * 6, abs=0.08)
    assert losses.parts["vb"].tolist() == pytest.approx([1.99, 0.630, 0.107, 0.0147, 0.0079, 0.0146], rel=0.08)


def test_the_mean_and_the_variance_learn_apart(dit):
    x0, eps, output = waves()
    t = torch.tensor([1, 2, 501]) / 1000
    for part, silent in (("vb", slice(0, 2)), ("mse", slice(2, 4))):
        leaf = output.clone().requires_grad_()
        dit.loss(leaf, x0, eps, t).parts[part].sum().backward()
        assert (leaf.grad[:, silent] == 0).all()
        assert (leaf.grad != 0).any()


def test_the_bound_is_zero_for_the_true_posterior(dit):
    x0, eps, _ = waves()
    output = torch.cat([eps, torch.full_like(eps, -1.0)], 1)  # v = -1: the posterior's own variance
    vb = dit.loss(output, x0, eps, torch.tensor([2, 11, 501]) / 1000).parts["vb"]
    assert vb.abs().max() < 1e-6


def test_fractions_zero_and_one_are_the_two_variances(dit):
    i, x = torch.tensor([1, 500]), torch.zeros(2, 1)
    assert torch.equal(dit.tables.log_variance(0.0, i, x)[:, 0], dit.tables.posterior_variance[i].log().float())
    assert torch.equal(dit.tables.log_variance(1.0, i, x)[:, 0], dit.tables.betas[i].log().float())


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_predictions_of_the_truth_agree(schedule, prediction):
    process = Gaussian(schedule=schedule, prediction=prediction, variance="fixed_small")
    x0, eps, _ = waves()
    t = torch.tensor([0.05, 0.5, 0.9])
    x_t = process.add_noise(x0, eps, t)
    p = process.predict(process.target(x0, eps, t), x_t, t)
    alpha, sigma = (like(c, x0) for c in process.coefficients(t))
    for got, want in ((p.x0, x0), (p.eps, eps), (p.velocity, alpha * eps - sigma * x0)):
        assert (got - want).abs().max() < 2e-5
    assert (process.loss(process.target(x0, eps, t), x0, eps, t).loss == 0).all()


def test_losses_without_a_learned_variance():
    x0, eps, output = waves()
    t = torch.tensor([1, 2, 501]) / 1000
    plain = Gaussian(variance="fixed_large").loss(output[:, :2], x0, eps, t)
    assert plain.loss.tolist() == pytest.approx([0.903444, 1.124368, 0.858352], abs=1e-5)
    kl, rescaled = (Gaussian(variance="fixed_small", loss=name).loss(output[:, :2], x0, eps, t).loss for name in ("kl", "rescaled_kl"))
    assert torch.allclose(rescaled, 1000 * kl)


def test_sampling_before_leaves_training_alone():
    process, x = Gaussian(), torch.zeros(1, 2, 2, 2)
    with torch.inference_mode():
        process.predict(torch.zeros(1, 4, 2, 2), x, 0.5)
    output = torch.zeros(1, 4, 2, 2, requires_grad=True)
    process.predict(output, x, 0.5).x0.sum().backward()
    assert (output.grad[:, :2] != 0).all()


def test_prior_bpd(dit):
    x0 = torch.ones(1, 1, 2, 2)
    abar = float(dit.tables.alphas_cumprod[-1])
    want = 0.5 * (-1 - math.log(1 - abar) + (1 - abar) + abar) / math.log(2)
    assert float(dit.prior_bpd(x0.double())) == pytest.approx(want, rel=1e-6)


def test_an_output_of_the_wrong_shape(dit):
    x = torch.zeros(2, 4, 8, 8)
    with pytest.raises(DitkitError, match=r"\(2, 8, 8, 8\) with the gaussian process"):
        dit.predict(x, x, 0.5)


def test_process_from():
    process = process_from("gaussian", {"num_train_steps": 500})
    assert process.config.to_dict() == Gaussian(num_train_steps=500).config.to_dict()
    with pytest.raises(DitkitError, match="did you mean 'gaussian'"):
        process_from("gausian")
    with pytest.raises(ConfigError, match="process gaussian: unknown key 'num_steps'"):
        process_from("gaussian", {"num_steps": 3})
