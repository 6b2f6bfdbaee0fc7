"""Our FLUX against diffusers' FluxTransformer2DModel, live, on random weights; and both directions of the weight tables."""

import pytest
import torch
from golden import relative
from layouts import CHANGES, config_of, damaged, source

from ditkit.backbones.dit import draw_parameters
from ditkit.backbones.flux import Flux
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.interop import flux
from ditkit.interop.hints import Hints
from ditkit.interop.tables import load_all
from ditkit.interop.verify import quiet_imports
from ditkit.nn.patches import patchify, unpatchify

with quiet_imports():
    from diffusers import FluxPipeline, FluxTransformer2DModel

pytestmark = pytest.mark.parity
DEV = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=20,
    pooled_projection_dim=12,
    guidance_embeds=True,
    axes_dims_rope=(4, 14, 14),
)
SHAPES = {
    "dev": DEV,
    "schnell": {**DEV, "guidance_embeds": False, "num_attention_heads": 3, "axes_dims_rope": (8, 12, 12)},
    "fill": {**DEV, "in_channels": 24, "out_channels": 4, "num_layers": 1, "num_single_layers": 3},
}


def theirs(shape):
    torch.manual_seed(0)
    return draw_parameters(FluxTransformer2DModel(**shape)).eval()


def ours_from(model):
    config = config_of(flux, model)
    made = Flux(config).eval()
    made.load_state_dict(load_all(source(Flux, model.state_dict(), flux.diffusers_table(config), config)))
    return made


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def pair(request):
    model = theirs(request.param)
    return model, ours_from(model)


GRID = (3, 4)


def inputs(cfg):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, cfg.in_channels, *(2 * n for n in GRID), generator=g)
    cond = {"text": torch.randn(2, 5, cfg.text_dim, generator=g), "pooled": torch.randn(2, cfg.pooled_dim, generator=g)}
    return x, torch.tensor([0.3, 0.7]), cond, {"guidance": torch.tensor([3.5, 1.0])} if cfg.guidance is not None else {}


def run_theirs(live, x, t, cond, told):
    """Their call, on patches packed as their pipeline packs them."""
    packed = FluxPipeline._pack_latents(x, *x.shape)
    ids = FluxPipeline._prepare_latent_image_ids(1, *GRID, x.device, x.dtype)
    called = dict(encoder_hidden_states=cond["text"], pooled_projections=cond["pooled"], txt_ids=torch.zeros(5, 3), img_ids=ids)
    return unpatchify(live(packed, timestep=t, **called, **told).sample, GRID, 2, "channels first")


@torch.no_grad()
def test_output(pair):
    live, ours = pair
    x, t, cond, told = inputs(ours.config)
    assert relative(ours(x, t, **cond, **told), run_theirs(live, x, t, cond, told)) <= 1e-5


@torch.no_grad()
def test_output_in_bf16(pair):
    """At times and scales that bf16 holds exactly, also a thousandfold: diffusers rounds 1000 t to it."""
    live, ours = (torch.nn.Module.to(m, torch.bfloat16) for m in pair)
    x, _, cond, told = inputs(ours.config)
    t = torch.tensor([0.25, 0.5])
    told = {name: torch.tensor([2.0, 1.0]) for name in told}
    x, cond = x.bfloat16(), {k: v.bfloat16() for k, v in cond.items()}
    assert relative(ours(x, t, **cond, **told), run_theirs(live, x, t, cond, told)) <= 2e-2


def test_packing_is_theirs():
    x = torch.arange(2 * 4 * 6 * 8.0).reshape(2, 4, 6, 8)
    packed = FluxPipeline._pack_latents(x, *x.shape)
    assert torch.equal(patchify(x, 2), packed)
    assert torch.equal(unpatchify(packed, (3, 4), 2, "channels first"), x)


def test_round_trips_are_bit_exact(pair):
    """diffusers -> ours -> diffusers, and by way of the released layout."""
    live, ours = pair
    config, weights = ours.config, live.state_dict()
    official, diffusers = flux.official_table(config), flux.diffusers_table(config)
    released = official.export(ours.state_dict())
    assert flux.is_official(released)
    again = diffusers.export(load_all(source(Flux, released, official, config)))
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[k], v) for k, v in weights.items())


def test_configurations_come_back(pair):
    live, ours = pair
    config = ours.config
    back = {k: tuple(v) if isinstance(v, list) else v for k, v in flux.config_to_diffusers(config).items() if not k.startswith("_")}
    assert all(live.config[k] == v or (k == "out_channels" and live.config[k] is None) for k, v in back.items())
    assert flux.config_from_diffusers(flux.config_to_diffusers(config)) == config
    small = config.model_copy(update={"input_size": (8, 6)})
    assert flux.config_from_diffusers(flux.config_to_diffusers(small)) == small
    shapes = {k: tuple(v.shape) for k, v in flux.official_table(config).export(ours.state_dict()).items()}
    guessed = flux.config_from_official(shapes, Hints())
    assert guessed.model_copy(update={"rope_widths": config.rope_widths}) == config


@pytest.mark.parametrize("change", CHANGES)
def test_tables_are_strict(change):
    model = theirs(SHAPES["dev"])
    config, name = config_of(flux, model), "single_transformer_blocks.1.proj_mlp.weight"
    weights = damaged(model.state_dict(), name, change)
    with pytest.raises(WeightsError, match=name):
        source(Flux, weights, flux.diffusers_table(config), config)


def test_other_configurations_are_refused():
    with pytest.raises(DitkitError, match=r"num_layer.*num_layers"):
        flux.config_from_diffusers({"num_layer": 7})
    with pytest.raises(DitkitError, match="66 channels of packed patches"):
        flux.config_from_diffusers({"in_channels": 66})
    with pytest.raises(DitkitError, match="patch_size"):
        flux.config_from_diffusers({"patch_size": 2})
