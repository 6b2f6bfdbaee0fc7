"""The SD3 under creatilayout.safetensors: what it computes where the layout has no weight. The layout itself is a method."""

import pytest
import torch
from golden import load_diffusers, open_golden, relative

from ditkit.core.seams import Seam

G = open_golden("creatilayout")
pytestmark = pytest.mark.parity
LAYOUT = ("bbox", "position_net")


@pytest.fixture(scope="module")
def model():
    own = ("attention_type", "max_boxes_per_image", "seed", "inp")
    values = {k: v for k, v in G.config.items() if k not in own}
    return load_diffusers(G, "mmdit", values, LAYOUT)


def conditioning():
    return {"text": G["in/encoder_hidden_states"], "pooled": G["in/pooled"]}


@torch.no_grad()
def test_embedding(model):
    s = model.embed(G["in/hidden_states"], G["in/t"], model.prepare(**conditioning()))
    assert relative(s["img"].x, G["out/patch_tokens"]) <= 1e-5
    assert relative(s["img"].c[:, 0], G["out/temb"]) <= 1e-5


@torch.no_grad()
def test_the_first_blocks_text_knows_no_layout(model):
    s = model.embed(G["in/hidden_states"], G["in/t"], model.prepare(**conditioning()))
    assert relative(model.blocks[0](s, Seam())["text"].x, G["out/block0_text"]) <= 1e-5


@torch.no_grad()
def test_output(model):
    assert relative(model(G["in/hidden_states"], G["in/t"], **conditioning()), G["out/y_scale0"]) <= 1e-5
