"""A ditkit network in the place of a diffusers pipeline's transformer: the pipeline's own pictures, and our methods at the right steps."""

from __future__ import annotations

import threading

import pytest
import torch
from golden import relative
from layouts import config_of, source

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.backbones.flux import Flux
from ditkit.backbones.hunyuan import Hunyuan
from ditkit.backbones.lumina import Lumina
from ditkit.backbones.mmdit import MMDiT
from ditkit.backbones.pixart import PixArt
from ditkit.core.backbone import Backbone
from ditkit.core.errors import DitkitError
from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.solvers import SOLVERS
from ditkit.interop import as_diffusers
from ditkit.interop.families import family
from ditkit.interop.tables import load_all
from ditkit.interop.verify import quiet_imports
from ditkit.methods import FORA, HarmoniCa, Modulation

with quiet_imports():
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DiTPipeline,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        HeunDiscreteScheduler,
        HunyuanDiTPipeline,
        LuminaPipeline,
        PixArtAlphaPipeline,
        StableDiffusion3Pipeline,
    )
    from diffusers.models import transformers as networks
    from diffusers.utils import logging as diffusers_logging

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:__array__ implementation")]  # diffusers with numpy 2

CLASSES = {"dit": DiT, "pixart": PixArt, "mmdit": MMDiT, "flux": Flux, "lumina": Lumina, "hunyuan": Hunyuan}
SMALL = {
    "dit": dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, num_embeds_ada_norm=1000, out_channels=8),
    "pixart": dict(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, sample_size=128, caption_channels=10, cross_attention_dim=24
    ),
    "mmdit": dict(
        **dict(
            sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, pos_embed_max_size=12
        ),
        **dict(caption_projection_dim=16, joint_attention_dim=10, pooled_projection_dim=6, dual_attention_layers=(0,), qk_norm="rms_norm"),
    ),
    "flux": dict(
        **dict(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=10),
        **dict(pooled_projection_dim=6, guidance_embeds=True, axes_dims_rope=(4, 6, 6)),
    ),
    "lumina": dict(
        **dict(sample_size=16, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2, multiple_of=16, cross_attention_dim=10),
    ),
    "hunyuan": dict(
        **dict(num_attention_heads=2, attention_head_dim=16, hidden_size=32, in_channels=4, patch_size=2, sample_size=16, num_layers=4),
        **dict(mlp_ratio=2.0, cross_attention_dim=6, cross_attention_dim_t5=8, pooled_projection_dim=5, text_len=77, text_len_t5=256),
    ),
}


