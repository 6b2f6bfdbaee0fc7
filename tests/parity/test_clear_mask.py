"""clear-mask: who sees whom, for text, image and the averaged keys; the published numbers of visible pairs."""

import pytest
import torch
from golden import open_golden

from ditkit.core.masks import render
from ditkit.core.seams import Attn, Site
from ditkit.core.streams import Layout, grid_layout
from ditkit.methods.efficiency.clear import CLEAR, POOLED, visible_pairs

G = open_golden("clear-mask")
pytestmark = pytest.mark.parity


def visible(method: CLEAR, grid: tuple[int, int], text: int) -> torch.Tensor:
    """(queries, keys) text first: which keys take part in the softmax of each query, as the method calls the attention."""
    layouts = {"text": Layout(torch.zeros(1, text, 2), text), "img": grid_layout(grid)}
    k_layouts = method.keys("attn", layouts, None)
    sizes = {n: u.coords.shape[1] for n, u in k_layouts.items()}
    q, k = ({n: torch.zeros(1, 1, u.coords.shape[1], 2) for n, u in layouts.items()} for _ in range(2))
    lines = {}

    def attention(a: Attn) -> dict[str, torch.Tensor]:
        keys = sum(u.shape[2] for u in a.k.values())
        mask = torch.ones(sum(u.shape[2] for u in a.q.values()), keys, dtype=torch.bool) if a.mask is None else a.mask[0, 0]
        assert mask.shape[1] == keys
        whole = torch.nn.functional.pad(mask, (0, sum(sizes.values()) - keys))
        lines.update(zip(a.q, whole.split([u.shape[2] for u in a.q.values()])))
        return a.q

    mask = render([method.mask], layouts, k_layouts)
    weight = {"weight": torch.ones(method.config.down, method.config.down)} if method.config.down else {}
    method.attend(attention, Attn("attn", q, k, k, layouts, layouts, mask), Site((), weight, {}))
    assert list(sizes)[-1] == (POOLED if method.config.down else "img")
    return torch.cat([lines["text"], lines["img"]])


@pytest.mark.parametrize(("h", "w", "text", "radius"), G.config["local"])
def test_local(h, w, text, radius):
    assert torch.equal(visible(CLEAR(radius=radius, how="dense"), (h, w), text), G[f"out/local/H{h}_W{w}_T{text}_r{radius}"])
    assert visible_pairs((h, w), text, radius) == G[f"out/local/H{h}_W{w}_T{text}_r{radius}"].sum()


@pytest.mark.parametrize(("h", "w", "text", "radius", "down"), G.config["down"])
def test_down(h, w, text, radius, down):
    want = G[f"out/down/H{h}_W{w}_T{text}_r{radius}_d{down}"]
    assert torch.equal(visible(CLEAR(radius=radius, down=down, how="dense"), (h, w), text), want)
    assert visible_pairs((h, w), text, radius, down) == want.sum()


@pytest.mark.parametrize(("h", "w", "text", "radius"), G.config["counts"])
def test_counts(h, w, text, radius):
    assert visible_pairs((h, w), text, radius) == G[f"out/count/H{h}_W{w}_T{text}_r{radius}"]
