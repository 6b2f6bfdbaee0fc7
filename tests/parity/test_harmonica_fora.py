"""FORA on a whole DDPM trajectory against the released code: samples, network outputs and sub-layer calls of every step."""

import re

import pytest
import torch
from golden import load_dit, open_golden, relative

from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.solvers import SOLVERS
from ditkit.methods.efficiency.fora import FORA

G = open_golden("harmonica-fora")
pytestmark = pytest.mark.parity
VARIANTS = sorted({name.split("/")[1] for name in G.starting("out/")})
CASES = [(variant, batched) for variant in VARIANTS for batched in (False, True)]


class Counter(Method):
    """Innermost layer: counts the sub-layers that are really computed, by step."""

    name, stage = "counter", "numbers"

    def plan(self, at):
        self.step = at.step
        return at.step  # a mode of its own each step, so that the layer below knows it

    def branch(self, nxt, h, site):
        self.calls[site.mode] = self.calls.get(site.mode, 0) + 1
        return nxt(h)

    def start(self, run):
        self.calls = {}


def trajectory(variant, batched):
    """x after each step, the network's output at each step (both for 2n rows, as released), calls by step."""
    base, process, steps = load_dit(G), Gaussian(), G.config["steps"]
    counter = Counter()
    interval = re.fullmatch(r"n(\d+)", variant)
    model = with_methods(base, counter, *([FORA(interval=int(interval[1]))] if interval else []))
    n = len(G["in/z"]) // 2
    y = G["in/y"][:n]
    assert (G["in/y"][n:] == model.config.num_classes).all()
    run, seen, xs, outs = Run(model, steps), [], [], []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    guidance = Guidance(scale=G.config["cfg_scale"], channels=3, batched=batched)
    inner = guided(model, process, guidance, run, {"y": y}, model.null(y))

    def denoise(x, t):
        """As released: the first n rows are fed twice, and each half of the rows is stepped with its own noise."""
        seen.clear()
        first = inner(x[:n], t)
        null = seen[0].chunk(2)[1] if batched else seen[1]
        xs.append(x)
        outs.append(torch.cat([first, torch.cat([first[:, :3], null[:, 3:]], 1)]))
        return outs[-1]

    with torch.no_grad():
        last = SOLVERS["ddpm"](denoise, G["in/z"], process, run, lambda step, purpose: G["in/noise"][step])
    handle.remove()
    return torch.stack([*xs[1:], last]), torch.stack(outs), counter.calls


@pytest.mark.parametrize(("variant", "batched"), CASES)
def test_trajectory(variant, batched):
    x, out, calls = trajectory(variant, batched)
    assert relative(x, G[f"out/{variant}/x"]) <= 1e-5
    for k in range(len(x)):
        assert relative(x[k], G[f"out/{variant}/x"][k]) <= 1e-5
    if f"out/{variant}/out" in G.names:
        for k in range(len(out)):
            assert relative(out[k], G[f"out/{variant}/out"][k]) <= 1e-5
    steps, passes = G.config["steps"], 1 if batched else 2
    assert [calls.get(steps - 1 - s, 0) for s in range(steps)] == [passes * int(c) for c in G[f"out/{variant}/calls"]]
