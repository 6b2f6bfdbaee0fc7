"""HarmoniCa against the released code: accelerated and mixed trajectories, sub-layer calls, the proxy, and a whole training trajectory."""

import pytest
import torch
from golden import load_dit, open_golden, relative
from released_cache import attach, hard

from ditkit.core.run import Run
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.solvers import SOLVERS
from ditkit.methods.efficiency.harmonica import HarmoniCa
from ditkit.train.objectives import objective_from
from ditkit.train.routers import Guided, mixed_sample, proxies, trajectory

G = open_golden("harmonica")
pytestmark = pytest.mark.parity
CFG, STEPS = G.config, G.config["steps"]
Y = G["in/y"][: len(G["in/y"]) // 2]


def parts():
    router = HarmoniCa(num_inference_steps=STEPS, threshold=CFG["thres"])
    view, counter = attach(load_dit(G, without=("routers.",)), router, G)
    return router, counter, Guided(view, Gaussian(), CFG["cfg_scale"], 3, {"y": Y}, view.null(Y))


def solve(denoise, x, run):
    return SOLVERS["ddim"](denoise, x, Gaussian(), run, None)


def each(got, want, tolerance=1e-5):
    """Every step for itself: late ones hardly move x."""
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) <= tolerance


def test_times_are_the_released_ones():
    times = Gaussian().network_time(Gaussian().times(STEPS)[:-1])
    assert times.flip(0).round().long().tolist() == G["out/timestep_map"].tolist()


def test_accelerated_trajectory_and_calls():
    router, counter, net = parts()
    run = Run(net.model, STEPS)
    x, out = hard(net, solve, run, G["in/z"])
    each(x, G["out/hard/x"])
    each(out, G["out/hard/out"])
    assert torch.equal(counter.table(len(router.columns)), 2 * G["out/hard/calls"])  # two passes, where the release has one
    report = run.finish()["harmonica"]
    assert report["computed"] == int(G["out/hard/calls"].sum())
    assert report["cache_use"] == router.cache_use() == pytest.approx(float(G["out/hard/cur"]))


def test_mixed_trajectory():
    router, _, net = parts()
    run = Run(net.model, STEPS)
    router.soften(run, [r.detach() for r in router.rows()])
    x, out = hard(net, solve, run, G["in/z"])
    each(x, G["out/soft/x"])
    each(out, G["out/soft/out"])


def test_proxy():
    router, _, net = parts()
    got = proxies(net, router, solve, G["in/z"], "cumulative")
    want, size = G["out/lambda"].flip(0), G["out/plain/x"].square().mean().sqrt()
    assert relative(got[1:], want) <= 1e-5
    assert ((got[1:].sqrt() - want.sqrt()).abs() <= 1e-6 * size).all()  # of differences far smaller than x: to its rounding
    ones = [torch.ones_like(r) for r in router.rows()]
    assert relative(mixed_sample(net, router, solve, G["in/z"], ones), G["out/plain/x"]) <= 1e-5


def test_training_trajectory():
    """Predictions and references, losses, x and what is kept at the end."""
    router, _, net = parts()
    weights = torch.cat([torch.ones(1), G["out/lambda"].flip(0)])
    xs = []

    def watched(denoise, x, run):
        return solve(lambda x, t: (xs.append(x), denoise(x, t))[1], x, run)

    steps, run, last = trajectory(net, router, watched, G["in/z"], weights)
    each([*xs[1:], last], G["out/train/x"])
    error = torch.stack([s.error.mean() for s in steps])
    assert relative(error, G["out/train/data_loss"]) <= 1e-5
    each(error, G["out/train/data_loss"], 1e-3)  # squares of differences far smaller than the outputs
    cost = torch.stack([router.table()[s.step].sum() for s in steps])
    assert relative(cost, G["out/train/l1"]) <= 1e-5
    assert relative(weights[1:] * error + CFG["l1"] * cost, G["out/train/loss"]) <= 1e-5
    shown = [STEPS - 1 - s for s in (STEPS - 2, STEPS // 2, 0)]
    for name in ("reference", "prediction"):
        each([getattr(s, name) for i in shown for s in steps if s.step == i], G[f"out/train/{name[:3] if name == 'reference' else 'pred'}"])
    for branch in ("attn", "mlp"):
        kept = [
            torch.cat([run.slots["harmonica", i, p, 0][f"{branch}.out@img"] for p in ("cond", "null")])
            for i in range(len(net.model.blocks))
        ]
        each(kept, G[f"out/train/cache_after_{branch}"])


def test_gradients_and_update():
    """Through the objective: one update at the trajectory's end is the released update after each step."""
    router, _, net = parts()
    objective = objective_from(
        "harmonica", {"coefficient": CFG["l1"], "guidance_scale": CFG["cfg_scale"], "guidance_channels": 3}, Gaussian()
    )
    router.proxy.copy_(torch.cat([torch.ones(1), G["out/lambda"].flip(0)]))
    router.updates.fill_(1)  # the weights are given, not measured
    optimizer = torch.optim.AdamW(router.routers.parameters(), CFG["lr"], weight_decay=0)
    noise = G["in/z"][: len(Y)]
    objective.loss(net.model, {"x": noise, "noise": noise, "y": Y}).loss.mean().backward()
    gradients = torch.stack([router.routers[str(i)].grad for i in range(1, STEPS)])
    assert relative(gradients, G["out/train/grad"]) <= 1e-5
    each(gradients, G["out/train/grad"], 1e-4)
    optimizer.step()
    router.clamp_()
    each([router.routers[str(i)] for i in range(1, STEPS)], G["out/train/router_after"][:-1].flip(0))
    assert not [n for n, p in net.model.named_parameters() if p.grad is not None and not n.startswith("methods.harmonica.")]
