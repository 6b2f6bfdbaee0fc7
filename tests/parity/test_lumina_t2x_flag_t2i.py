"""Flag-DiT for text against the released code: every output of lumina-t2x-flag-t2i.safetensors."""

import pytest
from released_lumina import check, open_golden

G = open_golden("lumina-t2x-flag-t2i")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", G.starting("out"))
def test_output(name):
    check(G, "flag", name)
