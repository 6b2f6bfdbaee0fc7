"""Pipeline folders, released files and LoRAs of SD3 and FLUX: opened, converted every way bit-exactly, verified, live against diffusers."""

import copy
import json
import shutil

import pytest
import torch
from golden import relative
from safetensors.torch import load_file, save_file

from ditkit.backbones.dit import draw_parameters
from ditkit.conditioning import Text
from ditkit.core.errors import ConfigError, DitkitError, WeightsError
from ditkit.core.view import with_methods
from ditkit.diffusion import noise
from ditkit.interop.convert import convert, open_any
from ditkit.interop.families import family
from ditkit.interop.hints import Hints
from ditkit.interop.lora import load_lora
from ditkit.interop.tables import Renamed
from ditkit.interop.verify import quiet_imports, verify
from ditkit.loading import load_model
from ditkit.pipeline import Pipeline

with quiet_imports():
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from diffusers.utils import logging as diffusers_logging

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
pytestmark = pytest.mark.parity
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZE = Hints(input_size=(8, 8))
SHARED = dict(attention_head_dim=12, num_attention_heads=2, joint_attention_dim=10, pooled_projection_dim=6)


def pipeline(name):
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.1, scaling_factor=1.5)
    none = dict(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    if name == "mmdit":
        model = SD3Transformer2DModel(
            **SHARED,
            num_layers=2,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            caption_projection_dim=24,
            pos_embed_max_size=6,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return StableDiffusion3Pipeline(draw_parameters(model), scheduler, vae, **none, text_encoder_3=None, tokenizer_3=None)
    rope = (4, 4, 4)
    model = FluxTransformer2DModel(**SHARED, num_layers=1, num_single_layers=2, in_channels=16, axes_dims_rope=rope, guidance_embeds=True)
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae, transformer=draw_parameters(model), **none
    )


@pytest.fixture(scope="module", params=["mmdit", "flux"])
def made(request, tmp_path_factory):
    """Its name, and a whole pipeline as diffusers saves it, at 8 x 8 latent pixels."""
    folder = tmp_path_factory.mktemp(request.param) / "pipe"
    pipeline(request.param).save_pretrained(folder)
    if request.param == "flux":  # nothing in its folder says the trained size
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "_ditkit": {"input_size": [8, 8]}}))
    return request.param, folder


def test_a_pipeline_folder_opens_with_its_process(made):
    name, folder = made
    opened = open_any(folder)
    config = opened.config
    assert (config.backbone.name, config.process.name, config.sampling.solver) == (name, "flow", "euler")
    settings = config.process.config
    if name == "mmdit":
        assert settings == {"network_time": "thousand", "shift": 3.0, "num_train_steps": 1000}
        assert config.sampling.options == {"spacing": "linspace"}
    else:
        assert (settings["network_time"], settings["resolution"]) == ("unit", "exponential")
    assert config.data.shape == (3, 8, 8)
    assert config.codec.name == "vae"


def test_there_and_back_by_every_layout(made, tmp_path):
    """diffusers -> ditkit -> released -> ditkit -> diffusers: the same bits, and the same configuration."""
    _, folder = made
    convert(folder, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.safetensors", "official")
    convert(tmp_path / "b.safetensors", tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "d", "diffusers")
    want, got = load_file(folder / "transformer" / WEIGHTS), load_file(tmp_path / "d" / WEIGHTS)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], v) for k, v in want.items())
    first, last = (json.loads((path / "config.json").read_text()) for path in (folder / "transformer", tmp_path / "d"))
    assert all(first[k] == v or first[k] is None for k, v in last.items() if not k.startswith("_"))


def test_verify_compares_with_diffusers(made):
    _, folder = made
    found = verify(folder, record=False)
    assert found.errors["float32"] <= 1e-5
    assert found.errors["bfloat16"] <= 2e-2


def test_a_released_file_may_hold_a_whole_pipeline(made, tmp_path):
    """SD3's has its names behind "model.diffusion_model.", beside those of VAE and text encoders."""
    name, folder = made
    convert(folder, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.safetensors", "official")
    weights = load_file(tmp_path / "b.safetensors")
    more = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1), "text_encoders.clip_l.x": torch.zeros(1)}
    save_file({**{f"model.diffusion_model.{k}": v for k, v in weights.items()}, **more}, tmp_path / "c.safetensors")
    config = family(name).config_from_official({k: tuple(v.shape) for k, v in weights.items()}, SIZE)
    opened = open_any(tmp_path / "c.safetensors", SIZE)
    assert opened.config.backbone.config == config.to_dict()
    mine, theirs = opened.tensors, open_any(folder).tensors
    assert all(torch.equal(mine.read(n), theirs.read(n)) for n in theirs.shapes)
    del weights[min(weights)]
    save_file({f"model.diffusion_model.{k}": v for k, v in weights.items()}, tmp_path / "d.safetensors")
    with pytest.raises(WeightsError):
        open_any(tmp_path / "d.safetensors", SIZE)


def test_other_schedulers_are_refused(made, tmp_path):
    _, folder = made
    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text())
    for change, message in (({"use_karras_sigmas": True}, "use_karras_sigmas"), ({"_class_name": "DDIMScheduler"}, "FlowMatchEuler")):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(ConfigError, match=message):
            open_any(tmp_path / "x")


