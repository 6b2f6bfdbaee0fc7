"""Our Next-DiT against diffusers' LuminaNextDiT2DModel and LuminaPipeline, live; the weight tables of all four networks."""

import json
import math

import pytest
import torch
from golden import relative
from layouts import CHANGES, config_of, damaged, source
from safetensors.torch import load_file, save_file

from ditkit.backbones.dit import draw_parameters
from ditkit.backbones.lumina import Lumina
from ditkit.conditioning import Text
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.core.view import with_methods
from ditkit.diffusion import noise
from ditkit.interop import lumina
from ditkit.interop.convert import convert, open_any
from ditkit.interop.hints import Hints
from ditkit.interop.lora import load_lora
from ditkit.interop.tables import load_all
from ditkit.interop.verify import quiet_imports, verify
from ditkit.loading import load_model
from ditkit.pipeline import Pipeline

with quiet_imports():
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel, LuminaPipeline
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
    from diffusers.utils import logging as diffusers_logging

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
pytestmark = pytest.mark.parity
WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = dict(sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2, multiple_of=16, cross_attention_dim=10)
SHAPES = {
    "grouped": SMALL,
    "not grouped": {**SMALL, "num_kv_heads": 4, "ffn_dim_multiplier": 0.5, "norm_eps": 1e-4},
    "patches of 3": {**SMALL, "sample_size": 9, "patch_size": 3, "in_channels": 5, "learn_sigma": False, "qk_norm": False},
}


def theirs(**shape):
    """Random weights, the two copies of queries and their norm equal."""
    torch.manual_seed(0)
    model = draw_parameters(LuminaNextDiT2DModel(**shape))
    for layer in model.layers:
        layer.attn2.to_q.load_state_dict(layer.attn1.to_q.state_dict())
        if layer.attn1.norm_q is not None:
            layer.attn2.norm_q.load_state_dict(layer.attn1.norm_q.state_dict())
    return model.eval()


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def pair(request):
    model = theirs(**request.param)
    config = config_of(lumina, model)
    made = Lumina(config).eval()
    made.load_state_dict(load_all(source(Lumina, model.state_dict(), lumina.diffusers_table(config), config)))
    return model, made


