"""The FLUX under creatilayout-flux.safetensors: what it computes where the layout has no weight. The layout itself is a method."""

import pytest
import torch
from golden import load_diffusers, open_golden, relative

from ditkit.nn.patches import patchify, unpatchify

G = open_golden("creatilayout-flux")
pytestmark = pytest.mark.parity
OWN = ("attention_type", "single_blocks_index", "double_blocks_index", "is_add", "max_boxes_token_length", "fix_bbox_ids", "seed", "inp")


@torch.no_grad()
def test_output():
    values = {k: v for k, v in G.config.items() if k not in OWN}
    grid = (G.config["inp"]["H"], G.config["inp"]["W"])
    values["_ditkit"] = {"input_size": list(grid), "patch_size": 1}  # the file has tokens, of any number of channels
    model = load_diffusers(G, "flux", values, ("bbox", "position_net"))
    told = {"guidance": G["in/guidance"]} if values["guidance_embeds"] else {}
    x = unpatchify(G["in/x"], grid, 1, "channels first")
    y = model(x, G["in/t"], text=G["in/text"], pooled=G["in/pooled"], **told)
    assert relative(patchify(y, 1), G["out/y_scale0"]) <= 1e-5