MODULES = {  # diffusers' name: of a fused projection, of a swapped one, of a plain one
    "mmdit": ("transformer_blocks.0.attn.to_k", "transformer_blocks.1.norm1_context.linear", "transformer_blocks.0.attn2.to_out.0"),
    "flux": ("single_transformer_blocks.1.proj_mlp", "transformer_blocks.0.attn.add_v_proj", "single_transformer_blocks.0.proj_out"),
}
RELEASED = {"mmdit": "joint_blocks_1_x_block_attn_qkv", "flux": "single_blocks_0_linear1"}  # as kohya writes it


def adapted(theirs, name, a, b, folder, path):
    """The network of diffusers' weights with B A added to one module."""
    weights = copy.copy(theirs)
    weights[f"{name}.weight"] = weights[f"{name}.weight"] + b @ a
    save_file(weights, path)
    opened = open_any(folder)
    tables, model = family(opened.config.backbone.name), load_model(opened, torch.float32, torch.device("cpu"))[0]
    expect = {n: tuple(v.shape) for n, v in model.state_dict().items()}
    source = Renamed(
        "x", {n: tuple(v.shape) for n, v in weights.items()}, weights.__getitem__, tables.diffusers_table(model.config), expect
    )
    model.load_state_dict({n: source.read(n) for n in expect})
    return model


@torch.no_grad()
def test_loras_of_diffusers_and_kohya(made, tmp_path):
    name, folder = made
    base = load_model(open_any(folder), torch.float32, torch.device("cpu"))[0]
    x, t, cond = base.example()
    theirs = load_file(folder / "transformer" / WEIGHTS)
    for module in MODULES[name]:
        out, fan_in = theirs[f"{module}.weight"].shape
        a, b = torch.randn(2, fan_in), torch.randn(out, 2)
        path = tmp_path / "lora.safetensors"
        save_file({f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}, path)
        want = adapted(theirs, module, a, b, folder, tmp_path / "w.safetensors")(x, t, **cond)
        assert relative(with_methods(base, load_lora(path, base).lora)(x, t, **cond), want) <= 1e-5
        assert relative(base(x, t, **cond), want) > 1e-4
    released = {n.replace(".", "_"): v for n, v in family(name).official_table(base.config).export(base.state_dict()).items()}
    out, fan_in = released[f"{RELEASED[name]}_weight"].shape
    pair = {"lora_down.weight": torch.randn(2, fan_in), "lora_up.weight": torch.randn(out, 2), "alpha": torch.tensor(2.0)}
    save_file({f"lora_unet_{RELEASED[name]}.{k}": v for k, v in pair.items()}, tmp_path / "kohya.safetensors")
    assert load_lora(tmp_path / "kohya.safetensors", base).report.applied == 1


@pytest.mark.parametrize("other", ["lora_unet_blocks_0_attn_qkv", "lora_unet_joint_blocks_7_x_block_attn_qkv"])
def test_a_lora_for_another_family_is_refused(made, tmp_path, other):
    _, folder = made
    base = load_model(open_any(folder), torch.float32, torch.device("cpu"))[0]
    save_file({f"{other}.lora_down.weight": torch.zeros(1, 2), f"{other}.lora_up.weight": torch.zeros(2, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(DitkitError, match=other.removeprefix("lora_unet_")):
        load_lora(tmp_path / "x.safetensors", base)


@torch.no_grad()
def test_sampling_is_that_of_diffusers_pipeline(made):
    """From the folder to pixels, guided (SD3: by a negative prompt, FLUX: by the scale it is told), on prompts encoded elsewhere."""
    name, folder = made
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    g = torch.Generator().manual_seed(3)
    text, pooled = torch.randn(2, 1, 5, 10, generator=g), torch.randn(2, 1, 6, generator=g)
    prompts = [Text(s, torch.ones(1, 5, dtype=torch.bool), p) for s, p in zip(text, pooled)]
    latents = noise.normal([7], 0, "start", (4, 8, 8))
    options = dict(num_inference_steps=4, height=8, width=8, output_type="pt", prompt_embeds=text[0], pooled_prompt_embeds=pooled[0])
    live = pipeline(name)
    live.set_progress_bar_config(disable=True)
    if name == "mmdit":
        negative = dict(negative_prompt_embeds=text[1], negative_pooled_prompt_embeds=pooled[1])
        want = live(**options, **negative, guidance_scale=5.0, latents=latents).images
        got = pipe(prompt_embeds=prompts[0], negative_prompt_embeds=prompts[1], guidance_scale=5.0, **TWICE)
    else:
        want = live(**options, guidance_scale=3.5, latents=live._pack_latents(latents, *latents.shape)).images
        got = pipe(prompt_embeds=prompts[0], seed=7, num_inference_steps=4, progress=False)
    assert ((want > 0) & (want < 1)).float().mean() > 0.5, "most pixels are no clipped ones"
    assert relative(got.x, 2 * want - 1) <= 1e-5


TWICE = dict(solver="euler", solver_options={"spacing": "twice"}, seed=7, num_inference_steps=4, progress=False)
