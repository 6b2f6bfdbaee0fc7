"""PixArt-alpha against the released code: every output of pixart-alpha-base.safetensors."""

import pytest
from released_pixart import check, open_golden

G = open_golden("pixart-alpha-base")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", G.starting("out"))
def test_output(name):
    check(G, name)
