"""Solvers: exact where the mathematics says so, the same for a picture in any batch, and strict about their options."""

import pytest
import torch

from ditkit.backbones.dit import DiT
from ditkit.core.errors import ConfigError, Conflict, DitkitError
from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.diffusion import noise
from ditkit.diffusion.edm import EDM
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.interpolant import Interpolant
from ditkit.diffusion.likelihood import log_likelihood
from ditkit.diffusion.process import like
from ditkit.diffusion.solvers import SOLVERS
from ditkit.methods.efficiency.fora import FORA

FIXED = Gaussian(variance="fixed_small")
GVP, VP = Interpolant(path="gvp"), Interpolant(path="vp")
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
        return output(process, t, x0, (x - alpha * x0) / sigma)

    return denoise


def output(process, t, x0, eps):
    """What the network would say."""
    if not process.continuous:
        return eps
    rates = process.rates(t)
    velocity = like(rates.alpha, x0) * x0 + like(rates.sigma, x0) * eps
    return velocity if process.name == "flow" else -velocity


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


@pytest.mark.parametrize("name", ["euler", "ddim", "dpm++2m"])
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
        return output(process, t, x0, eps)

    return denoise


def error_of_the_ode(name, process, num_steps):
    """Against the closed form: the probability-flow ODE carries a Gaussian to a Gaussian by an affine map."""
    mean, deviation = 2.0, 0.5
    x = torch.empty(2, 100, dtype=torch.float64)
    start = process.start(noise.source([0, 1], x)(0, "start"))
    way = process.times(num_steps)
    (a1, a0), (s1, s0) = (c.tolist() for c in process.coefficients(way[[0, -1]]))
    spread = ((a0**2 * deviation**2 + s0**2) / (a1**2 * deviation**2 + s1**2)) ** 0.5
    want = a0 * mean + spread * (start - a1 * mean)
    return float((solve(name, process, gaussian_toy(process, mean, deviation), num_steps, x) - want).abs().max())


@pytest.mark.parametrize(
    ("name", "process", "order"),
    [
        ("ddim", FIXED, 1),
        ("ddim", Flow(), 1),
        ("euler", Flow(), 1),
        ("euler", GVP, 1),
        ("heun", Flow(), 2),
        ("heun", GVP, 2),
        ("heun", VP, 2),
        ("midpoint", GVP, 2),
        ("rk4", Flow(), 4),
        ("dpm++2m", GVP, 2),
    ],
    ids=["ddim", "ddim-flow", "euler", "euler-gvp", "heun", "heun-gvp", "heun-vp", "midpoint-gvp", "rk4", "dpm++2m-gvp"],
)
def test_the_error_of_the_ode_falls_with_the_order_of_the_solver(name, process, order):
    coarse, fine = (error_of_the_ode(name, process, n) for n in (80, 160))
    assert fine < 0.05
    assert coarse / fine == pytest.approx(2**order, rel=0.2)


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


PICTURES = {  # process, steps, guidance scale, options
    "ddpm": (Gaussian(), 10, 2.0, {}),
    "ddim": (Gaussian(), 5, 2.0, {"eta": 0.5}),
    "dpm++2m": (Gaussian(), 5, 2.0, {}),
    "euler_maruyama": (Flow(discard_half=True), 5, 2.0, {}),
    "dopri5": (Flow(discard_half=True), 40, 1.0, {"rtol": 1e-2, "atol": 1e-2}),
}


@pytest.mark.parametrize("name", list(PICTURES))
def test_a21_a_picture_does_not_depend_on_its_batch(name):
    process, num_steps, scale, options = PICTURES[name]
    model = DiT.tiny()
    x, _, _ = model.example(4)
    y = torch.tensor([0, 1, 2, 3])

    def pictures(seeds):
        cond = {"y": y[seeds]}
        run, draw = Run(model, num_steps), noise.source(seeds, x[seeds])
        with torch.inference_mode():
            denoise = guided(model, process, Guidance(scale=scale), run, cond, model.null(cond["y"]))
            return SOLVERS[name](denoise, process.start(draw(0, "start")), process, run, draw, **options)

    together = pictures([0, 1, 2, 3])
    for parts in ([[0, 1], [2, 3]], [[0], [1], [2], [3]]):
        apart = torch.cat([pictures(p) for p in parts])
        assert (apart - together).abs().max() <= 1e-5 * together.abs().max()


