"""The pipeline: from labels to pictures, each remade by what it carries, and one clear error for each value that does not fit."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ditkit.backbones.dit import DiT
from ditkit.bundle import BundleConfig, DataCard, Part, Sampling
from ditkit.codecs.base import Codec
from ditkit.core.backbone import count_graphs
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.method import Method
from ditkit.diffusion.guidance import Guidance
from ditkit.methods.efficiency.fora import FORA
from ditkit.nn.embeddings import TimeEmbed, timestep_code
from ditkit.output import Output, grid, read_record, to_images
from ditkit.pipeline import Pipeline
from ditkit.request import expand, expand_labels


def config_for(model, shape=(3, 8, 12), **parts):
    return BundleConfig(
        backbone=Part(name="dit", config=model.config.to_dict()),
        process=parts.pop("process", Part(name="gaussian", config={"prediction": "v"})),  # bounded without training
        data=DataCard(name="noise", shape=shape, **parts.pop("data", {})),
        sampling=Sampling(**{"num_inference_steps": 4, **parts}),
    )


@pytest.fixture(scope="module")
def pipe():
    model = DiT.tiny()
    return Pipeline(model, config_for(model))


@pytest.fixture
def fresh():
    model = DiT.tiny()
    return Pipeline(model, config_for(model))


def quiet(pipe, labels, **options):
    return pipe(labels, progress=False, **options)


# what comes out


def test_output(pipe):
    out = quiet(pipe, [1, 4], num_images=4, seed=7, guidance_scale=2.0)
    assert out.x.shape == (4, 3, 8, 12)
    assert out.x.abs().max() <= 1
    assert out.seeds == [7, 8, 9, 10]
    assert [image.size for image in out.images] == [(12, 8)] * 4
    assert out.record["class_labels"] == [1, 1, 4, 4]
    assert set(out.report) == {"seconds", "batches", "methods"}
    json.dumps(out.record, allow_nan=False)


def test_pixels_are_rounded_to_the_nearest_level():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]).view(1, 1, 1, 6)
    assert np.asarray(to_images(x)[0]).tolist() == [[0, 0, 128, 191, 255, 255]]


def test_pictures_that_are_no_pictures_show_their_channels_side_by_side():
    images = to_images(torch.zeros(2, 4, 5, 3))
    assert [i.size for i in images] == [(12, 5), (12, 5)]
    assert grid(images * 3).size == (38, 11)


def test_labels_are_expanded_in_order():
    """A19: p0, p0, p1, p1, for every conditioning tensor."""
    assert expand_labels([3, 7], 6, 10) == [3, 3, 3, 7, 7, 7]
    assert expand_labels(None, 5, 3) == [0, 1, 2, 0, 1]
    assert expand_labels(2, None, 3) == [2]
    cond = {"text": torch.arange(6.0).view(2, 3, 1), "mask": torch.tensor([[1, 1, 1], [1, 0, 0]]), "pooled": torch.tensor([[0.0], [1.0]])}
    wide = expand(cond, 2)
    assert wide["mask"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert wide["pooled"].flatten().tolist() == [0, 0, 1, 1]
    assert torch.equal(wide["text"][2], cond["text"][1])


def test_picture_i_of_label_p_equals_the_run_of_that_label_alone(pipe):
    """A19, second half."""
    both = quiet(pipe, [1, 4], num_images=4, guidance_scale=2.0, seed=3).x
    alone = quiet(pipe, [4], num_images=2, guidance_scale=2.0, seed=5).x
    assert (both[2:] - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_a_picture_does_not_depend_on_its_batch(pipe, solver):
    """A21: 10 steps of DDPM, seeds 0 to 3, as 4, 2 + 2 and 1 + 1 + 1 + 1."""
    options = dict(num_images=4, solver=solver, num_inference_steps=10, guidance_scale=2.0)
    whole, pairs, singles = (quiet(pipe, [2], batch_size=n, **options).x for n in (4, 2, 1))
    assert (whole - pairs).abs().max() <= 1e-5
    assert (whole - singles).abs().max() <= 1e-5
    assert not torch.allclose(whole[0], whole[1])


def test_a_file_remakes_exactly_its_picture(pipe, tmp_path):
    """A21: the seed in the metadata makes that picture alone."""
    view = pipe.with_methods(FORA(interval=2))
    out = quiet(
        view,
        [0, 3],
        num_images=4,
        seed=11,
        solver="ddim",
        solver_options={"eta": 0.5},
        guidance=Guidance(scale=1.5, channels=2, interval=(0.2, 0.9)),
    )
    paths = out.save_each(tmp_path / "each")
    record = read_record(paths[2])
    assert (record["class_label"], record["seed"]) == (3, 13)
    again = view.remake(paths[2])
    assert (again.x - out.x[2:3]).abs().max() <= 1e-5
    with Image.open(paths[2]) as stored:
        assert np.array_equal(np.asarray(again.images[0]), np.asarray(stored))
    with pytest.raises(DitkitError, match="methods"):
        pipe.remake(paths[2])
    with pytest.raises(DitkitError, match="carries no record"):
        read_record(__file__)


def test_the_record_holds_what_was_used(pipe):
    record = quiet(pipe.with_methods(FORA(interval=3)), [1], guidance_scale=3.0).picture_record(0)
    assert record["methods"] == [{"name": "fora", "label": "fora", "config": {"interval": 3}}]
    assert record["guidance"]["scale"] == 3.0
    assert (record["solver"], record["num_inference_steps"], record["size"]) == ("ddim", 4, [8, 12])
    assert set(record["versions"]) == {"ditkit", "torch"}


def test_grid_file(pipe, tmp_path):
    out = quiet(pipe, [0, 1], seed=2)
    out.save(tmp_path / "a" / "grid.png", zoom=3)
    with Image.open(tmp_path / "a" / "grid.png") as stored:
        assert stored.size == ((2 * 12 + 1) * 3, 8 * 3)
    assert read_record(tmp_path / "a" / "grid.png")["seeds"] == [2, 3]


# guidance


def test_meaning_of_the_scale(pipe):
    """A02: 0 is unconditional, 1 conditional, and "none" is 1."""
    null = {1: quiet(pipe, [1], guidance_scale=0).x, 4: quiet(pipe, [4], guidance_scale=0).x}
    assert torch.equal(null[1], null[4])
    conditional = quiet(pipe, [1], guidance_scale=1).x
    assert torch.equal(quiet(pipe, [1], guidance="none").x, conditional)
    assert not torch.allclose(conditional, null[1])
    with pytest.raises(DitkitError, match="'none' with guidance_scale 2"):
        quiet(pipe, [1], guidance="none", guidance_scale=2)


def test_the_second_pass_is_skipped_at_scale_one_exactly(pipe):
    calls = []
    handle = pipe.model.register_forward_hook(lambda *a: calls.append(1))
    for scale, count in [(1, 4), (1.001, 8), (0, 8)]:
        calls.clear()
        quiet(pipe, [1], guidance_scale=scale)
        assert len(calls) == count
    handle.remove()


def test_the_released_rule_is_a_named_preset(pipe):
    assert quiet(pipe, [1], guidance_scale=2, guidance="first-three").record["guidance"]["channels"] == 3
    assert quiet(pipe, [1], guidance_scale=2).record["guidance"]["channels"] == "all"
    with pytest.raises(DitkitError, match="guidance is 'al'.*did you mean 'all'"):
        quiet(pipe, [1], guidance="al")


# errors


@pytest.mark.parametrize(
    ("labels", "options", "text"),
    [
        ([5], {}, "class label is 5; allowed: whole numbers from 0 to 4"),
        ([-1], {}, "class label is -1"),
        ([1.5], {}, "class label is 1.5"),
        ([True], {}, "class label is True"),
        ([], {}, "0 images for 0 class labels"),
        ([1, 2], {"num_images": 3}, "3 images for 2 class labels"),
        ([1], {"num_images": 0}, "num_images is 0"),
        ([1], {"num_inference_steps": 0}, "num_inference_steps is 0; allowed: whole numbers from 1 to 1000"),
        ([1], {"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ([1], {"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ([1], {"seed": -1}, "seed is -1"),
        ([1], {"seed": 2**63}, "seed is"),
        ([1], {"solver": "dim"}, "no solver 'dim'.*did you mean 'ddim'"),
        ([1], {"solver": "euler"}, "euler"),
        ([1], {"solver_options": {"etta": 1.0}}, "etta.*did you mean 'eta'"),
        ([1], {"batch_size": 0}, "batch_size is 0"),
        ([1], {"guidance_scale": float("nan")}, "scale"),
        ([1], {"height": 9}, "height is 9; allowed: multiples of 2; next: use 8 or 10"),
        ([1], {"width": 1}, "width is 1; allowed: multiples of 2; next: use 2"),
    ],
)
def test_one_clear_error(pipe, labels, options, text):
    with pytest.raises(DitkitError, match=text):
        quiet(pipe, labels, **options)


class Eightfold(Codec):
    """Latents repeated eight times, a stand-in for a VAE; ``spoilt`` decodes one number to NaN."""

    name, factor, in_channels, channels = "eightfold", 8, 3, 3
    spoilt = False

    def decode_raw(self, z):
        x = z.repeat_interleave(8, 2).repeat_interleave(8, 3)
        if self.spoilt:
            x[0, 0, 0, 0] = float("nan")
        return x


def latent_pipe():
    model = DiT.tiny()
    return Pipeline(model, config_for(model, (3, 64, 96)), codec=Eightfold())


def test_the_multiple_is_that_of_codec_and_patch(caplog):
    """A07: VAE factor 8, patch 2, 40 x 24: 16, and the neighbours 32 or 48."""
    pipe = latent_pipe()
    with pytest.raises(DitkitError, match="height is 40; allowed: multiples of 16; next: use 32 or 48"):
        quiet(pipe, [1], height=40, width=24)
    for side in range(16, 81):
        if side % 16:
            with pytest.raises(DitkitError, match=f"width is {side}"):
                quiet(pipe, [1], height=16, width=side)
        else:
            out = quiet(pipe, [1], height=16, width=side, num_inference_steps=1)
            assert out.images[0].size == (side, 16)


def test_a_size_off_the_training_size_is_said(fresh, caplog):
    with caplog.at_level(logging.WARNING, "ditkit"):
        quiet(fresh, [1])
        assert not caplog.messages
        quiet(fresh, [1], height=4)
    assert "trained on 8 x 12; it is asked for 4 x 12" in caplog.text


# numbers that are not finite (A06)


def test_step_and_module_are_named(fresh):
    fresh.model.blocks[1].parts["img"].mlp.fc1.weight.data[0, 0] = float("inf")
    with pytest.raises(DitkitError, match=r"step 1 of 4: the output of blocks\.1\.parts\.img\.mlp\.fc1 is not finite"):
        quiet(fresh, [1])


def test_the_step_at_which_it_happens_is_named(fresh):
    class Late(Method):
        name = "late"

        def plan(self, at):
            return at.step == 2 and at.block == 3

        def branch(self, nxt, h, site):
            y = nxt(h)
            return {n: u * float("nan") for n, u in y.items()} if site.mode else y

    with pytest.raises(DitkitError, match=r"step 3 of 4: the output of blocks\.3\.parts\.img\.mlp\.fc1 is not finite"):
        quiet(fresh.with_methods(Late()), [1])


def test_a_single_pixel_is_enough():
    pipe = latent_pipe()
    pipe.codec.spoilt = True
    with pytest.raises(DitkitError, match=r"codec\.eightfold is not finite \(1 values\)"):
        quiet(pipe, [1])
    with pytest.raises(DitkitError, match="NaN or infinity"):
        to_images(torch.tensor([0.0, float("nan")]).view(1, 1, 1, 2))


# runs share nothing (A23)


def test_each_call_is_as_if_alone(pipe):
    view = pipe.with_methods(FORA(interval=3))

    def guided():
        return quiet(view, [1, 2], guidance_scale=2.0)

    want, plain = guided(), quiet(view, [1, 2], guidance_scale=1.0)
    again = guided()
    assert torch.equal(again.x, want.x)
    assert again.report["methods"] == want.report["methods"]
    assert torch.equal(quiet(view, [1, 2], guidance_scale=1.0).x, plain.x)
    count = []
    handle = view.model.register_forward_pre_hook(
        lambda *a: count.append(1) or (_ for _ in ()).throw(RuntimeError) if len(count) == 3 else count.append(1)
    )
    with pytest.raises(RuntimeError):
        guided()
    handle.remove()
    assert torch.equal(guided().x, want.x)
    assert torch.equal(quiet(pipe, [1, 2]).x, quiet(Pipeline(pipe.model, pipe.config), [1, 2]).x)


# time in fp32 (A05)


def test_time_is_embedded_in_fp32_whatever_the_model():
    torch.manual_seed(0)
    embed = TimeEmbed(16)
    t = torch.tensor([937.0, 936.0, 998.39])
    code = timestep_code(t)
    assert code.dtype == torch.float32
    assert not torch.equal(code[0], code[1])
    assert torch.equal(timestep_code(t.double()).float(), code)
    half = TimeEmbed(16).bfloat16()
    half.load_state_dict(embed.bfloat16().state_dict())
    seen = []
    half.fc1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    out = half(t)
    assert torch.equal(seen[0], code.bfloat16())
    assert not torch.equal(out[0], out[1])
    # rounding the time itself would have made them equal, and 998.39 to 1000
    assert torch.equal(t.bfloat16().float(), torch.tensor([936.0, 936.0, 1000.0]))


def test_a_bf16_model_is_told_the_exact_time(pipe):
    model = DiT.tiny()
    half = Pipeline(model.bfloat16(), config_for(model))
    times = []
    handle = half.model.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1]))
    out = quiet(half, [1], num_inference_steps=7)
    handle.remove()
    assert out.x.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in times)
    assert [int(t[0]) for t in times] == half.process.network_time(half.process.times(7)[:-1]).int().tolist()


# compiled


def test_compiled_computes_the_same_says_how_many_graphs_and_names_a_module(fresh, caplog):
    with caplog.at_level(logging.INFO, "ditkit"):
        fast = fresh.with_methods(FORA(interval=2)).compile("block", backend="eager")
    assert f"{count_graphs(fast.model, 4)} graphs for 4 steps" in caplog.text
    assert torch.equal(quiet(fast, [1]).x, quiet(fresh.with_methods(FORA(interval=2)), [1]).x)
    fresh.model.final.proj.bias.data[0] = float("nan")
    with pytest.raises(DitkitError, match=r"step 1 of 4: the output of final\.proj is not finite"):
        quiet(fast, [1])


# parts must fit


def test_parts_that_do_not_fit_are_refused():
    model = DiT.tiny()
    for change, text in [
        (dict(shape=(1, 8, 12)), "in_channels is 3; allowed: 1"),
        (dict(shape=(3, 8)), r"data\.shape is \(3, 8\)"),
        (dict(process=Part(name="gaussian", config={"variance": "fixed_large"})), "out_channels is 6; allowed: 3"),
        (dict(data={"labels": ("a", "b")}), r"data\.labels has 2 names; allowed: 5"),
        (dict(solver="dim"), "no solver 'dim'"),
        (dict(solver="euler"), "euler"),
        (dict(options={"eta2": 1}), "eta2"),
        (dict(num_inference_steps=2000), "2000"),
    ]:
        with pytest.raises((ConfigError, DitkitError), match=text):
            Pipeline(model, config_for(model, **change))


def test_output_is_a_dataclass(pipe):
    out = quiet(pipe, 1)
    assert isinstance(out, Output)
    assert out.record["bundle"] == ""
