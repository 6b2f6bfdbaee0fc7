"""The DiT network against the released code: every output of dit.safetensors."""

import pytest
from golden import load_dit, open_golden, relative
from released_dit import compute

from ditkit.diffusion.gaussian import Gaussian

G = open_golden("dit")
pytestmark = pytest.mark.parity


@pytest.fixture
def model():
    return load_dit(G)


@pytest.fixture(scope="module")
def process():
    return Gaussian(variance="learned" if G.config["learn_sigma"] else "fixed_large")


@pytest.mark.parametrize("name", G.starting("out"))
def test_output(model, process, name):
    assert relative(compute(G, model, process, name), G[name]) <= 1e-5


@pytest.mark.skipif("out/cfg" not in G.names, reason="the file has no guided output")
def test_guidance_in_one_forward(model, process):
    assert relative(compute(G, model, process, "out/cfg", batched=True), G["out/cfg"]) <= 1e-5