def inputs(cfg, grid=(4, 6), dtype=torch.float32):
    """A picture that is no square, texts of several lengths."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, cfg.in_channels, *(n * cfg.patch_size for n in grid), generator=g).to(dtype)
    text, mask = torch.randn(3, 7, cfg.text_dim, generator=g).to(dtype), torch.arange(7)[None] < torch.tensor([[7], [1], [4]])
    return x, {"text": text, "mask": mask}


def run_theirs(live, x, t, cond, base=None, **scaling):
    head = live.config.hidden_size // live.config.num_attention_heads
    table = get_2d_rotary_pos_embed_lumina(head, 16, 16, **scaling)
    kwargs = {} if base is None else {"base_sequence_length": base}
    return live(x, t, cond["text"], cond["mask"].int(), table, kwargs).sample


T = torch.tensor([0.0, 0.37, 1.0])


@torch.no_grad()
def test_output(pair):
    live, ours = pair
    x, cond = inputs(ours.config)
    assert relative(ours(x, T, **cond), run_theirs(live, x, T, cond)) <= 1e-5


@torch.no_grad()
def test_output_in_bf16(pair):
    live, ours = (torch.nn.Module.to(m, torch.bfloat16) for m in pair)
    x, cond = inputs(ours.config, dtype=torch.bfloat16)
    assert relative(ours(x, T, **cond), run_theirs(live, x, T, cond)) <= 2e-2


@torch.no_grad()
@pytest.mark.parametrize("t", [0.29, 0.3, 0.8])
def test_larger_pictures_as_diffusers_pipeline_makes_them(pair, t):
    """Time-aware positions of scale sqrt(area ratio), and proportional attention."""
    live, ours = pair
    side = ours.config.grid[0]
    x, cond = inputs(ours.config, (2 * side, side))
    scale, times = math.sqrt(2), torch.full((3,), t)
    scaling = {"linear_factor": scale} if t < 0.3 else {"ntk_factor": scale}
    want = run_theirs(live, x, times, cond, base=side**2, **scaling)
    larger = ours.extrapolating(rule="switch", watershed=0.3, proportional=True)
    assert relative(larger(x, times, **cond), want) <= 1e-5
    assert relative(ours(x, times, **cond), want) > 5e-5


def test_round_trips_are_bit_exact(pair):
    """diffusers -> ours -> released -> ours -> diffusers; and the configuration comes back."""
    live, ours = pair
    config, weights = ours.config, live.state_dict()
    official = lumina.official_table(config)
    released = official.export(ours.state_dict())
    assert lumina.is_official(released)
    again = lumina.diffusers_table(config).export(load_all(source(Lumina, released, official, config)))
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[k], v) for k, v in weights.items())
    values = lumina.config_to_diffusers(config)
    assert lumina.config_from_diffusers(values) == config
    rebuilt = LuminaNextDiT2DModel(**{k: v for k, v in values.items() if not k.startswith("_")})
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in weights.items()}


def shapes_under(links, ours):
    """Their shapes, from ours; each of several copies counts."""
    return [(n, s) for k, link in links.items() for n, s in zip(link.theirs, link.rule.shapes(ours[k], len(link.theirs)))]


@pytest.mark.parametrize("name", Lumina.sizes)
def test_published_networks_are_known_by_their_shapes(name):
    """Each of the four layouts, and the arguments of its class; two blocks will do."""
    config = Lumina.config_class(**{**Lumina.sizes[name], "depth": 2})
    with torch.device("meta"):
        ours = {n: tuple(v.shape) for n, v in Lumina(config).state_dict().items()}
    links = lumina.official_table(config).links()
    assert links.keys() == ours.keys()
    assert lumina.config_from_official(dict(shapes_under(links, ours)), Hints()) == config
    assert lumina.constructor_of(config).to_ours(lumina.ours_of(config)) == config
    system = lumina.system_of("flow", config)
    assert (system.startswith("next") or system == "lumina-next") == (config.variant == "next")


def test_diffusers_stores_queries_twice():
    """Of Lumina-Next-2B 639 tensors and 1,754,898,976 numbers."""
    config = Lumina.config_class(**Lumina.sizes["Lumina-Next-2B-GQA"])
    with torch.device("meta"):
        ours = {n: tuple(v.shape) for n, v in Lumina(config).state_dict().items()}
    stored = shapes_under(lumina.diffusers_table(config).links(), ours)
    assert (len(stored), sum(math.prod(s) for _, s in stored)) == (639, 1_754_898_976)


@pytest.mark.parametrize("change", [*CHANGES, "differing"])
def test_tables_are_strict(change):
    model = theirs(**SMALL)
    config, name = config_of(lumina, model), "layers.1.attn2.to_q.weight"
    weights = damaged(model.state_dict(), name, change)
    with pytest.raises(WeightsError, match=name):
        load_all(source(Lumina, weights, lumina.diffusers_table(config), config))


def test_scaled_positions_come_back(pair):
    how = {"rule": "time_aware", "scale": 2.0, "proportional": True}
    config = pair[1].extrapolating(**how).config.model_copy(update={"rope_ntk": 1.5})
    assert lumina.config_from_diffusers(json.loads(json.dumps(lumina.config_to_diffusers(config)))) == config
    assert lumina.constructor_of(config).to_ours(lumina.ours_of(config)) == config
    assert lumina.differences(config, "diffusers")
    assert not lumina.differences(pair[1].config, "diffusers")


def test_what_another_layout_cannot_be_is_refused():
    flag, classes = (Lumina.config_class(**Lumina.sizes[name]) for name in ("Lumina-T2I-5B", "Next-DiT-2B"))
    for config, message in ((flag, "no Flag-DiT told by text"), (classes, "no Next-DiT told by class labels")):
        with pytest.raises(DitkitError, match=message):
            lumina.config_to_diffusers(config)
    clip = Lumina.config_class(input_size=(4, 8, 8), dim=96, num_heads=4, num_kv_heads=None)
    with pytest.raises(DitkitError, match="no clip"):
        lumina.official_table(clip)
    with pytest.raises(DitkitError, match=r"num_layer.*num_layers"):
        lumina.config_from_diffusers({"num_layer": 7})
    with pytest.raises(DitkitError, match="scaling_factor"):
        lumina.config_from_diffusers({"scaling_factor": 2.0})


# folders and files


def pipeline():
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4)
    return LuminaPipeline(theirs(**SMALL), FlowMatchEulerDiscreteScheduler(shift=2.0), draw_parameters(vae), None, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole pipeline as diffusers saves it, at 8 x 8 latent pixels."""
    folder = tmp_path_factory.mktemp("lumina") / "pipe"
    pipeline().save_pretrained(folder)
    return folder


