"""The Gaussian process against the official DiT's diffusion package: every tensor of dit-diffusion.safetensors.

The file gives the noise and the official sampler's quirks (guidance on three channels, clipping where it says so); sizes,
steps, scales and spacings are read from it.
"""

import re

import pytest
import torch
from golden import load_dit, open_golden, relative

from ditkit.core.run import Run
from ditkit.diffusion.gaussian import Gaussian, Tables, make_betas
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.process import Coefficients
from ditkit.diffusion.respacing import respace
from ditkit.diffusion.solvers import SOLVERS, ddim_step, ddpm_step

G = open_golden("dit-diffusion")
pytestmark = pytest.mark.parity
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model():
    return load_dit(G)


@pytest.fixture(scope="module")
def base():
    return Gaussian(num_train_steps=len(G["out/table/linear/betas"]))


def respaced(base, spec):
    return base.tables.respaced(respace(base.config.num_train_steps, spec))


@pytest.mark.parametrize("key", G.starting("out/table/"))
def test_tables(base, key):
    schedule, name = key.split("/")[2:]
    if match := re.fullmatch(r"betas_T(\d+)", name):
        got = make_betas(schedule, int(match[1]))
    elif name == "betas":
        got = make_betas(schedule, len(G[key]))
    else:
        tables = Gaussian(num_train_steps=base.config.num_train_steps, schedule=schedule).tables
        got = getattr(tables, name)[G.call["table_rows"]]
    assert relative(got, G[key]) <= 1e-10


@pytest.mark.parametrize("key", G.starting("out/respace/"))
def test_respacing(base, key):
    spec, name = key.split("/")[2:]
    if match := re.fullmatch(r"T(\d+)_([\d_]+)", spec):
        kept = respace(int(match[1]), [int(n) for n in match[2].split("_")])
        assert name == "map"
        assert kept == G[key].tolist()
        return
    tables: Tables = respaced(base, spec.replace("_", ","))
    if name == "map":
        assert tables.index.tolist() == G[key].tolist()
    else:
        assert relative(getattr(tables, name), G[key]) <= 1e-10


def test_spacings_of_the_solvers_are_the_official_maps(base):
    for spec in G.call["spacings"]:
        kept = respace(base.config.num_train_steps, spec)
        spacing = "ddim" if spec.startswith("ddim") else spec if "," in spec else "linspace"
        times = base.times(len(kept), spacing)
        assert base.network_time(times[:-1]).long().tolist() == kept[::-1]


VARIANTS = {
    "net": {},
    "fixed_mse_vb": {},
    "fixed_rescaled_mse": {"schedule": "squaredcos_cap_v2", "loss": "rescaled_mse"},
    "fixed_kl": {"loss": "rescaled_kl"},
    "fixed_nosigma": {"variance": "fixed_large"},
    "fixed_xstart": {"prediction": "x0"},
}


def loss_of(base, config, model=None, output=None):
    process = Gaussian(num_train_steps=base.config.num_train_steps, **config)
    x0, eps, t = G["in/loss/x_start"], G["in/loss/noise"], (G["in/loss/t"] + 1) / base.config.num_train_steps
    if output is None:
        output = model(process.add_noise(x0, eps, t), process.network_time(t), y=G["in/loss/y"])
    return process.loss(output[:, : process.output_channels(x0.shape[1])], x0, eps, t)


@pytest.mark.parametrize("key", [k for k in G.starting("out/loss/") if k.count("/") == 3])
def test_losses(base, model, key):
    variant, part = key.split("/")[2:]
    losses = loss_of(base, VARIANTS[variant], model, None if variant == "net" else G["in/loss/model_output"])
    got = losses.loss if part == "loss" else losses.parts[part]
    assert relative(got, G[key]) <= TOLERANCE
    assert ((got - G[key]).abs() <= 1e-3 * G[key].abs() + 1e-5).all()


def test_noising_prior_and_gradient(base):
    x0, eps, t = G["in/loss/x_start"], G["in/loss/noise"], (G["in/loss/t"] + 1) / base.config.num_train_steps
    assert relative(base.add_noise(x0, eps, t), G["out/loss/x_t"]) <= TOLERANCE
    assert relative(base.prior_bpd(x0), G["out/loss/prior_bpd"]) <= 1e-4  # a difference of numbers near 1, in float32
    output = G["in/loss/model_output"].clone().requires_grad_()
    loss_of(base, {}, output=output).loss.sum().backward()
    assert relative(output.grad, G["out/loss/grad_loss_wrt_output"]) <= TOLERANCE


@pytest.fixture(scope="module")
def steps(base):
    """The rows of step/*: compressed index, t, and coefficients here, one step cleaner, one noisier (past the last: pure noise)."""
    tables = respaced(base, G.call["ddpm"])
    i, total = G["in/step/i"], base.config.num_train_steps
    alphas = torch.cat([torch.ones(1), tables.alphas_cumprod, torch.zeros(1)])
    here, cleaner, noisier = (Coefficients(a.sqrt(), (1 - a).sqrt()) for a in (alphas[i + 1], alphas[i], alphas[i + 2]))
    return i, (tables.index[i] + 1) / total, here, cleaner, noisier, tables