def live(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = draw_parameters(getattr(networks, family(name).CLASS)(**SMALL[name])).eval()
    if name == "dit":  # every block has a copy of the embedders
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    if name == "lumina":  # it has two copies of queries, which the released network has not
        for layer in model.layers:
            layer.attn2.to_q.load_state_dict(layer.attn1.to_q.state_dict())
            layer.attn2.norm_q.load_state_dict(layer.attn1.norm_q.state_dict())
    return model


def ours_of(name: str, model: torch.nn.Module) -> Backbone:
    config = config_of(family(name), model)
    made = CLASSES[name](config).eval()
    made.load_state_dict(load_all(source(CLASSES[name], model.state_dict(), family(name).diffusers_table(config), config)))
    return made


def vae() -> torch.nn.Module:
    """Of no more than a factor of 8."""
    torch.manual_seed(1)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    return AutoencoderKL(
        block_out_channels=(4,) * 4, down_block_types=down, up_block_types=up, norm_num_groups=4, layers_per_block=1, latent_channels=4
    ).eval()


def make(name: str, transformer: torch.nn.Module | None) -> DiTPipeline:
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {
        "dit": lambda: DiTPipeline(transformer, vae(), DDIMScheduler(clip_sample=False)),
        "pixart": lambda: PixArtAlphaPipeline(None, None, vae(), transformer, DPMSolverMultistepScheduler()),
        "mmdit": lambda: StableDiffusion3Pipeline(transformer, flow, vae(), *[None] * 6),
        "flux": lambda: FluxPipeline(flow, vae(), *[None] * 4, transformer),
        "lumina": lambda: LuminaPipeline(transformer, flow, vae(), None, None),
        "hunyuan": lambda: HunyuanDiTPipeline(
            vae(), None, None, transformer, DDIMScheduler(clip_sample=False), None, None, requires_safety_checker=False
        ),
    }
    with quiet_imports():
        pipe = parts[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def told(name: str, batch: int = 2) -> dict:
    """Prompts that are encoded already, and negative ones."""
    g = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=g)

    def mask(length: int) -> torch.Tensor:
        return (torch.arange(length)[None] < torch.randint(1, length + 1, (batch, 1), generator=g)).long()

    found: dict = {}
    for sign in ("", "negative_"):
        if name == "dit":
            found = {"class_labels": [3, 7][:batch]}
        elif name in ("mmdit", "flux"):
            found |= {f"{sign}prompt_embeds": draw(5, 10), f"{sign}pooled_prompt_embeds": draw(6)}
        elif name == "hunyuan":
            found |= {f"{sign}prompt_embeds": draw(77, 6), f"{sign}prompt_attention_mask": mask(77)}
            found |= {f"{sign}prompt_embeds_2": draw(256, 8), f"{sign}prompt_attention_mask_2": mask(256)}
        else:
            found |= {f"{sign}prompt_embeds": draw(5, 10), f"{sign}prompt_attention_mask": mask(5)}
    more = {
        "pixart": dict(negative_prompt=None, height=64, width=96, use_resolution_binning=False, output_type="latent"),
        "mmdit": dict(height=64, width=96, output_type="latent"),
        "flux": dict(height=64, width=96, true_cfg_scale=2.0, output_type="latent"),
        "lumina": dict(output_type="latent"),
        "hunyuan": dict(height=64, width=96, use_resolution_binning=False, output_type="latent"),
    }
    return {**found, **more.get(name, {"output_type": "pt"})}


def sample(pipe, name: str, steps: int = 4, scale: float = 3.0, **more) -> torch.Tensor:
    """Latents; of DiT, whose pipeline gives none, pictures."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return pipe(**{**told(name), "num_inference_steps": steps, "guidance_scale": scale, "generator": generator, **more})[0]


@pytest.fixture(scope="module", params=SMALL)
def pair(request):
    """A name, the transformer of diffusers, and ours with its weights."""
    theirs = live(request.param)
    return request.param, theirs, ours_of(request.param, theirs)


@pytest.fixture(scope="module")
def sd3():
    """MM-DiT with FORA: of 4 steps the third reuses, of 5 the second and fourth."""
    return with_methods(ours_of("mmdit", live("mmdit")), FORA(interval=2))


def stood_in(name: str, model: Backbone, theirs: torch.nn.Module | None = None):
    """``theirs``: the pipeline is made with it first, and reads the trained size of it (Lumina's takes 1024 pixels otherwise)."""
    pipe = make(name, theirs)
    pipe.transformer = as_diffusers(model, pipe)
    return pipe


@pytest.mark.parametrize("scale", [3.0, 1.0], ids=["guided", "not guided"])
def test_the_pipeline_samples_what_it_samples_with_its_own_transformer(pair, scale):
    name, theirs, ours = pair
    pipe = make(name, theirs)
    options = {"scale": scale, **({"true_cfg_scale": scale} if name == "flux" else {})}
    want = sample(pipe, name, **options)
    pipe.transformer = as_diffusers(ours, pipe)
    got = sample(pipe, name, **options)
    assert want.isfinite().all()
    assert want.std() > 0.1
    assert relative(got, want) <= 1e-5


# our methods, at the right steps


class Recorder(Method):
    """Notes where in which run each forward is."""

    name = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, str, int]] = []

    def predict(self, nxt, x, run):
        self.seen.append((run.step, run.num_steps, run.guidance_pass, run.evaluation))
        return nxt(x)