EVERY_PROCESS = [Gaussian(), Flow(), VP, Interpolant(prediction="score"), EDM()]


@pytest.mark.parametrize("process", EVERY_PROCESS, ids=lambda p: p.name)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_everything_stays_on_the_device_and_in_the_dtype_of_the_data(process, device):
    """Coefficients are made on the CPU in float64; meta stands for any other device."""
    x = torch.zeros(2, 3, 4, 4, device=device)

    def denoise(x, t):
        h = process.network_input(x, t)
        assert (h.device.type, h.dtype) == (device, torch.float32)
        return torch.cat([h, h], 1) if process.output_channels(3) == 6 else h

    for name, method in SOLVERS.items():
        if name != "dopri5" and (process.continuous or not method.continuous):
            got = method(denoise, process.start(x), process, StubRun(3), lambda step, purpose: torch.zeros_like(x))
            assert (got.device.type, got.dtype) == (device, torch.float32)
    for t in (torch.full((2,), 0.5), torch.full((2,), 0.5, device=device)):
        out = torch.zeros(2, process.output_channels(3), 4, 4, device=device)
        loss = process.loss(out, x, process.add_noise(x, x, t), t).loss
        assert (loss.device.type, loss.dtype, loss.shape) == (device, torch.float32, (2,))
        assert process.network_time(t).dtype == torch.float32


