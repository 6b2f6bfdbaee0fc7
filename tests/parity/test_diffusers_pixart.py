"""Our PixArt against diffusers' PixArtTransformer2DModel, live, on random weights; weight tables; whole folders (A09)."""

import json
import shutil

import pytest
import torch
from golden import relative
from layouts import CHANGES, config_of, damaged, source
from safetensors.torch import load_file, save_file

from ditkit.backbones.dit import draw_parameters
from ditkit.backbones.pixart import PixArt
from ditkit.bundle import BundleConfig, DataCard, Part, write_bundle
from ditkit.core.errors import ConfigError, DitkitError, WeightsError
from ditkit.interop import pixart
from ditkit.interop.convert import convert
from ditkit.interop.hints import Hints
from ditkit.interop.lora import layouts
from ditkit.interop.released import open_released
from ditkit.interop.tables import load_all
from ditkit.interop.verify import quiet_imports, verify
from ditkit.loading import shapes_of
from ditkit.pipeline import Pipeline

with quiet_imports():
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel

pytestmark = pytest.mark.parity
SHAPES = {
    "alpha": dict(num_attention_heads=3, attention_head_dim=8, sample_size=8, use_additional_conditions=False),
    "alpha with sizes": dict(num_attention_heads=2, attention_head_dim=12, sample_size=16, use_additional_conditions=True, num_layers=3),
    "sigma at 256": dict(num_attention_heads=3, attention_head_dim=8, sample_size=8, interpolation_scale=0.5, out_channels=4),
    "other patches": dict(num_attention_heads=2, attention_head_dim=16, sample_size=9, patch_size=3, in_channels=5, interpolation_scale=2),
}


def theirs(name):
    torch.manual_seed(0)
    shape = {"num_layers": 2, "caption_channels": 10, **SHAPES[name]}
    dim = shape["num_attention_heads"] * shape["attention_head_dim"]
    return draw_parameters(PixArtTransformer2DModel(cross_attention_dim=dim, **shape)).eval()


def ours_from(model):
    config = config_of(pixart, model)
    made = PixArt(config).eval()
    made.load_state_dict(load_all(source(PixArt, model.state_dict(), pixart.diffusers_table(config), config)))
    return made


@pytest.fixture(params=SHAPES)
def pair(request):
    model = theirs(request.param)
    return model, ours_from(model)


def both(live, ours, dtype=torch.float32):
    """The two outputs on a grid that is no square, ragged captions."""
    cfg, g = ours.config, torch.Generator().manual_seed(1)
    h, w = cfg.input_size
    x, t = torch.randn(3, cfg.in_channels, h, w + 2 * cfg.patch_size, generator=g).to(dtype), torch.tensor([0, 417, 999])
    text = torch.randn(3, 7, cfg.text_dim, generator=g).to(dtype)
    mask = torch.arange(7)[None] < torch.tensor([[7], [1], [4]])
    size = torch.tensor([[512.0, 384.0], [100.0, 300.0], [64.0, 64.0]]) if cfg.micro_conditions else None
    aspect = None if size is None else size[:, :1] / size[:, 1:]
    more = {"resolution": size, "aspect_ratio": aspect}
    want = live(x, text, timestep=t, added_cond_kwargs=more, encoder_attention_mask=mask.to(dtype)).sample
    return ours(x, t, text=text, mask=mask, size=size, aspect=aspect), want


@torch.no_grad()
def test_output(pair):
    assert relative(*both(*pair)) <= 1e-5


@torch.no_grad()
def test_output_in_bf16(pair):
    live, ours = (torch.nn.Module.to(m, torch.bfloat16) for m in pair)
    assert relative(*both(live, ours, torch.bfloat16)) <= 2e-2


def test_round_trip_is_bit_exact(pair):
    live, ours = pair
    back = pixart.diffusers_table(ours.config).export(ours.state_dict())
    assert back.keys() == live.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in live.state_dict().items())
    constructor = {k: v for k, v in pixart.config_to_diffusers(ours.config).items() if not k.startswith("_")}
    defaults = {"interpolation_scale": 1, "out_channels": ours.config.in_channels, "use_additional_conditions": False}
    assert all(live.config[k] == v or (live.config[k] is None and defaults[k] == v) for k, v in constructor.items())


