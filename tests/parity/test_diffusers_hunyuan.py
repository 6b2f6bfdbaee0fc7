"""Our Hunyuan-DiT against diffusers' HunyuanDiT2DModel, live, on random weights; and all directions of the weight tables."""

import pytest
import torch
from golden import relative
from layouts import CHANGES, config_of, damaged, source

from ditkit.backbones.dit import draw_parameters
from ditkit.backbones.hunyuan import Hunyuan
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.interop import hunyuan
from ditkit.interop.convert import convert, open_any
from ditkit.interop.hints import Hints
from ditkit.interop.tables import load_all
from ditkit.interop.verify import quiet_imports, verify

with quiet_imports():
    from diffusers import HunyuanDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

pytestmark = pytest.mark.parity
SMALL = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    hidden_size=32,
    in_channels=4,
    patch_size=2,
    sample_size=16,
    num_layers=6,
    mlp_ratio=2.3,
    cross_attention_dim=24,
    cross_attention_dim_t5=16,
    pooled_projection_dim=12,
    text_len=5,
    text_len_t5=4,
)
SHAPES = {
    "1.1": SMALL,
    "1.2": {**SMALL, "use_style_cond_and_image_meta_size": False, "num_layers": 4},
    "other": {
        **SMALL,
        "patch_size": 3,
        "sample_size": 15,
        "in_channels": 5,
        "learn_sigma": False,
        "attention_head_dim": 12,
        "hidden_size": 24,
    },
}


def theirs(name):
    torch.manual_seed(0)
    return draw_parameters(HunyuanDiT2DModel(**SHAPES[name])).eval()


def ours_from(model):
    config = config_of(hunyuan, model)
    made = Hunyuan(config).eval()
    made.load_state_dict(load_all(source(Hunyuan, model.state_dict(), hunyuan.diffusers_table(config), config)))
    return made


@pytest.fixture(scope="module", params=SHAPES)
def pair(request):
    model = theirs(request.param)
    return model, ours_from(model)


def both(live, ours, h, w, dtype=torch.float32):
    """The two outputs, some text masked. Times are exact in bf16, in which diffusers has them."""
    cfg, g = ours.config, torch.Generator().manual_seed(1)
    x, t = torch.randn(3, cfg.in_channels, h * cfg.patch_size, w * cfg.patch_size, generator=g).to(dtype), torch.tensor([0.0, 416, 996])
    text = torch.randn(3, cfg.text_length, cfg.text_dim, generator=g).to(dtype)
    t5 = torch.randn(3, cfg.t5_length, cfg.t5_dim, generator=g).to(dtype)
    mask, t5_mask = (torch.arange(n)[None] < torch.tensor([[n], [1], [3]]) for n in (cfg.text_length, cfg.t5_length))
    ours_cond = dict(text=text, mask=mask, t5=t5, t5_mask=t5_mask)
    call = dict(encoder_hidden_states=text, text_embedding_mask=mask, encoder_hidden_states_t5=t5, text_embedding_mask_t5=t5_mask)
    if cfg.size_and_style:
        ours_cond["size"] = torch.tensor([[512.0, 384, 256, 256, 0, 16], [1024, 1024, 768, 512, 8, 0], [64, 64, 64, 64, 0, 0]])
        call |= dict(image_meta_size=ours_cond["size"], style=torch.zeros(3, dtype=torch.int64))
    region = get_resize_crop_region_for_grid((h, w), cfg.position_base)
    rope = get_2d_rotary_pos_embed(cfg.dim // cfg.num_heads, region, (h, w))
    want = live(x, timestep=t.to(dtype), image_rotary_emb=rope, **call).sample
    return ours(x, t, **ours_cond), want


@torch.no_grad()
def test_output(pair):
    for grid in ((8, 8), (7, 3), (4, 9)):
        assert relative(*both(*pair, *grid)) <= 1e-5


@torch.no_grad()
def test_output_in_bf16(pair):
    live, ours = pair
    live, ours = theirs_in_bf16(live), Hunyuan(ours.config).to(torch.bfloat16).eval()
    ours.load_state_dict(load_all(source(Hunyuan, live.state_dict(), hunyuan.diffusers_table(ours.config), ours.config)))
    assert relative(*both(live, ours, 6, 4, torch.bfloat16)) <= 2e-2


def theirs_in_bf16(live):
    other = HunyuanDiT2DModel(**{k: v for k, v in live.config.items() if not k.startswith("_")})
    other.load_state_dict(live.state_dict())
    return torch.nn.Module.to(other, torch.bfloat16).eval()


def test_round_trips_are_bit_exact(pair):
    """diffusers -> ours -> diffusers, and by way of the released layout."""
    live, ours = pair
    config, weights = ours.config, live.state_dict()
    official, diffusers = hunyuan.official_table(config), hunyuan.diffusers_table(config)
    released = official.export(ours.state_dict())
    again = diffusers.export(load_all(source(Hunyuan, released, official, config)))
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[k], v) for k, v in weights.items())
    assert hunyuan.is_official(released)
    assert torch.equal(released["blocks.1.norm3.weight"], weights["blocks.1.norm2.weight"])
    shift = weights["norm_out.linear.bias"].chunk(2)[1]
    assert torch.equal(released["final_layer.adaLN_modulation.1.bias"].chunk(2)[0], shift)


def test_configurations_come_back(pair):
    live, ours = pair
    config = ours.config
    back = {k: v for k, v in hunyuan.config_to_diffusers(config).items() if not k.startswith("_")}
    assert all(live.config[k] == v for k, v in back.items())
    assert hunyuan.constructor_of(config).to_ours(hunyuan.ours_of(config)) == config
    shapes = {k: tuple(v.shape) for k, v in hunyuan.official_table(config).export(ours.state_dict()).items()}
    found = hunyuan.config_from_official(shapes, Hints(input_size=config.input_size))
    hidden = int(config.dim * config.mlp_ratio)
    assert int(found.dim * found.mlp_ratio) == hidden
    assert found.model_copy(update={"mlp_ratio": config.mlp_ratio}) == config


@pytest.mark.parametrize("change", CHANGES)
def test_tables_are_strict(change):
    model = theirs("1.2")
    config, name = config_of(hunyuan, model), "blocks.3.skip_linear.weight"
    weights = damaged(model.state_dict(), name, change)
    with pytest.raises(WeightsError, match=name):
        source(Hunyuan, weights, hunyuan.diffusers_table(config), config)


def test_other_configurations_are_refused():
    with pytest.raises(DitkitError, match="hidden_size is 33"):
        hunyuan.config_from_diffusers({**SMALL, "hidden_size": 33})
    with pytest.raises(DitkitError, match="norm_type"):
        hunyuan.config_from_diffusers({**SMALL, "norm_type": "rms"})
    config = hunyuan.config_from_diffusers(SMALL)
    with pytest.raises(DitkitError, match="skips"):
        hunyuan.config_to_diffusers(config.model_copy(update={"skips": ()}))


def test_a_folder_is_opened_converted_and_verified(tmp_path):
    theirs("1.1").save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c.safetensors", "official")
    first, last = open_any(tmp_path / "a").tensors, open_any(tmp_path / "c.safetensors").tensors
    assert all(torch.equal(last.read(n), first.read(n)) for n in first.shapes)
    errors = verify(tmp_path / "a", record=False).errors
    assert errors["float32"] <= 1e-5
    assert errors["bfloat16"] <= 2e-2
