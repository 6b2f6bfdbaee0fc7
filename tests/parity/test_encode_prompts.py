"""Prompts through several text encoders: the states that diffusers' pipelines make, and from a prompt to their pictures."""

import shutil

import pytest
import tiny_text
import torch
from golden import relative

from ditkit.cli import sample
from ditkit.conditioning import encoder_from
from ditkit.core.errors import DitkitError
from ditkit.diffusion import noise
from ditkit.diffusion.guidance import Guidance
from ditkit.output import read_record
from ditkit.pipeline import Pipeline

pytestmark = pytest.mark.parity
PROMPTS = ["a red heart on a blue circle", "blue"]
NEGATIVE = ["a circle", ""]
KINDS = {"sd3": tiny_text.sd3, "flux": tiny_text.flux, "hunyuan": tiny_text.hunyuan}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """Its name, diffusers' pipeline, and the folder that it saved."""
    live = tiny_text.made(KINDS[request.param])
    return request.param, live, tiny_text.saved(live, tmp_path_factory.mktemp(request.param) / "pipe")


def encoded(name, live, prompts):
    """Of diffusers' pipeline, by our names."""
    if name == "sd3":
        states, _, pooled, _ = live.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return {"states": states, "pooled": pooled}
    if name == "flux":
        states, pooled, _ = live.encode_prompt(prompts)
        return {"states": states, "pooled": pooled}
    (states, _, mask, _), (t5, _, t5_mask, _) = (
        live.encode_prompt(prompts, do_classifier_free_guidance=False, text_encoder_index=i) for i in (0, 1)
    )
    return {"states": states, "mask": mask.bool(), "t5": t5, "t5_mask": t5_mask.bool()}


@torch.no_grad()
def test_states_are_those_of_the_pipeline(pair):
    name, live, folder = pair
    text = Pipeline.from_pretrained(folder, device="cpu").encoder
    assert text.name == name
    got, want = text.encode([*PROMPTS, ""]), encoded(name, live, [*PROMPTS, ""])
    for key, value in want.items():
        mine = getattr(got, key)
        assert mine.shape == value.shape
        if key == "states" and name == "hunyuan":  # a learned vector stands there instead
            mine, value = mine * got.mask[..., None], value * got.mask[..., None]
        assert (mine.float() - value.float()).abs().max() <= 1e-5, key
    pooled = None if got.pooled is None else got.pooled.shape[-1]
    assert (text.length, text.dim, text.pooled_dim) == (*got.states.shape[1:], pooled)
    assert text.t5_shape == (None if got.t5 is None else tuple(got.t5.shape[1:]))


def pictures(name, live, prompts, negative, scale):
    """diffusers' pipeline, 4 steps, from the noise of the seeds 7, 8, ..; FLUX is guided by negative prompts at scale 2."""
    side, steps = (64 if name == "hunyuan" else 8), 4
    latents = noise.normal(range(7, 7 + len(prompts)), 0, "start", (4, 8, 8))
    call = dict(height=side, width=side, output_type="pt", num_inference_steps=steps, guidance_scale=scale, negative_prompt=negative)
    if name == "flux":
        call |= dict(true_cfg_scale=2.0) if negative else {}
        latents = live._pack_latents(latents, *latents.shape)
    if name == "hunyuan":
        call |= dict(use_resolution_binning=False, original_size=(64, 64))
    found = live(prompts, latents=latents, **call).images
    assert ((found > 0) & (found < 1)).float().mean() > 0.5, "most pixels are no clipped ones"
    return 2 * found - 1


@pytest.mark.parametrize("negative", [None, NEGATIVE], ids=["plain", "negative"])
def test_pictures_are_those_of_the_pipeline(pair, negative):
    """From a folder and a prompt to pixels; without a negative prompt SD3 and Hunyuan-DiT are led away from the empty one."""
    name, live, folder = pair
    want = pictures(name, live, PROMPTS, negative, 3.0)
    options = {"solver": "euler", "solver_options": {"spacing": "twice"}} if name == "sd3" else {}
    options |= {"true_cfg_scale": 2.0} if name == "flux" and negative else {}
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    got = pipe(prompt=PROMPTS, negative_prompt=negative, guidance_scale=3.0, seed=7, num_inference_steps=4, progress=False, **options).x
    assert (got - want).abs().max() <= 1e-4
    assert relative(got, want) <= 1e-4
    assert (got[0] - got[1]).abs().max() > 1e-2