def full(**more):
    """All that the two systems have, in one network."""
    torch.manual_seed(0)
    sizes = dict(input_size=(8, 8), dim=24, depth=3, num_heads=3, text_dim=10, text_length=6, position_base=4, position_scale=2.0)
    given = {**sizes, "micro_conditions": True, "qk_norm": True, "kv_ratio": 2, "kv_blocks": (0, 2), **more}
    return draw_parameters(PixArt(**given)).eval()


def test_released_to_diffusers_to_released_is_bit_exact_but_for_the_null_caption():
    ours = full()
    released, diffusers = pixart.official_table(ours.config), pixart.diffusers_table(ours.config)
    first = released.export(ours.state_dict())
    assert first["blocks.2.attn.sr.weight"].shape == (24, 1, 2, 2)
    assert first["blocks.0.attn.norm.bias"].shape == (24,)
    assert "blocks.1.attn.sr.weight" not in first
    assert first["y_embedder.y_embedding"].shape == (6, 10)
    without = ours.config.model_copy(update={"null_caption": False})
    middle = diffusers.export(ours.state_dict())
    again = pixart.official_table(without).export(load_all(source(PixArt, middle, pixart.diffusers_table(without), without)))
    assert first.keys() - again.keys() == {"y_embedder.y_embedding"}
    assert all(torch.equal(again[k], first[k]) for k in again)


@pytest.mark.parametrize("change", CHANGES)
def test_tables_are_strict(change):
    model = theirs("alpha")
    config, name = config_of(pixart, model), "transformer_blocks.1.attn2.to_v.bias"
    weights = damaged(model.state_dict(), name, change)
    with pytest.raises(WeightsError, match=name):
        source(PixArt, weights, pixart.diffusers_table(config), config)


def test_the_position_table_may_be_absent_but_not_another():
    """Issue 37 of PixArt-sigma: the 256-pixel checkpoint has none."""
    ours = full()
    table = pixart.official_table(ours.config)
    weights = table.export(ours.state_dict())
    other = {**weights, "pos_embed": weights["pos_embed"].flip(1)}
    with pytest.raises(WeightsError, match="pos_embed"):
        source(PixArt, other, table, ours.config)
    del weights["pos_embed"]
    got = load_all(source(PixArt, weights, table, ours.config))
    assert all(torch.equal(got[k], v) for k, v in ours.state_dict().items())


def test_unknown_keys_and_other_values_of_a_foreign_configuration_are_refused():
    with pytest.raises(DitkitError, match=r"num_layer.*num_layers"):
        pixart.config_from_diffusers({"num_layer": 7})
    with pytest.raises(DitkitError, match="norm_type"):
        pixart.config_from_diffusers({"norm_type": "ada_norm_zero"})
    with pytest.raises(WeightsError, match="caption_channels None"):
        pixart.config_from_diffusers({})


# released files


HINTS = Hints(num_heads=3)


@pytest.mark.parametrize(
    ("held", "key"), [({"state_dict": 0, "state_dict_ema": 1}, "state_dict_ema"), ({"state_dict": 1}, "state_dict"), ({}, "")]
)
def test_a_released_file_becomes_a_bundle_and_back(tmp_path, held, key):
    ours = full(kv_ratio=1, kv_blocks=())
    released = pixart.official_table(ours.config).export(ours.state_dict())
    wrong = {name: value + 1 for name, value in released.items()}
    content = {name: released if right else wrong for name, right in held.items()} | ({"epoch": 3} if held else {})
    torch.save(content or released, tmp_path / "x.pth")
    hints = HINTS.model_copy(update={"position_scale": 2.0, "weights": "model" if key == "state_dict" else "ema"})
    convert(tmp_path / "x.pth", tmp_path / "b", hints=hints)
    pipe = Pipeline.from_pretrained(tmp_path / "b", device="cpu")
    assert pipe.model.config == ours.config
    assert all(torch.equal(pipe.model.state_dict()[k], v) for k, v in ours.state_dict().items())
    assert (pipe.config.sampling.solver, pipe.config.sampling.num_inference_steps) == ("dpm++2m", 20)
    assert pipe.config.sampling.guidance == {"scale": 4.5}
    with pytest.raises(DitkitError, match="told captions"):
        pipe()
    convert(tmp_path / "b", tmp_path / "y.safetensors", "official")
    again = load_file(tmp_path / "y.safetensors")
    assert again.keys() == released.keys()
    assert all(torch.equal(again[k], v) for k, v in released.items())
    assert open_released(tmp_path / "y.safetensors").config.backbone.config == ours.config.to_dict()  # no hints


