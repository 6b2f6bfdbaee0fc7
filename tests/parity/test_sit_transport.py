"""Interpolants and their solvers against SiT's transport package: every tensor of sit-transport.safetensors.

The released time runs from noise at 0 to data at 1; public time is 1 minus it. Sizes, steps and choices are read from the file.
"""

import pytest
import torch
from golden import load_dit, open_golden, relative

from ditkit.core.run import Run
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.interpolant import Interpolant
from ditkit.diffusion.likelihood import log_likelihood
from ditkit.diffusion.process import like
from ditkit.diffusion.sde import diffusion
from ditkit.diffusion.solvers import SOLVERS

G = open_golden("sit-transport")
pytestmark = pytest.mark.parity
TOLERANCE = 1e-5
LEARNED = G.config.get("learn_sigma", True)
PREDICTIONS = {"velocity": "velocity", "noise": "eps", "score": "score"}
WEIGHTINGS = {"None": "none", "velocity": "velocity", "likelihood": "likelihood"}
FORMS = {"SBDM": "sbdm", "inccreasing-decreasing": "increasing-decreasing"}
METHODS = {"euler": "euler", "heun2": "heun"}


def interpolant(path, prediction="velocity", **values):
    return Interpolant(path=path.lower(), prediction=PREDICTIONS[prediction], **values)


@pytest.fixture(scope="module")
def model():
    return load_dit(G)


def close(got, key):
    assert relative(got, G[key]) <= TOLERANCE, key


@pytest.mark.parametrize("key", G.starting("out/path/"))
def test_paths(key):
    path, name, *rest = key.split("/")[2:]
    process, t = interpolant(path), 1 - G["in/conv/t"].double()
    x, v = G["in/conv/x"], G["in/conv/v"]
    p = process.predict(v, x, t)
    if name == "alpha_dalpha_sigma_dsigma":
        got = torch.stack(list(process.path(t)))
    elif name == "diffusion":
        got = diffusion(process, FORMS.get(rest[0], rest[0]), float(rest[1].removeprefix("norm")), t)
    elif name == "drift_var":
        got = diffusion(process, "sbdm", 1.0, t)
    elif name == "drift_mean":
        here = process.path(t)
        got = like(-here.d_alpha / here.alpha, x) * x
    else:
        sigma = like(process.coefficients(t).sigma, x)
        got = {
            "score_from_velocity": -p.eps / sigma,
            "noise_from_velocity": p.eps,
            "velocity_from_score": -interpolant(path, "score").predict(v, x, t).velocity,
        }[name]
    close(got.float() if got.dim() == 1 else got, key)


@pytest.mark.parametrize("key", G.starting("out/interval/"))
def test_intervals(key):
    """[train, ODE, SDE with SBDM, SDE with sigma], two ends each, in the released time."""
    path, prediction = key.split("/")[2:]
    process, last = interpolant(path, prediction), float(G.call["last_step_size"])
    (n0, d0), (n1, d1) = process.margins(training=True), process.margins()
    want = G[key].tolist()
    assert [n0, 1 - d0, n1, 1 - d1] == pytest.approx(want[:4], abs=1e-12)
    for form, ends in (("sbdm", want[4:6]), ("sigma", want[6:8])):
        if form == "sbdm" and ends[0] == 0 and path != "VP":
            ends[0] = 1e-3  # the released code starts where SBDM is infinite
        options = SOLVERS["euler_maruyama"].options(form=form, last_step_size=last)
        way = SOLVERS["euler_maruyama"].grid(process, process.times(5), options)
        assert [1 - float(way[0]), 1 - float(way[-2])] == pytest.approx(ends, abs=1e-12)


def loss_times(process):
    return process.sample_time(G["in/loss/u"].double())


@pytest.mark.parametrize("key", G.starting("out/loss/"))
def test_losses(model, key):
    path, prediction, name, *rest = key.split("/")[2:]
    data, noise = G["in/loss/x1"], G["in/loss/x0"]
    process = interpolant(path, prediction, weighting=WEIGHTINGS[name] if rest else "none")
    t = loss_times(process)
    x_t = process.add_noise(data, noise, t)
    if name == "t":
        got = (1 - t).float()
    elif name == "x_t":
        got = x_t
    elif name == "u_t":
        rates = process.rates(t)
        got = -like(rates.alpha, data) * data - like(rates.sigma, data) * noise
    else:
        output = G["in/loss/model_output"]
        if rest == ["net"]:
            output = model(x_t, process.network_time(t), y=G["in/loss/y"])[:, : data.shape[1]]
        got = process.loss(output, data, noise, t).loss
    close(got.detach(), key)


