"""Released checkpoints: read without running anything in them, converted with the defaults of their own sampler, bit-exact back."""

import argparse
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.bundle import BundleConfig, DataCard, Part, write_bundle
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.interop import dit
from ditkit.interop.checkpoints import read_checkpoint
from ditkit.interop.convert import convert
from ditkit.interop.hints import Hints
from ditkit.interop.released import open_released
from ditkit.loading import shapes_of
from ditkit.pipeline import Pipeline


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return draw_parameters(DiT(input_size=(6, 6), in_channels=4, dim=24, depth=2, num_heads=3, patch_size=3, num_classes=5)).eval()


@pytest.fixture(scope="module")
def released(model):
    return dit.official_table(model.config).export(model.state_dict())


HINTS = Hints(num_heads=3)


def test_a_training_checkpoint_with_its_arguments(model, released, tmp_path):
    """The released training script stores an argparse.Namespace beside the weights; by default the EMA is taken."""
    raw = {name: value + 1 if name.endswith("bias") else value for name, value in released.items()}
    torch.save({"model": raw, "ema": released, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-XL/2")}, tmp_path / "0050000.pt")
    for which, want in (("ema", released), ("model", raw)):
        got = read_checkpoint(tmp_path / "0050000.pt", which)
        assert all(torch.equal(got[k], v) for k, v in want.items())
    convert(tmp_path / "0050000.pt", tmp_path / "b", hints=HINTS)
    again = Pipeline.from_pretrained(tmp_path / "b", device="cpu")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in again.model.state_dict().items())


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Payload()}, "bad.pt")
    with pytest.raises(WeightsError, match=r"bad\.pt cannot be read safely"):
        read_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "cannot be read safely"),
        (b"PK\x03\x04 cut off", "cannot be read safely"),
        ([1, 2], "no table of tensors"),
        ({"a": 1}, "no table of tensors"),
        ({"model": {"a": torch.ones(1)}}, "holds no 'ema' weights; allowed: model"),
        ({"a": torch.tensor([float("nan")])}, "'a' is not finite"),
    ],
)
def test_other_files_are_refused(tmp_path, content, text):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=text):
        read_checkpoint(path)


def test_other_models_are_refused(tmp_path):
    save_file({"unet.conv_in.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"no released checkpoint of dit, sit, .*: its first keys are \['unet"):
        open_released(tmp_path / "x.safetensors")


def test_what_the_file_does_not_say_is_asked_for(released, tmp_path):
    save_file(released, tmp_path / "x.safetensors")
    with pytest.raises(DitkitError, match="2 blocks of width 24 are no published size; next: give --num-heads"):
        open_released(tmp_path / "x.safetensors")


def test_published_sizes_need_no_hint():
    for name, values in DiT.sizes.items():
        model_config = DiT.config_class(**values)
        shapes = shapes_of(Part(name="dit", config=model_config.to_dict()))
        table = dit.official_table(model_config)
        theirs = {"pos_embed": (1, (32 // values["patch_size"]) ** 2, values["dim"])}
        for ours, link in table.links().items():
            theirs.update(zip(link.theirs, link.rule.shapes(shapes[ours], len(link.theirs))))
        assert dit.config_from_official(theirs, Hints()) == model_config, name


def test_the_sampler_defaults_are_those_of_the_release(released, tmp_path):
    save_file(released, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "dit", hints=HINTS)
    sampling = Pipeline.from_pretrained(tmp_path / "dit", device="cpu").config.sampling
    assert (sampling.solver, sampling.num_inference_steps) == ("ddpm", 250)
    assert sampling.guidance == {"scale": 4.0, "channels": 3}


def test_sit_runs_in_its_own_time(model, released, tmp_path):
    """Its network is told 1 - t and says a velocity along it, with a half that means nothing."""
    save_file(released, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "sit", hints=Hints(num_heads=3, system="sit"))
    pipe = Pipeline.from_pretrained(tmp_path / "sit", device="cpu")
    assert pipe.config.sampling.guidance == {"scale": 4.0, "channels": 3}
    x, y, t = torch.randn(2, 4, 6, 6), torch.tensor([0, 3]), torch.tensor([0.25, 0.75], dtype=torch.float64)
    with torch.no_grad():
        output = model(x, (1 - t).float(), y=y)
        said = pipe.process.predict(pipe.model(x, pipe.process.network_time(t), y=y), x, t).velocity
    assert torch.equal(said, -output[:, :4])
    assert pipe([1], num_inference_steps=3, solver="euler", progress=False).x.isfinite().all()


@pytest.mark.parametrize("system", ["dit", "sit"])
def test_official_to_ditkit_to_official_is_bit_exact_and_keeps_what_the_layout_cannot_say(released, tmp_path, system):
    save_file(released, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "b", hints=Hints(num_heads=3, system=system))
    convert(tmp_path / "b", tmp_path / "y.safetensors", "official")
    again = load_file(tmp_path / "y.safetensors")
    assert again.keys() == released.keys()
    assert all(torch.equal(again[k], v) for k, v in released.items())
    opened = open_released(tmp_path / "y.safetensors")  # no hints
    assert opened.config.backbone.config["num_heads"] == 3
    assert opened.config.process.name == {"dit": "gaussian", "sit": "interpolant"}[system]
    with pytest.raises(WeightsError, match="a new file that ends in"):
        convert(tmp_path / "b", tmp_path / "y.safetensors", "official")


def test_half_precision_stays_half(released, tmp_path):
    save_file({k: v.half() for k, v in released.items()}, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "b", hints=HINTS)
    convert(tmp_path / "b", tmp_path / "y.safetensors", "official")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "float16"
    first, again = load_file(tmp_path / "x.safetensors"), load_file(tmp_path / "y.safetensors")
    assert all(torch.equal(first[k], v) and v.dtype == torch.float16 for k, v in again.items())


def test_what_a_layout_cannot_hold_is_refused(tmp_path):
    with torch.no_grad():
        model = DiT.tiny()  # 8 x 12
    config = BundleConfig(
        backbone=Part(name="dit", config=model.config.to_dict()), process=Part(name="gaussian"), data=DataCard(name="x", shape=(3, 8, 12))
    )
    write_bundle(tmp_path / "b", config, model.state_dict())
    for to, out in (("diffusers", "d"), ("official", "o.safetensors")):
        with pytest.raises(DitkitError, match=r"input_size \(8, 12\)"):
            convert(tmp_path / "b", tmp_path / out, to)
        assert not (tmp_path / out).exists()