def test_published_files_need_no_hint_but_the_size_where_no_table_says_it():
    for name, values in PixArt.sizes.items():
        config = PixArt.config_class(**values)
        mine, table = shapes_of(Part(name="pixart", config=config.to_dict())), pixart.official_table(config)
        shapes = {"pos_embed": (1, config.position_base**2, config.dim)}
        for ours, link in table.links().items():
            shapes.update(zip(link.theirs, link.rule.shapes(mine[ours], len(link.theirs))))
        system = "pixart-sigma" if "Sigma" in name else "pixart-alpha"
        assert pixart.config_from_official(shapes, Hints()) == config, name
        assert pixart.system_of("gaussian", config) == system
        del shapes["pos_embed"]
        with pytest.raises(DitkitError, match="give --input-size"):
            pixart.config_from_official(shapes, Hints())
        assert pixart.config_from_official(shapes, Hints(input_size=config.input_size)) == config


def test_a_hint_for_another_family_is_refused(tmp_path):
    ours = full()
    save_file(pixart.official_table(ours.config).export(ours.state_dict()), tmp_path / "x.safetensors")
    with pytest.raises(DitkitError, match="system is 'sit'; allowed: pixart-alpha, pixart-sigma"):
        open_released(tmp_path / "x.safetensors", Hints(system="sit", num_heads=3))
    with pytest.raises(WeightsError, match="'pos_embed' differs"):  # by its size the scale would be another
        open_released(tmp_path / "x.safetensors", HINTS)


# diffusers folders


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What diffusers saves of a PixArt pipeline, without its text encoder."""
    folder = tmp_path_factory.mktemp("diffusers") / "pipe"
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4
    )
    theirs("alpha with sizes").save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "PixArtAlphaPipeline",
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("old", [False, True], ids=["", "as older files name the class"])
def test_a_folder_opens_and_verifies(made, tmp_path, old):
    folder = made
    if old:
        folder = shutil.copytree(made, tmp_path / "old")
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "Transformer2DModel"}))
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    assert pipe.config.sampling.solver == "dpm++2m"
    assert pipe.config.sampling.options == {"spacing": "dpm"}
    assert pipe.config.codec.name == "vae"
    found = verify(folder, record=False)
    assert found.errors["float32"] <= 1e-5
    assert found.errors["bfloat16"] <= 2e-2
    convert(folder, tmp_path / "bundle")
    convert(tmp_path / "bundle", tmp_path / "back", "diffusers")
    first, again = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (folder / "transformer", tmp_path / "back"))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[k], v) for k, v in first.items())
    PixArtTransformer2DModel.from_pretrained(tmp_path / "back")


def test_what_diffusers_cannot_hold_is_said_and_comes_back(tmp_path, caplog):
    ours = full(mlp_ratio=4.0)
    card = DataCard(name="x", shape=(4, 8, 8))
    write_bundle(
        tmp_path / "b",
        BundleConfig(backbone=Part(name="pixart", config=ours.config.to_dict()), process=Part(name="gaussian"), data=card),
        ours.state_dict(),
    )
    convert(tmp_path / "b", tmp_path / "d", "diffusers")
    assert "no place for the null caption" in caplog.text
    assert "neither compressed keys" in caplog.text
    back = Pipeline.from_pretrained(tmp_path / "d", device="cpu").model
    assert back.config == ours.config.model_copy(update={"null_caption": False})
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in back.state_dict().items())


def test_other_classes_are_refused(made, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "PixArtTransformer3DModel"}))
    with pytest.raises(ConfigError, match="did you mean 'PixArtTransformer2DModel'"):
        Pipeline.from_pretrained(tmp_path)


def test_lora_files_of_diffusers_may_name_every_projection_of_its_blocks():
    live = theirs("alpha")
    linear = {name for name, m in live.named_modules() if isinstance(m, torch.nn.Linear) and name.startswith("transformer_blocks")}
    assert layouts(ours_from(live))["diffusers"].keys() == linear