def test_steps_and_passes_are_known(pair):
    """Guided, and then with another number of steps and not guided."""
    name, theirs, ours = pair
    recorder = Recorder()
    pipe = stood_in(name, with_methods(ours, recorder), theirs)
    for steps, scale in ((3, 3.0), (5, 1.0)):
        recorder.seen.clear()
        sample(pipe, name, steps, scale, **({"true_cfg_scale": scale} if name == "flux" else {}))
        passes = ["cond"] if scale == 1 else ["cond", "null"] if name == "flux" else ["cond+null"]
        assert recorder.seen == [(step, steps, one, 0) for step in range(steps) for one in passes]


def test_two_evaluations_of_a_step_and_times_rounded_to_bf16():
    recorder = Recorder()
    pipe = stood_in("pixart", with_methods(ours_of("pixart", live("pixart")), recorder))
    pipe.scheduler = HeunDiscreteScheduler()
    sample(pipe, "pixart", 3)
    assert recorder.seen == [(step, 3, "cond+null", k) for step, k in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]]
    recorder.seen.clear()
    pipe = stood_in("flux", with_methods(torch.nn.Module.to(ours_of("flux", live("flux")), torch.bfloat16), recorder))
    half = {k: v.bfloat16() for k, v in told("flux").items() if isinstance(v, torch.Tensor)}
    sample(pipe, "flux", 40, **half, true_cfg_scale=1.0)
    assert [step for step, *_ in recorder.seen] == list(range(40))


OWN = {  # process, solver, guidance
    "dit": (Gaussian(variance="learned"), "ddim", {}),
    "pixart": (Gaussian(variance="learned"), "dpm++2m", {}),
    "mmdit": (Flow(network_time="thousand"), "euler", {}),
    "flux": (Flow(network_time="unit"), "euler", {"scale": 2.0}),
    "lumina": (Flow(network_time="sit", discard_half=True), "euler", {"channels": 3}),
    "hunyuan": (Gaussian(variance="learned"), "ddim", {}),
}


def own_inputs(name: str) -> tuple[dict, dict]:
    """The prompts of ``told``, and the negative ones, as our networks take them."""
    given = told(name)
    if name == "dit":
        y = torch.tensor(given["class_labels"])
        return {"y": y}, {"y": torch.full_like(y, 1000)}
    names = {"prompt_embeds": "text", "prompt_attention_mask": "mask", "pooled_prompt_embeds": "pooled"}
    names |= {"prompt_embeds_2": "t5", "prompt_attention_mask_2": "t5_mask"}
    more = {"flux": {"guidance": torch.tensor([3.0, 3.0])}, "pixart": {"size": torch.tensor([[64.0, 96.0]] * 2)}}
    more["hunyuan"] = {"size": torch.tensor([[1024.0, 1024, 64, 96, 0, 0]] * 2)}
    both = [{ours: given[sign + theirs] for theirs, ours in names.items() if sign + theirs in given} for sign in ("", "negative_")]
    return tuple({**part, **more.get(name, {})} for part in both)  # type: ignore[return-value]


@torch.no_grad()
def own(name: str, model: Backbone, x: torch.Tensor, scheduler, steps: int) -> torch.Tensor:
    """The same latents by our solver, with two forwards a step."""
    process, solver, guidance = OWN[name]
    cond, null = own_inputs(name)
    times = scheduler.sigmas if isinstance(process, Flow) else torch.cat([(scheduler.timesteps + 1).double() / 1000, torch.zeros(1)])
    run = Run(model, steps)
    denoise = guided(model, process, Guidance(**{"scale": 3.0, **guidance}), run, cond, null)
    return SOLVERS[solver](denoise, x, process, run, lambda step, purpose: x, times=times)