FORMS = ["sbdm", "constant", "sigma", "linear", "decreasing", "increasing-decreasing"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_every_sde_has_the_marginals_of_the_ode(form, method):
    """Within the errors of 4,000 samples and 100 steps."""
    flow, x = Flow(), torch.empty(4, 1000, dtype=torch.float64)
    options = {"form": form, "method": method, "last_step_size": 0.01}
    got = solve("euler_maruyama", flow, gaussian_toy(flow, 2.0, 0.5), 100, x, range(4), **options)
    assert got.isfinite().all()
    assert float(got.mean()) == pytest.approx(2.0, abs=0.04)
    assert float(got.std()) == pytest.approx(0.5, rel=0.06)


def test_an_sde_without_diffusion_is_the_ode():
    flow = Flow()
    denoise = gaussian_toy(flow, 2.0, 0.5)
    got = solve("euler_maruyama", flow, denoise, 10, form="constant", norm=0.0, last_step_size=0.1)
    assert torch.allclose(got, solve("euler", flow, denoise, 10))


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("last", ["tweedie", "mean", "euler", "none"])
def test_last_steps(path, last):
    """With an oracle Tweedie's step returns the data whatever came before; the others come near."""
    process = Interpolant(path=path)
    got = solve("euler_maruyama", process, oracle(process, DATA), 100, last=last, last_step_size=1e-3)
    assert (got - DATA).abs().max() < {"tweedie": 1e-9}.get(last, 0.2)


def test_sde_options_are_strict():
    flow = Flow()
    for options, message in (
        ({"form": "inccreasing-decreasing"}, "'form'"),
        ({"last_step_size": 1.0}, "'last_step_size'"),
        ({"method": "heun2"}, "'method'"),
    ):
        with pytest.raises(ConfigError, match=message):
            solve("euler_maruyama", flow, oracle(flow, DATA), 3, **options)


def test_dopri5_meets_its_tolerance():
    for process in (Flow(), GVP):
        loose, tight = (dopri5_error(process, rtol) for rtol in (1e-3, 1e-7))
        assert loose < 1e-2
        assert tight < 1e-6


def dopri5_error(process, rtol):
    x, steps = torch.empty(2, 50, dtype=torch.float64), 200
    start = noise.source([0, 1], x)(0, "start")
    got = solve("dopri5", process, gaussian_toy(process, 2.0, 0.5), steps, x, rtol=rtol, atol=rtol)
    return float((got - (2.0 + 0.5 * start)).abs().max())


def test_dopri5_takes_the_steps_that_each_sample_needs():
    """A straight sample is done in a few steps beside a curved one, and its own evaluations do not change."""
    flow, seen = Flow(), []

    def denoise(x, t):
        seen.append(t.clone())
        wave = torch.tensor([0.0, 5.0]).reshape(2, 1, 1, 1).to(x) * torch.sin(20 * like(t, x))
        return oracle(flow, DATA)(x, t.clamp(min=1e-3)) * 0 + 1 + wave

    solve("dopri5", flow, denoise, 300)
    times = torch.stack(seen)
    assert len(times[:, 0].unique()) < len(times[:, 1].unique()) / 2


def test_dopri5_that_does_not_arrive():
    flow = Flow()
    with pytest.raises(DitkitError, match="left after 2 steps.*more num_inference_steps"):
        solve("dopri5", flow, gaussian_toy(flow, 2.0, 0.5), 2)


def test_adaptive_steps_refuse_scheduled_methods():
    view, flow = with_methods(DiT.tiny(), FORA(interval=2)), Flow(discard_half=True)
    x, _, cond = view.example(2)
    run = Run(view, 10)
    denoise = guided(view, flow, Guidance(), run, cond)
    with pytest.raises(Conflict, match="dopri5 chooses its steps from the samples, fora is scheduled"):
        SOLVERS["dopri5"](denoise, x, flow, run, noise.source([0, 1], x))


@pytest.mark.parametrize("name", ["euler", "heun", "midpoint", "rk4", "dopri5", "ddim", "dpm++2m"])
def test_there_and_back(name):
    """Inversion: from data to noise along increasing times, and back."""
    flow = Flow()
    denoise, num_steps = gaussian_toy(flow, 0.3, 0.7), 100
    up = torch.linspace(0.02, 0.98, num_steps + 1, dtype=torch.float64)
    if not SOLVERS[name].inverts:
        with pytest.raises(DitkitError, match="along increasing times"):
            SOLVERS[name](denoise, DATA, flow, StubRun(num_steps), None, times=up)
        return
    z = SOLVERS[name](denoise, DATA, flow, StubRun(num_steps), None, times=up)
    back = SOLVERS[name](denoise, z, flow, StubRun(num_steps), None, times=up.flip(0))
    assert (back - DATA).abs().max() < (0.15 if name in ("euler", "ddim") else 0.01)  # first order, and higher
    assert (z - DATA).abs().max() > 0.1


def test_inversion_adds_no_noise():
    up = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    with pytest.raises(DitkitError, match="eta 0"):
        solve("ddim", FIXED, oracle(FIXED, DATA), 4, times=up, eta=0.5)
    with pytest.raises(DitkitError, match="ddpm along increasing times"):
        solve("ddpm", FIXED, oracle(FIXED, DATA), 4, times=up)


@pytest.mark.parametrize("process", [Flow(), GVP], ids=["flow", "gvp"])
def test_likelihood_of_gaussian_data(process):
    mean, deviation = 0.3, 0.7
    probe = (DATA > 0).double() * 2 - 1
    got = log_likelihood(gaussian_toy(process, mean, deviation), DATA, process, StubRun(200), probe)
    want = torch.distributions.Normal(mean, deviation).log_prob(DATA).flatten(1).sum(1)
    assert got.log_p.tolist() == pytest.approx(want.tolist(), rel=1e-3)
    assert torch.allclose(got.z, (DATA - mean) / deviation, atol=1e-3)
    assert got.bits_per_dim.tolist() == pytest.approx((-want / (48 * torch.log(torch.tensor(2.0)))).tolist(), rel=1e-3)


def test_likelihood_refusals():
    with pytest.raises(DitkitError, match="allowed: flow and interpolant"):
        log_likelihood(oracle(FIXED, DATA), DATA, FIXED, StubRun(3), DATA)
    view = with_methods(DiT.tiny(), FORA(interval=2))
    with pytest.raises(Conflict, match="fora reuses values"):
        log_likelihood(oracle(Flow(), DATA), DATA, Flow(), Run(view, 3), DATA)