def test_a_folder_opens_and_verifies_and_comes_back(made, tmp_path):
    config = open_any(made).config
    assert config.backbone.name == "lumina"
    assert config.process.config == {"network_time": "sit", "discard_half": True, "shift": 2.0, "num_train_steps": 1000}
    assert config.sampling.guidance == {"scale": 4.0, "channels": 3}
    found = verify(made, record=False)
    assert found.errors["float32"] <= 1e-5
    assert found.errors["bfloat16"] <= 2e-2
    convert(made, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.safetensors", "official")
    convert(tmp_path / "b.safetensors", tmp_path / "c", "diffusers")
    want, got = load_file(made / "transformer" / WEIGHTS), load_file(tmp_path / "c" / WEIGHTS)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], v) for k, v in want.items())
    LuminaNextDiT2DModel.from_pretrained(tmp_path / "c")


@torch.no_grad()
def test_sampling_is_that_of_diffusers_pipeline(made):
    """From the folder to pixels, guided on three of four channels by a negative prompt, on prompts encoded elsewhere."""
    g = torch.Generator().manual_seed(3)
    text, mask = torch.randn(2, 1, 5, 10, generator=g), torch.arange(5)[None, None] < torch.tensor([[[3]], [[5]]])
    live = pipeline()
    live.set_progress_bar_config(disable=True)
    told = dict(prompt_embeds=text[0], prompt_attention_mask=mask[0].int())
    negative = dict(negative_prompt_embeds=text[1], negative_prompt_attention_mask=mask[1].int())
    size = dict(height=64, width=64, num_inference_steps=4, output_type="pt", latents=noise.normal([7], 0, "start", (4, 8, 8)))
    want = live(**told, **negative, **size, guidance_scale=3.0).images
    pipe, prompts = Pipeline.from_pretrained(made, device="cpu"), [Text(s, m) for s, m in zip(text, mask)]
    options = dict(solver="euler", solver_options={"spacing": "twice"}, num_inference_steps=4, seed=7, progress=False)
    got = pipe(prompt_embeds=prompts[0], negative_prompt_embeds=prompts[1], guidance_scale=3.0, **options)
    assert ((want > 0) & (want < 1)).float().mean() > 0.5, "most pixels are no clipped ones"
    assert relative(got.x, 2 * want - 1) <= 1e-5


@pytest.mark.parametrize("variant", ["flag", "next"])
@pytest.mark.parametrize("told", [{"text_dim": None, "num_classes": 5}, {}], ids=["classes", "text"])
def test_a_released_file_becomes_a_bundle_and_back(tmp_path, variant, told):
    ours = Lumina._small(variant=variant, **told)
    released = lumina.official_table(ours.config).export(ours.state_dict())
    save_file(released, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "b", hints=Hints(num_heads=4, input_size=(8, 12)))
    opened = open_any(tmp_path / "b")
    assert opened.config.backbone.config == ours.config.to_dict()
    assert json.loads((tmp_path / "b" / "config.json").read_text())["process"]["config"]["network_time"] == "sit"
    convert(tmp_path / "b", tmp_path / "y.safetensors", "official")
    again = load_file(tmp_path / "y.safetensors")
    assert again.keys() == released.keys()
    assert all(torch.equal(again[k], v) for k, v in released.items())
    assert open_any(tmp_path / "y.safetensors").config.backbone.config == ours.config.to_dict()  # no hints


@torch.no_grad()
def test_a_lora_of_diffusers(made, tmp_path):
    """On one half of a joined projection, and on one of three others; the text's keys are then made in every step."""
    base = load_model(open_any(made), torch.float32, torch.device("cpu"))[0]
    x, t, cond = base.example()
    weights = load_file(made / "transformer" / WEIGHTS)
    for module in ("layers.0.attn1.to_v", "layers.1.attn2.to_k", "layers.1.feed_forward.linear_3", "layers.0.norm1.linear"):
        out, fan_in = weights[f"{module}.weight"].shape
        a, b = torch.randn(2, fan_in), torch.randn(out, 2)
        save_file({f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}, tmp_path / "l.safetensors")
        changed = {**weights, f"{module}.weight": weights[f"{module}.weight"] + b @ a}
        want = Lumina(base.config).eval()
        want.load_state_dict(load_all(source(Lumina, changed, lumina.diffusers_table(base.config), base.config)))
        got = with_methods(base, load_lora(tmp_path / "l.safetensors", base).lora)
        assert relative(got(x, t, **cond), want(x, t, **cond)) <= 1e-5