def solve(model, process, name, z, y, num_steps, times=None, guidance=None, noise=None, **options):
    """The states after each step; ``noise[j]`` is used at step j."""
    run, states = Run(model, num_steps), []
    guidance = guidance or Guidance()
    denoise = guided(model, process, guidance, run, {"y": y}, None if guidance.scale == 1 else model.null(y))

    def watched(x, t):
        if run._count["cond"] == 0:  # the first evaluation of a step
            states.append(x)
        return denoise(x, t)

    with torch.inference_mode():
        final = SOLVERS[name](watched, z, process, run, lambda j, _: noise[j], times=times, **options)
    return torch.stack([*states[1:], final])


def network_process(path, prediction):
    return interpolant(path, prediction, discard_half=LEARNED)


ODE = [k for k in G.starting("out/ode/") if k.split("/")[-1] in METHODS]


@pytest.mark.parametrize("key", ODE)
def test_ode_trajectories(model, key):
    path, prediction, method = key.split("/")[2:]
    process, z = network_process(path, prediction), G["in/sample/z"]
    states = solve(model, process, METHODS[method], z, G["in/sample/y"], G.call["ode_steps"] - 1)
    close(states, key)


@pytest.mark.parametrize("key", [k for k in ODE if k.startswith("out/ode/Linear/velocity/")])
def test_released_weights_run_as_a_flow(model, key):
    """What a converted SiT checkpoint is: a rectified flow with the SiT convention."""
    process = Flow(network_time="sit", discard_half=LEARNED)
    close(solve(model, process, METHODS[key.split("/")[-1]], G["in/sample/z"], G["in/sample/y"], G.call["ode_steps"] - 1), key)


@pytest.mark.parametrize("key", [k for k in G.starting("out/ode/") if k.endswith("reverse_euler_last")])
def test_ode_from_data_to_noise(model, key):
    path, prediction, _ = key.split("/")[2:]
    process, steps = network_process(path, prediction), G.call["ode_steps"] - 1
    states = solve(model, process, "euler", G["in/sample/z"], G["in/sample/y"], steps, times=process.times(steps).flip(0))
    close(states[-1], key)


@pytest.mark.parametrize("key", [k for k in G.starting("out/ode/") if k.endswith("dopri5_last")])
def test_dopri5(model, key):
    path, prediction, _ = key.split("/")[2:]
    states = solve(model, network_process(path, prediction), "dopri5", G["in/sample/z"], G["in/sample/y"], 200)
    assert relative(states[-1], G[key]) <= 1e-3  # two adaptive solvers at rtol 1e-3


@pytest.mark.parametrize("key", [k for k in G.starting("out/ode/") if k.endswith("cfg_euler_last")])
@pytest.mark.parametrize("batched", [False, True])
def test_ode_with_the_official_guidance(model, key, batched):
    """Both halves of the official batch get the guided channels; the other channels of the second half are unconditional."""
    path, prediction, _ = key.split("/")[2:]
    process, z, y, steps = network_process(path, prediction), G["in/sample/z"], G["in/sample/y"], G.call["ode_steps"] - 1
    guidance = Guidance(scale=float(G.call["cfg_scale"]), channels=min(3, z.shape[1]), batched=batched)
    n = len(G[key]) // 2
    states = solve_batched(model, process, z[:n], y[:n], steps, guidance)
    assert relative(states, G[key][:n]) <= TOLERANCE


def solve_batched(model, process, z, y, steps, guidance):
    run = Run(model, steps)
    with torch.inference_mode():
        denoise = guided(model, process, guidance, run, {"y": y}, model.null(y))
        return SOLVERS["euler"](denoise, z, process, run, None)


@pytest.mark.parametrize("key", G.starting("out/sde/"))
def test_sde(model, key):
    path, prediction, form, norm, method, last = key.split("/")[2:]
    process, steps = network_process(path, prediction), G.call["sde_steps"]
    options = {
        "form": FORMS.get(form, form),
        "norm": float(norm),
        "method": method.lower(),
        "last": "none" if last == "None" else last.lower(),
        "last_step_size": float(G.call["last_step_size"]),
    }
    steps -= last == "None"  # the number of grid points, the last step not counted
    states = solve(model, process, "euler_maruyama", G["in/sample/z"], G["in/sample/y"], steps, noise=G["in/sde/noise"], **options)
    close(states[[-1, -1]] if last == "None" else states[-2:], key)


def test_likelihood(model):
    process, x = network_process("Linear", "velocity"), G["in/likelihood/x"]
    run = Run(model, G.call["lik_steps"] - 1)
    denoise = guided(model, process, Guidance(), run, {"y": G["in/sample/y"]})
    got = log_likelihood(denoise, x, process, run, G["in/likelihood/probe"], method="euler")
    close(got.log_p, "out/likelihood/logp")
    close(got.z, "out/likelihood/z")
