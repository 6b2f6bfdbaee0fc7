"""Learning-to-Cache against the released code: accelerated trajectories, sub-layer calls, losses and gradients of the table."""

import re

import pytest
import torch
from golden import load_dit, open_golden, relative
from released_cache import attach, hard

from ditkit.core.run import Run
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.solvers import SOLVERS
from ditkit.methods.efficiency.l2c import L2C
from ditkit.train.objectives import objective_from
from ditkit.train.routers import Guided

G = open_golden("harmonica-l2c")
pytestmark = pytest.mark.parity
CFG, STEPS = G.config, G.config["steps"]
CASES = sorted({m[0] for name in G.names if (m := re.search(r"(soft|ste)/s\d+", name))})


def parts():
    router = L2C(num_inference_steps=STEPS, threshold=CFG["thres"])
    view, counter = attach(load_dit(G, without=("routers.",)), router, G)
    return router, counter, view


def test_accelerated_trajectory_and_calls():
    router, counter, view = parts()
    y = G["in/y"][: len(G["in/y"]) // 2]
    net = Guided(view, Gaussian(), CFG["cfg_scale"], 3, {"y": y}, view.null(y))
    run = Run(view, STEPS)
    x, out = hard(net, lambda denoise, x, run: SOLVERS["ddim"](denoise, x, Gaussian(), run, None), run, G["in/z"])
    for k in range(STEPS):
        assert relative(x[k], G["out/hard/x"][k]) <= 1e-5
        assert relative(out[k], G["out/hard/out"][k]) <= 1e-5
    assert torch.equal(counter.table(len(router.columns)), 2 * G["out/hard/calls"])  # two passes, where the release has one
    assert run.finish()["l2c"]["computed"] == int(G["out/hard/calls"].sum())


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(case):
    kind, s = case.split("/s")
    router, _, view = parts()
    objective = objective_from("l2c", {"coefficient": CFG["l1"], "straight_through": kind == "ste"}, Gaussian())
    time = torch.full((len(G["in/x0"]),), (int(s) // 2 + 0.5) / (STEPS // 2))
    batch = {"x": G["in/x0"], "y": G["in/y_train"], "noise": G["in/noise"], "drop": G["in/drop_u"], "time": time}
    found = objective.loss(view.train(), batch)
    found.loss.mean().backward()
    assert relative(found.parts["mse"], G[f"out/{case}/mse"]) <= 1e-5
    assert relative(found.parts["computed"].mean(), G[f"out/{case}/l1"]) <= 1e-5
    assert relative(found.loss.mean(), G[f"out/{case}/loss"]) <= 1e-5
    step = STEPS - int(s)  # of s - 1, in order of execution
    assert relative(router.routers[str(step)].grad, G[f"out/{case}/grad"]) <= 1e-5
    assert [n for n, p in view.named_parameters() if p.grad is not None] == [f"methods.l2c.routers.{step}"]
