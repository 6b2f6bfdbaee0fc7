"""The SiT network against the released code: every output of sit.safetensors. The same network as DiT; time runs from noise to data."""

import pytest
from golden import load_dit, open_golden, relative
from released_dit import compute

from ditkit.diffusion.flow import Flow
from ditkit.diffusion.interpolant import Interpolant

G = open_golden("sit")
pytestmark = pytest.mark.parity


@pytest.fixture
def model():
    return load_dit(G)


@pytest.fixture(scope="module", params=[Flow, Interpolant])
def process(request):
    return request.param(network_time="sit", discard_half=G.config["learn_sigma"])


@pytest.mark.parametrize("name", G.starting("out"))
def test_output(model, process, name):
    assert relative(compute(G, model, process, name), G[name]) <= 1e-5


def test_guidance_in_one_forward(model, process):
    assert relative(compute(G, model, process, "out/cfg", batched=True), G["out/cfg"]) <= 1e-5


def test_the_process_tells_the_network_its_own_time(process):
    """Public time 1 is noise, SiT's time 0."""
    assert relative(process.network_time(1 - G["in/t"].double()), G["in/t"]) <= 1e-7