def test_with_fora_the_trajectory_is_that_of_our_own_sampler(pair):
    name, theirs, ours = pair
    model, steps = with_methods(ours, FORA(interval=3)), 6
    pipe = stood_in(name, model, theirs)
    x = torch.randn(
        2, 4, *((8, 12) if name not in ("dit", "lumina") else (ours.config.input_size)), generator=torch.Generator().manual_seed(5)
    )
    start = {} if name == "dit" else {"latents": FluxPipeline._pack_latents(x, *x.shape) if name == "flux" else x}
    got = sample(pipe, name, steps, **start)
    want = own(name, model, x, pipe.scheduler, steps)
    base = own(name, ours, x, pipe.scheduler, steps)
    assert relative(want, base) > 1e-4
    if name == "dit":  # its pipeline has no latents to give
        want = (pipe.vae.decode(want / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    if name == "flux":
        want = FluxPipeline._pack_latents(want, *want.shape)
    assert relative(got, want) <= 1e-5
    assert pipe.transformer.report()["fora"]["hits"] == 3  # steps 1, 3 and 4


@pytest.mark.parametrize("name", ["dit", "mmdit", "flux", "lumina", "hunyuan"])
def test_modulation_is_made_ahead_at_the_times_of_the_pipeline(name):
    theirs = live(name)
    ours = ours_of(name, theirs)
    want = sample(stood_in(name, ours, theirs), name)
    pipe = stood_in(name, with_methods(ours, Modulation()), theirs)
    assert relative(sample(pipe, name), want) <= 1e-5
    assert pipe.transformer.report()["modulation"]["hits"] == 3


def test_larger_pictures_of_lumina():
    """Its pipeline stretches rotary positions by time, and sharpens attention."""
    theirs = live("lumina")
    pipe = make("lumina", theirs)
    options = dict(height=192, width=192, scaling_watershed=0.5)
    want = sample(pipe, "lumina", **options)
    pipe.transformer = as_diffusers(ours_of("lumina", theirs), pipe)
    assert relative(sample(pipe, "lumina", **options), want) <= 1e-5


# calls never mix


def test_interleaved_calls_of_pipelines_over_one_network(sd3):
    """One pipeline runs whole calls of another within its own, with other step counts."""
    first, second = (stood_in("mmdit", sd3) for _ in range(2))
    alone = {n: sample(first, "mmdit", n) for n in (4, 5)}
    inner = []

    def between(pipe, step, t, tensors):
        inner.append(sample(second, "mmdit", 5 if step % 2 else 4))
        return tensors

    assert torch.equal(sample(first, "mmdit", 5, callback_on_step_end=between), alone[5])
    assert all(torch.equal(x, alone[5 if step % 2 else 4]) for step, x in enumerate(inner))


def test_threads(sd3):
    pipes = {n: stood_in("mmdit", sd3) for n in (4, 5)}
    alone, found = {n: sample(pipe, "mmdit", n) for n, pipe in pipes.items()}, {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: sample(pipes[n], "mmdit", n)})) for n in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], alone[n]) for n in pipes)


def test_pipelines_made_of_the_same_parts_share_one(sd3):
    first = stood_in("mmdit", sd3)
    second = StableDiffusion3Pipeline(**first.components)
    second.set_progress_bar_config(disable=True)
    want = [sample(first, "mmdit", n) for n in (4, 5)]
    assert torch.equal(sample(second, "mmdit", 5), want[1])
    assert torch.equal(sample(first, "mmdit", 4), want[0])


def test_after_an_aborted_call(sd3):
    """Whichever step it ended at, and with as many steps as the next."""
    pipe = stood_in("mmdit", sd3)
    want = sample(pipe, "mmdit", 4)

    def stop(pipe, step, t, tensors):
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        sample(pipe, "mmdit", 4, callback_on_step_end=stop)
    assert torch.equal(sample(pipe, "mmdit", 4), want)
    with pytest.raises(DitkitError, match="text is"):  # within the network
        sample(pipe, "mmdit", 4, prompt_embeds=torch.zeros(2, 5, 11), negative_prompt_embeds=torch.zeros(2, 5, 11))
    assert torch.equal(sample(pipe, "mmdit", 4), want)


