"""Our DiT against diffusers' DiTTransformer2DModel, live, on random weights; and both directions of the weight tables (A09)."""

import pytest
import torch
from golden import relative

from ditkit.backbones.dit import DiT, DiTConfig, draw_parameters
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.interop import dit
from ditkit.interop.tables import SWAP, Renamed, load_all
from ditkit.interop.verify import quiet_imports
from ditkit.nn.adaln import AdaLNHead

with quiet_imports():
    from diffusers import DiTTransformer2DModel
    from diffusers.models.normalization import AdaLayerNormContinuous

pytestmark = pytest.mark.parity
SHAPES = [
    dict(num_attention_heads=3, attention_head_dim=12, num_layers=3, sample_size=8, patch_size=2, num_embeds_ada_norm=7, out_channels=8),
    dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=9, patch_size=3, num_embeds_ada_norm=4, in_channels=5),
    dict(num_attention_heads=4, attention_head_dim=8, num_layers=1, sample_size=4, patch_size=1, num_embeds_ada_norm=2, norm_eps=1e-6),
]


def theirs(shape):
    torch.manual_seed(0)
    model = draw_parameters(DiTTransformer2DModel(**shape)).eval()
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return model


def config_of(model):
    return dit.config_from_diffusers({k: v for k, v in model.config.items() if not k.startswith("_")})


def source(weights, table, config):
    ours = {name: tuple(value.shape) for name, value in DiT(config).state_dict().items()}
    return Renamed("weights", {k: tuple(v.shape) for k, v in weights.items()}, weights.__getitem__, table, ours)


def ours_from(model):
    config = config_of(model)
    made = DiT(config).eval()
    made.load_state_dict(load_all(source(model.state_dict(), dit.diffusers_table(config), config)))
    return made


@pytest.fixture(params=range(len(SHAPES)))
def pair(request):
    model = theirs(SHAPES[request.param])
    return model, ours_from(model)


def inputs(model):
    cfg = model.config
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, cfg.in_channels, *cfg.input_size, generator=g)
    return x, torch.tensor([0, 250, 617, 999]), torch.tensor([0, 1, cfg.num_classes - 1, cfg.num_classes])


@torch.no_grad()
def test_output(pair):
    live, ours = pair
    x, t, y = inputs(ours)
    assert relative(ours(x, t, y=y), live(x, t, class_labels=y).sample) <= 1e-5


@torch.no_grad()
def test_output_in_bf16(pair):
    live, ours = (torch.nn.Module.to(m, torch.bfloat16) for m in pair)
    x, t, y = inputs(ours)
    assert relative(ours(x.bfloat16(), t, y=y), live(x.bfloat16(), t, class_labels=y).sample) <= 2e-2


def test_round_trip_is_bit_exact(pair):
    live, ours = pair
    back = dit.diffusers_table(ours.config).export(ours.state_dict())
    assert back.keys() == live.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in live.state_dict().items())
    constructor = {k: v for k, v in dit.config_to_diffusers(ours.config).items() if not k.startswith("_")}
    assert all(live.config[k] == v or (k == "out_channels" and live.config[k] is None) for k, v in constructor.items())


def test_released_to_diffusers_to_released_is_bit_exact(pair):
    _, ours = pair
    official = dit.official_table(ours.config)
    first = official.export(ours.state_dict())
    middle = dit.diffusers_table(ours.config).export(load_all(source(first, official, ours.config)))
    again = official.export(load_all(source(middle, dit.diffusers_table(ours.config), ours.config)))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[k], v) for k, v in first.items())
    assert first["x_embedder.proj.weight"].dim() == 4
    assert first["pos_embed"].shape == (1, *torch.Size([first["pos_embed"].shape[1], ours.config.dim]))


@torch.no_grad()
def test_released_weights_run_in_diffusers_once_its_time_code_has_their_frequencies():
    """diffusers' exponents are i / 127; the released code's i / 128. Everything else of the two networks is equal."""
    config = DiTConfig(input_size=(8, 8), dim=32, depth=2, num_heads=4, num_classes=5)
    ours = draw_parameters(DiT(config)).eval()
    values = {k: v for k, v in dit.config_to_diffusers(config).items() if not k.startswith("_")}
    live = DiTTransformer2DModel(**values).eval()
    live.load_state_dict(dit.diffusers_table(config).export(ours.state_dict()))
    x, t, y = inputs(ours)
    assert relative(ours(x, t, y=y), live(x, t, class_labels=y).sample) > 1e-3
    for block in live.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert relative(ours(x, t, y=y), live(x, t, class_labels=y).sample) <= 1e-5


def test_copies_that_differ_are_refused():
    model = theirs(SHAPES[0])
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    model.state_dict()[name][3, 1] += 1
    with pytest.raises(WeightsError, match=f"'{name}' differs"):
        ours_from(model)


@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
def test_tables_are_strict(change):
    model = theirs(SHAPES[0])
    weights, config = model.state_dict(), config_of(model)
    name = "transformer_blocks.1.attn1.to_k.bias"
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights[name + "_2"] = weights[name]
    else:
        weights[name] = weights[name][:-1]
    with pytest.raises(WeightsError, match=name):
        source(weights, dit.diffusers_table(config), config)


def test_other_positions_are_refused():
    ours = DiT(input_size=(8, 8), dim=32, depth=1, num_heads=4, num_classes=5)
    table = dit.official_table(ours.config)
    weights = table.export(ours.state_dict())
    weights["pos_embed"] = weights["pos_embed"] * 0.5
    with pytest.raises(WeightsError, match="pos_embed"):
        source(weights, table, ours.config)


def test_unknown_keys_and_other_values_of_a_foreign_configuration_are_refused():
    with pytest.raises(DitkitError, match=r"num_layer.*num_layers"):
        dit.config_from_diffusers({"num_layer": 7})
    with pytest.raises(DitkitError, match="activation_fn"):
        dit.config_from_diffusers({"activation_fn": "gelu"})


@torch.no_grad()
def test_newer_heads_have_scale_before_shift():
    """A09: round trip bit-exact, equal forward to 1e-6; of a LoRA only B is swapped."""
    torch.manual_seed(0)
    width = 8
    live, ours = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6), AdaLNHead(width, width)
    weight, bias = live.linear.weight, live.linear.bias
    assert weight.shape == (16, 8)
    ours.ada.weight.copy_(SWAP.load([weight], (16, 8)))
    ours.ada.bias.copy_(SWAP.load([bias], (16,)))
    assert torch.equal(SWAP.export(ours.ada.weight, 1)[0], weight)
    ours.proj.weight.copy_(torch.eye(width))
    ours.proj.bias.zero_()
    x, c = torch.randn(2, 5, width), torch.randn(2, width)
    assert relative(ours(x, c[:, None]), live(x, c)) <= 1e-6
    a, b = torch.randn(4, width), torch.randn(2 * width, 4)
    swapped = SWAP.load([b], (16, 4)) @ a
    assert torch.equal(swapped, SWAP.load([b @ a], (16, 8)))
    assert not torch.allclose(SWAP.load([b], (16, 4)) @ SWAP.load([a], (4, 8)), swapped)
