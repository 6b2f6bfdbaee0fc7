"""``ditkit convert`` and ``ditkit verify`` on folders that diffusers made, live: whole pipelines, round trips, swapped tensors."""

import json
import shutil

import numpy as np
import pytest
import torch
from golden import relative
from safetensors.torch import load_file, save_file

from ditkit.backbones.dit import draw_parameters
from ditkit.cli.main import main
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.diffusion import noise
from ditkit.interop.convert import convert
from ditkit.interop.hints import Hints
from ditkit.interop.verify import RECORD, quiet_imports, verify
from ditkit.pipeline import Pipeline

with quiet_imports():
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
    from diffusers.pipelines.dit import pipeline_dit
    from diffusers.utils import logging as diffusers_logging

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
pytestmark = pytest.mark.parity
NAMES = {i: f"thing {i}, or object {i}" for i in range(1000)}  # diffusers' pipeline takes label 1000 for none, whatever the model
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole pipeline as diffusers saves it: transformer, VAE, scheduler, class names."""
    torch.manual_seed(0)
    transformer = draw_parameters(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            sample_size=4,
            num_embeds_ada_norm=1000,
            in_channels=4,
            out_channels=8,
        )
    )
    transformer.transformer_blocks[1].norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("diffusers") / "pipe"
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    index = folder / "model_index.json"  # diffusers reads class names there, and does not write them
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": NAMES}))
    return folder


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def swap(path, a, b):
    weights = load_file(path)
    weights[a], weights[b] = weights[b].clone(), weights[a].clone()
    save_file(weights, path, {"format": "pt"})


def test_a_folder_made_by_diffusers_passes(made, tmp_path, capsys):
    folder = copy_of(made, tmp_path)
    assert main(["verify", str(folder)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "float32" in line
    assert "bfloat16" in line
    assert "against diffusers" in line
    found = verify(folder, record=False)
    assert found.errors["float32"] <= 1e-5
    assert found.errors["bfloat16"] <= 2e-2
    assert "record" in found.compared[0]


def test_a_swapped_tensor_is_named(made, tmp_path, capsys):
    folder = copy_of(made, tmp_path)
    verify(folder)
    query, key = (f"transformer_blocks.1.attn1.to_{x}.weight" for x in "qk")
    swap(folder / "transformer" / WEIGHTS, query, key)
    assert main(["verify", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"'{key}'" in error
    assert f"it now holds what '{query}' held" in error


def test_a_swapped_tensor_is_named_by_a_reference(made, tmp_path):
    folder = copy_of(made, tmp_path)
    swap(folder / "transformer" / WEIGHTS, "transformer_blocks.0.norm1.linear.weight", "transformer_blocks.1.norm1.linear.weight")
    with pytest.raises(
        WeightsError, match=r"'blocks\.0\.parts\.img\.ada\.weight'.*not what it was in .*pipe: it now holds what 'blocks\.1"
    ):
        verify(folder, reference=made)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.0.norm1.linear.weight"),  # another shape
        ("transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight", None),  # a copy that differs
    ],
)
def test_a_tensor_that_cannot_be_is_named_at_once(made, tmp_path, a, b):
    folder = copy_of(made, tmp_path)
    weights = load_file(folder / "transformer" / WEIGHTS)
    weights[a] = weights[b].clone() if b else weights[a] * 2
    save_file(weights, folder / "transformer" / WEIGHTS, {"format": "pt"})
    with pytest.raises(WeightsError, match=f"'{a}'"):
        verify(folder)


@pytest.mark.parametrize("to", ["ditkit", "diffusers", "official"])
def test_a_tensor_changed_after_our_export_is_named(made, tmp_path, to):
    out = tmp_path / ("out.safetensors" if to == "official" else "out")
    convert(made, out, to)
    verify(out, record=False)
    path = {"ditkit": out / "model.safetensors", "diffusers": out / "transformer" / WEIGHTS, "official": out}[to]
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    last = {
        "ditkit": "time.fc2.weight",
        "diffusers": "transformer_blocks.1.norm1.linear.weight",
        "official": "y_embedder.embedding_table.weight",
    }
    with pytest.raises(WeightsError, match=f"'{last[to]}' is not what it was when the file was written"):
        verify(out)


def test_round_trips_are_exact(made, tmp_path):
    """diffusers -> ditkit -> diffusers -> official -> diffusers: transformer, VAE, scheduler and class names."""
    convert(made, tmp_path / "bundle")
    convert(tmp_path / "bundle", tmp_path / "back", "diffusers")
    first, back = (load_file(folder / "transformer" / WEIGHTS) for folder in (made, tmp_path / "back"))
    assert first.keys() == back.keys()
    assert all(torch.equal(first[k], v) for k, v in back.items())
    first, back = (load_file(folder / "vae" / WEIGHTS) for folder in (made, tmp_path / "back"))
    assert first.keys() == back.keys()
    assert all(torch.equal(first[k], v) for k, v in back.items())
    with quiet_imports():
        pipe = DiTPipeline.from_pretrained(tmp_path / "back")
    for part in ("transformer", "scheduler"):
        want = json.loads(next((made / part).glob("*config.json")).read_text())
        assert {k: getattr(pipe, part).config[k] for k in want if not k.startswith("_")} == {
            k: v for k, v in want.items() if not k.startswith("_")
        }
    assert pipe.labels == DiTPipeline.from_pretrained(made).labels
    convert(tmp_path / "back", tmp_path / "official.safetensors", "official")
    convert(tmp_path / "official.safetensors", tmp_path / "again", "diffusers")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(again[k], v) for k, v in load_file(made / "transformer" / WEIGHTS).items())
    convert(tmp_path / "official.safetensors", tmp_path / "official2.safetensors", "official")
    assert (tmp_path / "official.safetensors").read_bytes() == (tmp_path / "official2.safetensors").read_bytes()


def test_a_diffusers_folder_samples_what_diffusers_samples(made, tmp_path, monkeypatch):
    """The whole way: labels, noise, guided DDIM steps, VAE; also from the bundle that it is converted to."""
    convert(made, tmp_path / "bundle")
    with quiet_imports():
        live = DiTPipeline.from_pretrained(made)
    live.set_progress_bar_config(disable=True)
    start = noise.normal([5, 6], 0, "start", (4, 4, 4))
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *args, **kwargs: start)
    want = live(class_labels=[2, 1], guidance_scale=1.5, num_inference_steps=10, output_type="np").images
    for folder in (made, tmp_path / "bundle"):
        pipe = Pipeline.from_pretrained(folder, device="cpu")
        assert pipe.config.data.labels == tuple(NAMES.values())
        got = pipe([2, 1], guidance_scale=1.5, num_inference_steps=10, seed=5, progress=False).x
        assert relative((got / 2 + 0.5).permute(0, 2, 3, 1), torch.from_numpy(np.stack(want))) <= 1e-4


def test_scheduler_settings_are_kept_or_refused(made, tmp_path):
    folder = copy_of(made, tmp_path)
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    assert pipe.config.sampling.solver == "ddpm"
    assert pipe.config.sampling.options == {"spacing": "trailing", "clip": True}
    assert pipe.process.config.schedule == "squaredcos_cap_v2"
    DDIMScheduler(rescale_betas_zero_snr=True).save_pretrained(folder / "scheduler")
    with pytest.raises(DitkitError, match="rescale_betas_zero_snr"):
        Pipeline.from_pretrained(folder)


def test_pickled_weights_are_refused_but_converted(made, tmp_path):
    folder = copy_of(made, tmp_path)
    path = folder / "transformer" / WEIGHTS
    torch.save(load_file(path), folder / "transformer" / "diffusion_pytorch_model.bin")
    path.unlink()
    with pytest.raises(WeightsError, match=r"\.bin is pickle; .*ditkit convert"):
        Pipeline.from_pretrained(folder)
    convert(folder, tmp_path / "bundle")
    assert verify(tmp_path / "bundle", reference=made, record=False).compared[-1] == "reference"


def test_sharded_weights(made, tmp_path):
    with quiet_imports():
        DiTTransformer2DModel.from_pretrained(made, subfolder="transformer").save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert verify(tmp_path / "shards", reference=made, record=False).errors["float32"] <= 1e-5
    index = tmp_path / "shards" / f"{WEIGHTS}.index.json"
    values = json.loads(index.read_text())
    values["weight_map"].pop("proj_out_1.bias")
    index.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=r"proj_out_1\.bias"):
        verify(tmp_path / "shards")


def test_weights_converted_from_released_ones_can_be_run_as_released(made, tmp_path):
    convert(made, tmp_path / "bundle", hints=Hints(as_released=True))
    pipe = Pipeline.from_pretrained(tmp_path / "bundle", device="cpu")
    assert (pipe.model.config.time_freq_shift, pipe.model.config.mlp_norm_eps) == (0, 1e-6)
    convert(tmp_path / "bundle", tmp_path / "back", "diffusers")
    assert Pipeline.from_pretrained(tmp_path / "back", device="cpu").model.config == pipe.model.config
    assert verify(tmp_path / "bundle", record=False).errors["float32"] <= 1e-5


def test_the_record_is_beside_the_weights(made, tmp_path):
    folder = copy_of(made, tmp_path)
    verify(folder, record=False)
    assert not (folder / RECORD).exists()
    verify(folder)
    assert (folder / RECORD).exists()
