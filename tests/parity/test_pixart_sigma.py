"""PixArt-Sigma against the released code: every output of pixart-sigma.safetensors, its compressed attention alone included."""

import pytest
import torch
from released_pixart import Released, check, open_golden, relative

from ditkit.core.seams import Attn, sdpa
from ditkit.core.streams import grid_layout
from ditkit.nn.adaln_single import merge
from ditkit.nn.kv_down import KVDown

G = open_golden("pixart-sigma")
pytestmark = pytest.mark.parity
ALONE = [n for n in G.starting("out") if n.split("/")[1].startswith(("attn_", "down_"))]
HOW = {"conv": "conv", "ave": "first", "uniform": "first", "uniform_every": "every", "r1": None}


@pytest.mark.parametrize("name", [n for n in G.starting("out") if n not in ALONE])
def test_output(name):
    check(G, name)


@torch.no_grad()
@pytest.mark.parametrize("name", ALONE)
def test_attention_alone(name):
    """The last compressed block's, on the same weights with each way to compress."""
    kind, output = name.split("/")
    what, _, mode = output.partition("_")
    released = Released(G, kind == "out64")
    model, ratio = released.model, G.config["kv_compress_config"]["scale_factor"]
    attention = model.own_blocks()[max(G.config["kv_compress_config"]["kv_compress_layer"])].attn
    if mode == "conv":
        x, grid = released["conv_x"], model.patch_embed.grid(released["x"])
        down = attention.down
    else:
        x, grid = released["attn_x"], tuple(G.call["attn_hw"])
        down = HOW[mode] and KVDown(x.shape[-1], ratio, HOW[mode])
    if what == "down":
        assert relative(down(x, grid), G[name]) <= 1e-5
        return
    attention.down = down
    q, k, v = attention.to_qkv(x, grid)
    layout = {"img": grid_layout(grid)}
    out = sdpa(Attn("attn", {"img": q}, {"img": k}, {"img": v}, layout, layout))["img"]
    assert relative(attention.proj(merge(out)), G[name]) <= 1e-5
