"""Samplers against the released code on its toy network: every output of pixart-alpha-samplers.safetensors."""

import pytest
import torch
from golden import open_golden, relative

from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.respacing import respace
from ditkit.diffusion.solvers import SOLVERS

G = open_golden("pixart-alpha-samplers")
pytestmark = pytest.mark.parity
SPACINGS = {"time_uniform": "uniform", "logSNR": "logsnr"}


class ToyRun:
    """As many steps, no methods."""

    methods = ()

    def __init__(self, num_steps):
        self.num_steps = num_steps

    def steps(self):
        yield from range(self.num_steps)

    def close(self, prediction):
        return prediction


class Toy:
    """The file's network: its eps, or with ``variance`` its value of the variance too."""

    def __init__(self, variance):
        self.variance = variance

    def prepare(self, y):
        return y[:, None, None, None]

    def __call__(self, x, t, y, *, run, guidance_pass):
        eps = 0.5 * torch.tanh(x) + 0.3 * x + 0.2 * torch.sin(t / 100)[:, None, None, None] + 0.3 * y
        return torch.cat([eps, torch.tanh(0.7 * x - 0.1 * y)], 1) if self.variance else eps


def solve(solver, num_steps, scale, channels, variance, first_draw, **options):
    """From the file's z; the draw of step i is its draw number i + ``first_draw``."""
    process, run = Gaussian(variance="learned" if variance else "fixed_small"), ToyRun(num_steps)
    cond, null = {"y": G["in/y"]}, {"y": G["in/y_null"]}
    denoise = guided(Toy(variance), process, Guidance(scale=scale, channels=channels), run, cond, null)
    return SOLVERS[solver](denoise, G["in/z"], process, run, lambda step, purpose: G[f"in/draw{step + first_draw}"], **options)


@pytest.mark.parametrize("n", range(len(G.call["dpms"])))
def test_dpm_solver(n):
    steps, order, skip, how, scale = G.call["dpms"][n]
    assert (how, order in (2, 3)) == ("multistep", True)
    got = solve(f"dpm++{order}m", steps, scale, "all", False, 0, spacing=SPACINGS[skip], lower_order_below=10)
    assert relative(got, G[f"out/dpms_{n}"]) <= 1e-5


@pytest.mark.parametrize("n", range(len(G.call["sa"])))
def test_sa_solver(n):
    """One draw is thrown away before the first step."""
    steps, eta, scale = G.call["sa"][n]
    got = solve("sa", steps, scale, "all", False, 1, spacing="uniform", tau=float(eta))
    assert relative(got, G[f"out/sa_{n}"]) <= 1e-5


@pytest.mark.parametrize("n", range(len(G.call["iddpm"])))
def test_iddpm(n):
    steps, scale = G.call["iddpm"][n]
    got = solve("ddpm", steps, scale, min(3, G["in/z"].shape[1]), True, 0)
    assert relative(got, G[f"out/iddpm_{n}"]) <= 1e-5
    assert respace(1000, str(steps)) == sorted(G[f"out/iddpm_{n}_timesteps"].tolist())


def test_nothing_is_left_out():
    names = {f"out/{kind}_{n}" for kind in ("dpms", "sa", "iddpm") for n in range(len(G.call[kind]))}
    more = {f"{name}_{what}" for name in names for what in ("timesteps", "draws_used")}
    assert names <= set(G.starting("out/")) <= names | more
