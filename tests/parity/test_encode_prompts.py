"""Prompts through several text encoders: the states that diffusers' pipelines make, and from a prompt to their pictures."""

import json

import pytest
import torch
from golden import relative

import tiny_text
from ditkit.conditioning import encoder_from
from ditkit.diffusion import noise
from ditkit.pipeline import Pipeline

pytestmark = pytest.mark.parity
PROMPTS = ["a red heart on a blue circle", "blue"]
NEGATIVE = ["a circle", ""]
KINDS = {"sd3": tiny_text.sd3, "flux": tiny_text.flux, "hunyuan": tiny_text.hunyuan}


def saved(live, folder):
    live.save_pretrained(folder)
    if type(live).__name__ == "FluxPipeline":  # nothing in its folder says the trained size
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "_ditkit": {"input_size": [8, 8]}}))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """Its name, diffusers' pipeline, and the folder that it saved."""
    live = tiny_text.made(KINDS[request.param])
    return request.param, live, saved(live, tmp_path_factory.mktemp(request.param) / "pipe")


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
