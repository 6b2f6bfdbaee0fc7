"""Our MM-DiT against diffusers' SD3Transformer2DModel, live, on random weights; and both directions of the weight tables."""

import pytest
import torch
from golden import relative
from layouts import CHANGES, config_of, damaged, source

from ditkit.backbones.dit import draw_parameters
from ditkit.backbones.mmdit import MMDiT
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.interop import mmdit
from ditkit.interop.hints import Hints
from ditkit.interop.tables import load_all
from ditkit.interop.verify import quiet_imports

with quiet_imports():
    from diffusers import SD3Transformer2DModel

pytestmark = pytest.mark.parity
PLAIN = dict(
    sample_size=32,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=20,
    caption_projection_dim=32,
    pooled_projection_dim=12,
    pos_embed_max_size=24,
)
SHAPES = {
    "SD3": PLAIN,
    "SD3.5-large": {**PLAIN, "qk_norm": "rms_norm", "in_channels": 5, "out_channels": None, "patch_size": 1, "sample_size": 8},
    "SD3.5-medium": {**PLAIN, "qk_norm": "rms_norm", "dual_attention_layers": (0, 2)},
    "dual attention alone": {**PLAIN, "dual_attention_layers": (1,), "num_layers": 2, "patch_size": 3, "sample_size": 12},
}


def theirs(shape):
    torch.manual_seed(0)
    return draw_parameters(SD3Transformer2DModel(**shape)).eval()


def ours_from(model):
    config = config_of(mmdit, model)
    made = MMDiT(config).eval()
    made.load_state_dict(load_all(source(MMDiT, model.state_dict(), mmdit.diffusers_table(config), config)))
    return made


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def pair(request):
    model = theirs(request.param)
    return model, ours_from(model)


def inputs(cfg, h=8, w=12):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, cfg.in_channels, h * cfg.patch_size, w * cfg.patch_size, generator=g)
    text, pooled = torch.randn(2, 5, cfg.text_dim, generator=g), torch.randn(2, cfg.pooled_dim, generator=g)
    return x, torch.tensor([3.0, 700.0]), text, pooled


@torch.no_grad()
def test_output(pair):
    live, ours = pair
    for grid in ((8, 12), (7, 3)):
        x, t, text, pooled = inputs(ours.config, *grid)
        want = live(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample
        assert relative(ours(x, t, text=text, pooled=pooled), want) <= 1e-5


@torch.no_grad()
def test_output_in_bf16(pair):
    live, ours = (torch.nn.Module.to(m, torch.bfloat16) for m in pair)
    x, t, text, pooled = inputs(ours.config)
    x, text, pooled = x.bfloat16(), text.bfloat16(), pooled.bfloat16()
    want = live(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample
    assert relative(ours(x, t, text=text, pooled=pooled), want) <= 2e-2


def test_fresh_positions_are_theirs(pair):
    live, ours = pair
    assert relative(MMDiT(ours.config).positions, live.pos_embed.pos_embed) <= 1e-6


def test_round_trips_are_bit_exact(pair):
    """diffusers -> ours -> diffusers, and by way of the released layout."""
    live, ours = pair
    config, weights = ours.config, live.state_dict()
    official, diffusers = mmdit.official_table(config), mmdit.diffusers_table(config)
    released = official.export(ours.state_dict())
    again = diffusers.export(load_all(source(MMDiT, released, official, config)))
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[k], v) for k, v in weights.items())
    assert mmdit.is_official(released)


def test_configurations_come_back(pair):
    live, ours = pair
    config = ours.config
    back = {k: v for k, v in mmdit.config_to_diffusers(config).items() if not k.startswith("_")}
    assert all(live.config[k] == (tuple(v) if isinstance(v, list) else v) or live.config[k] is None for k, v in back.items())
    shapes = {k: tuple(v.shape) for k, v in mmdit.official_table(config).export(ours.state_dict()).items()}
    hints = Hints(num_heads=config.num_heads, input_size=config.input_size)
    assert mmdit.config_from_official(shapes, hints) == config


@pytest.mark.parametrize("change", CHANGES)
def test_tables_are_strict(change):
    model = theirs(SHAPES["SD3.5-medium"])
    config, name = config_of(mmdit, model), "transformer_blocks.2.attn.norm_added_q.weight"
    weights = damaged(model.state_dict(), name, change)
    with pytest.raises(WeightsError, match=name):
        source(MMDiT, weights, mmdit.diffusers_table(config), config)


def test_other_configurations_are_refused():
    with pytest.raises(DitkitError, match=r"num_layer.*num_layers"):
        mmdit.config_from_diffusers({"num_layer": 7})
    with pytest.raises(DitkitError, match="qk_norm"):
        mmdit.config_from_diffusers({"qk_norm": "layer_norm"})
    with pytest.raises(DitkitError, match="1152, the network's width"):
        mmdit.config_from_diffusers({"caption_projection_dim": 1151})
