"""The DiT network against the released code: every output of dit-nosigma.safetensors (no variance channels, no null label)."""

import pytest
from golden import load_dit, open_golden, relative
from released_dit import compute

from ditkit.diffusion.gaussian import Gaussian

G = open_golden("dit-nosigma")
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
