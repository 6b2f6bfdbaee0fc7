"""RAS on the SD3 of ras-sd3.safetensors: the network at its dense steps, diffusers' doubly shifted times, the accelerated loop."""

import pytest
import torch
from golden import load_diffusers, open_golden, relative

from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.diffusion.flow import Flow
from ditkit.methods.efficiency.ras import RAS

G = open_golden("ras-sd3")
pytestmark = pytest.mark.parity
STEPS = G.config["ras"]["steps"]


@pytest.fixture(scope="module")
def flow():
    return Flow(shift=G.config["shift"])


def test_times(flow):
    assert relative(flow.times(STEPS, "twice"), G["out/sigmas"]) <= 1e-6


@torch.no_grad()
def test_the_network_at_dense_steps(flow):
    model = load_diffusers(G, "mmdit", G.config["model"])
    prepared = model.prepare(text=G["in/text"], pooled=G["in/pooled"])
    times, states = flow.times(STEPS, "twice"), torch.cat([G["in/x"], G["out/x"]])
    ras = G.config["ras"]
    for step in [*range(min(ras["start"], STEPS)), *(k for k in ras["resets"] if k < STEPS)]:
        x, t = states[step].expand(2, -1, -1, -1), flow.network_time(times[step].expand(2))
        v = model(x, t, prepared)
        assert relative(v, G["out/v"][step]) <= 1e-5
        guided = v[0] + G.config["guidance"] * (v[1] - v[0])
        assert relative(states[step] + (times[step + 1] - times[step]).float() * guided, states[step + 1]) <= 1e-5


@torch.no_grad()
def test_accelerated_trajectory_selections_and_caches(flow):
    """Guided by a batch of two for one picture; outputs of tokens that are left out are zero in the file, and kept here."""
    ras, scale, x = G.config["ras"], G.config["guidance"], G["in/x"]
    method = RAS(
        selection="released",
        sample_ratio=ras["ratio"],
        **{name: ras[name] for name in ("start", "end", "metric", "high_ratio")},
        resets=tuple(ras["resets"]),
        ramp=ras.get("skip_num_step", 0),
        ramp_length=ras.get("skip_num_step_length") or 4,
    )
    model = load_diffusers(G, "mmdit", G.config["model"])
    view, times = with_methods(model, method), flow.times(STEPS, "twice")
    prepared, run = view.prepare(text=G["in/text"], pooled=G["in/pooled"]), Run(view, STEPS)
    memory = run.memory["ras"]
    for k in run.steps():
        v = view(x.expand(2, -1, -1, -1), flow.network_time(times[k].expand(2)), prepared, run=run)
        went = torch.ones_like(v[0, 0].flatten())
        if f"out/active/{k}" in G.names:
            active = memory["active", 0][0]
            assert torch.equal(active, G[f"out/active/{k}"].sort().values)
            went = torch.zeros_like(went).index_fill(0, memory["patches"].pixels[active].flatten(), 1)
        assert relative(v * went.view_as(v[0, 0]), G["out/v"][k]) <= 1e-5
        guided = run.close(v[:1] + scale * (v[1:] - v[:1]))
        x = x + (times[k + 1] - times[k]).float() * guided
        assert relative(x[0], G["out/x"][k]) <= 1e-5
    for i in range(len(model.blocks)):
        for name in ("k", "v"):
            cache = run.slots["ras", i, "", 0][f"attn.{name}"]
            assert relative(cache.transpose(1, 2).flatten(2), G[f"out/{name}_cache/{i}"]) <= 1e-5