def one_step(process, steps, output, clip=False):
    i, t, here, cleaner, _, _ = steps
    x = G["in/step/x"]
    p = process.predict(output[:, : process.output_channels(x.shape[1])], x, t)
    noise = G["in/step/noise"]
    moved = ddpm_step(x, p, here, cleaner, noise, clip)
    return torch.where((i == 0).reshape(-1, 1, 1, 1), ddpm_step(x, p, here, cleaner, None, clip), moved), p


@pytest.mark.parametrize("name", ["net", "net_clip", "fixed", "fixedlarge", "fixedsmall"])
def test_one_ddpm_step(base, model, steps, name):
    variance = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}.get(name, "learned")
    process = Gaussian(num_train_steps=base.config.num_train_steps, variance=variance)
    t = steps[1]
    net = model(G["in/step/x"], process.network_time(t), y=G["in/step/y"]) if name.startswith("net") else G["in/step/model_output"]
    sample, p = one_step(process, steps, net, clip=name == "net_clip")
    x0 = p.x0.clamp(-1, 1) if name == "net_clip" else p.x0
    assert relative(sample, G[f"out/step/{name}/sample"]) <= TOLERANCE
    assert relative(x0, G[f"out/step/{name}/pred_xstart"]) <= TOLERANCE


def test_mean_and_log_variance(base, steps):
    i, t, here, cleaner, _, tables = steps
    x = G["in/step/x"]
    p = base.predict(G["in/step/model_output"], x, t)
    assert relative(ddpm_step(x, p, here, cleaner, None), G["out/step/fixed/mean"]) <= TOLERANCE
    assert relative(tables.posterior_mean(p.x0, x, i), G["out/step/fixed/mean"]) <= TOLERANCE
    assert relative(tables.log_variance(p.fraction, i, x), G["out/step/fixed/log_variance"]) <= TOLERANCE


@pytest.mark.parametrize("key", G.starting("out/step/ddim"))
def test_one_ddim_step(base, steps, key):
    _, t, here, cleaner, noisier, _ = steps
    x = G["in/step/x"]
    p = base.predict(G["in/step/model_output"], x, t)
    if key.endswith("reverse"):
        got = ddim_step(x, p, here, noisier)
    else:
        got = ddim_step(x, p, here, cleaner, float(key.rpartition("eta")[2]), G["in/step/noise"])
    assert relative(got, G[key]) <= TOLERANCE


def run_solver(name, model, process, z, y, noise, num_steps, guidance, spacing, **options):
    """The states after each step, from start z, with the file's noise."""
    run, states = Run(model, num_steps), []
    null = None if guidance.scale == 1 else model.null(y)
    denoise = guided(model, process, guidance, run, {"y": y}, null)

    def watched(x, t):
        states.append(x)
        return denoise(x, t)

    with torch.inference_mode():
        final = SOLVERS[name](watched, z, process, run, lambda step, _: noise[step], spacing=spacing, **options)
    return torch.stack([*states[1:], final])


@pytest.mark.parametrize("batched", [False, True])
def test_ddpm_loop_with_the_official_guidance(base, model, batched):
    """The first half of the official batch; its second half is thrown away by the official sampler."""
    z, spec = G["in/ddpm/z"], G.call["ddpm"]
    num_steps, n = len(respace(base.config.num_train_steps, spec)), len(z)
    guidance = Guidance(scale=float(G.call["cfg_scale"]), channels=min(3, z.shape[1]), batched=batched)
    states = run_solver("ddpm", model, base, z, G["in/ddpm/y"], G["in/ddpm/noise"][:, :n], num_steps, guidance, spacing_of(spec))
    assert relative(states[-1], G["out/ddpm/final"][:n]) <= TOLERANCE
    (key,) = G.starting("out/ddpm/trajectory_every")
    every = int(re.search(r"every(\d+)", key)[1])
    assert relative(states[every - 1 :: every], G[key][:, :n]) <= TOLERANCE


def test_ddpm_loop_unguided(base, model):
    noise, options = G["in/ddpm10/noise"], {"clip": bool(G.call["clip10"])}
    states = run_solver("ddpm", model, base, G["in/ddpm10/z"], G["in/ddpm10/y"], noise, len(noise), Guidance(), "", **options)
    assert relative(states, G["out/ddpm10/trajectory"]) <= TOLERANCE


@pytest.mark.parametrize("key", G.starting("out/ddim/"))
def test_ddim_loops(base, model, key):
    eta = float(re.search(r"eta([\d.]+)", key)[1])
    num_steps = G.call["ddim"]
    states = run_solver("ddim", model, base, G["in/ddim/z"], G["in/ddim/y"], G["in/ddim/noise"], num_steps, Guidance(), "ddim", eta=eta)
    assert relative(states, G[key]) <= TOLERANCE


def spacing_of(spec):
    return "ddim" if spec.startswith("ddim") else spec if "," in spec else "linspace"