def test_guidance_that_ends_half_way(sd3):
    """As diffusers' own callbacks do it: the batch is halved. What follows is computed anew once, and reused then."""
    recorder = Recorder()
    pipe = stood_in("mmdit", with_methods(sd3, recorder))

    def halve(pipe, step, t, tensors):
        if step == 2:
            pipe._guidance_scale = 1.0
            tensors = {
                **tensors,
                "prompt_embeds": tensors["prompt_embeds"][-2:],
                "pooled_prompt_embeds": tensors["pooled_prompt_embeds"][-2:],
            }
        return tensors

    wanted = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    found = sample(pipe, "mmdit", 6, callback_on_step_end=halve, callback_on_step_end_tensor_inputs=wanted)
    assert found.isfinite().all()
    assert [name for _, _, name, _ in recorder.seen] == ["cond+null"] * 3 + ["cond"] * 3


def test_a_pipeline_that_has_the_stand_in_of_another_is_told_so(sd3):
    first, second = stood_in("mmdit", sd3), make("mmdit", None)
    second.transformer = first.transformer
    sample(first, "mmdit", 4)
    with pytest.raises(DitkitError, match=r"another than its pipeline.*stand-in of its own"):
        sample(second, "mmdit", 5)
    dit = with_methods(ours_of("dit", live("dit")), FORA())
    first, second = stood_in("dit", dit), make("dit", None)  # its scheduler counts no steps
    second.transformer = first.transformer
    with pytest.raises(DitkitError, match=r"was not told how many steps.*stand-in of its own"):
        sample(second, "dit")


# what cannot be


def test_another_family_or_size_is_refused():
    dit, flux = DiT.tiny(), Flux.tiny()
    with pytest.raises(DitkitError, match=r"flux in a DiTPipeline; allowed: FluxPipeline"):
        as_diffusers(flux, make("dit", None))
    with pytest.raises(DitkitError, match=r"flux in the place of DiTTransformer2DModel"):
        as_diffusers(flux, make("dit", live("dit")))
    with pytest.raises(DitkitError, match=r"in_channels is 3; allowed: 4"):
        as_diffusers(dit, make("dit", live("dit")))
    with pytest.raises(DitkitError, match=r"flux in the place of DiTTransformer2DModel"):
        as_diffusers(flux, stood_in("dit", ours_of("dit", live("dit"))))


def test_a_learned_schedule_for_another_number_of_steps_is_refused():
    view = with_methods(ours_of("dit", live("dit")), HarmoniCa(num_inference_steps=6))
    pipe = stood_in("dit", view)
    with pytest.raises(DitkitError, match=r"4 steps with harmonica; allowed: num_inference_steps=6.*train a router"):
        sample(pipe, "dit", 4)
    assert sample(pipe, "dit", 6).isfinite().all()


def test_inputs_that_the_network_has_not_are_refused(sd3):
    pipe = stood_in("mmdit", sd3)
    with pytest.raises(DitkitError, match="gives its transformer joint_attention_kwargs"):
        sample(pipe, "mmdit", joint_attention_kwargs={"scale": 0.5})
    with pytest.raises(DitkitError, match="gives its transformer skip_layers"):
        sample(pipe, "mmdit", skip_guidance_layers=[0], skip_layer_guidance_start=-1.0)


def test_a_pipeline_may_be_moved_to_where_it_is(sd3):
    pipe = stood_in("mmdit", sd3)
    pipe.to("cpu")
    assert (pipe.transformer.dtype, pipe.transformer.device.type) == (torch.float32, "cpu")
    with pytest.raises(DitkitError, match="a view shares its parameters"):
        pipe.to(torch.float64)