@torch.no_grad()
def test_sd3_without_t5(tmp_path, caplog):
    """Zeros in its place, as diffusers has it, whether the index says so or the folder is gone; said once."""
    live = tiny_text.made(tiny_text.sd3, with_t5=False)
    tiny_text.saved(live, tmp_path / "a")
    tiny_text.saved(tiny_text.made(tiny_text.sd3), tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "text_encoder_3")
    states, _, pooled, _ = live.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    for folder in ("a", "b"):
        caplog.clear()
        text = Pipeline.from_pretrained(tmp_path / folder, device="cpu").encoder
        for _ in range(2):
            got = text.encode(PROMPTS)
            assert (got.states - states).abs().max() <= 1e-5
            assert (got.pooled - pooled).abs().max() <= 1e-5
        assert caplog.text.count("there is no T5 in") == 1


# FLUX: the scale that it is told


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    live = tiny_text.made(tiny_text.flux)
    return live, tiny_text.saved(live, tmp_path_factory.mktemp("dev") / "pipe")


def test_flux_is_told_guidance_scale(dev, tmp_path):
    """Unless told otherwise it is 3.5, FluxPipeline's; a picture remembers it."""
    live, folder = dev
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    options = dict(prompt=PROMPTS[:1], seed=7, num_inference_steps=4, progress=False)
    for scale in (1.5, 3.5):
        out = pipe(guidance_scale=scale, **options)
        assert (out.x - pictures("flux", live, PROMPTS[:1], None, scale)).abs().max() <= 1e-4
        assert (out.record["guidance"]["told"], out.record["guidance"]["scale"]) == (scale, 1.0)
    assert torch.equal(pipe(**options).x, out.x)
    again = pipe(guidance_scale=1.5, **options)
    assert torch.equal(pipe.remake(again.picture_record(0)).x, again.x)
    assert (again.x - out.x).abs().max() > 1e-3
    command = [str(folder), "--prompt", "a red heart", "--guidance-scale", "2", "--true-cfg-scale", "1.5", "--device", "cpu"]
    assert sample.main([*command, "--num-inference-steps", "2", "-o", str(tmp_path / "o.png")]) == 0
    told = read_record(tmp_path / "o.png")["guidance"]
    assert (told["told"], told["scale"]) == (2.0, 1.5)


def test_schnell_is_told_none(tmp_path, caplog):
    """Its guidance is classifier-free or nothing."""
    live = tiny_text.made(tiny_text.flux, guidance=False)
    pipe = Pipeline.from_pretrained(tiny_text.saved(live, tmp_path / "pipe"), device="cpu")
    assert pipe.encoder.config.max_length == 256
    pipe.encoder = encoder_from("flux", {"path": str(tmp_path / "pipe")})  # FluxPipeline's own length
    options = dict(seed=7, num_inference_steps=4, progress=False)
    assert (pipe(prompt=PROMPTS, **options).x - pictures("flux", live, PROMPTS, None, 3.0)).abs().max() <= 1e-4
    want = pictures("flux", live, PROMPTS, NEGATIVE, 3.0)
    for name in ("true_cfg_scale", "guidance_scale"):
        assert (pipe(prompt=PROMPTS, negative_prompt=NEGATIVE, **{name: 2.0}, **options).x - want).abs().max() <= 1e-4
    with pytest.raises(DitkitError, match="guidance_scale and true_cfg_scale are both given; allowed: one of them: flux is told no scale"):
        pipe(prompt="a", guidance_scale=2.0, true_cfg_scale=2.0)
    with pytest.raises(DitkitError, match=r"guidance.told is 2.0; allowed: None: flux has no input for it"):
        pipe(prompt="a", guidance=Guidance(told=2.0))
    assert "no effect" not in caplog.text
    pipe(prompt="a", negative_prompt="red", **options)
    pipe(prompt="a", guidance_scale=0.0, **options)
    assert "at guidance scale 1 negative prompts have no effect" in caplog.text
    assert "at guidance scale 0 prompts have no effect" in caplog.text
