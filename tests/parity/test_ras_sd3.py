"""The SD3 under ras-sd3.safetensors: the network at its dense steps, and diffusers' doubly shifted times. RAS itself is a method."""

import pytest
import torch
from golden import load_diffusers, open_golden, relative

from ditkit.diffusion.flow import Flow

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
