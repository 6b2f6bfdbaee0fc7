"""Codecs: normalisation, strictness, parity of the VAE with diffusers called directly, and that the KL autoencoder learns."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ditkit.codecs import codec_from, load_codec
from ditkit.codecs.base import Posterior, save_codec
from ditkit.codecs.identity import Identity, IdentityConfig
from ditkit.codecs.kl import KL, KLConfig, fit
from ditkit.codecs.vae import VAE, VAEConfig
from ditkit.core.errors import ConfigError, DitkitError, WeightsError
from ditkit.core.files import read_tensors, write_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}


def save_tiny(folder, **changes):
    """A random AutoencoderKL, written by diffusers itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import AutoencoderKL
    torch.manual_seed(0)
    model = AutoencoderKL(**{**TINY, **changes}).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    return folder, save_tiny(folder, shift_factor=0.25, scaling_factor=1.5)


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny VAE that a test may damage."""
    for file in tiny[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def pictures(seed=0, size=16, batch=2):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_posterior_sample_is_mean_plus_std_times_eps():
    p = Posterior(torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 1, 1), 0.5))
    assert torch.equal(p.sample(torch.full((1, 2, 1, 1), -2.0)), torch.full((1, 2, 1, 1), 2.0))


def test_identity_is_the_identity_with_no_spread():
    codec, x = Identity(IdentityConfig(channels=3)), pictures()
    p = codec.encode(x)
    assert torch.equal(p.mean, x)
    assert p.std.shape == x.shape
    assert not p.std.any()
    assert torch.equal(codec.decode(p.mean), x)
    with pytest.raises(DitkitError, match=r"allowed: \(1, H, W\)"):
        Identity(IdentityConfig(channels=1)).encode(x)


def test_unknown_codec_and_unknown_key_are_refused():
    with pytest.raises(DitkitError, match="did you mean 'identity'"):
        codec_from("identitty")
    with pytest.raises(ConfigError, match="'chanels'.*did you mean 'channels'"):
        codec_from("kl", {"chanels": 4})


@torch.no_grad()
def test_vae_equals_diffusers_called_directly(tiny):
    folder, model = tiny
    codec, x = VAE(VAEConfig(path=str(folder))), pictures()
    eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    dist = model.encode(x).latent_dist
    want = ((dist.mean + dist.std * eps) - 0.25) * 1.5
    z = codec.encode(x).sample(eps)
    torch.testing.assert_close(z, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(codec.decode(z), model.decode(want / 1.5 + 0.25).sample, rtol=1e-6, atol=1e-6)
    assert (codec.factor, codec.channels, codec.latent_shape((3, 16, 24))) == (2, 4, (4, 8, 12))


@torch.no_grad()
def test_vae_normalises_each_channel_where_the_config_has_statistics(tmp_path):
    mean, std = (0.1, -0.2, 0.3, 0.0), (1.0, 2.0, 0.5, 4.0)
    model = save_tiny(tmp_path, latents_mean=mean, latents_std=std, scaling_factor=0.5)
    codec, x = VAE(VAEConfig(path=str(tmp_path))), pictures()
    m, s = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    z = codec.encode(x).mean
    torch.testing.assert_close(z, (model.encode(x).latent_dist.mean - m) * 0.5 / s, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codec.decode(z), model.decode(z * s / 0.5 + m).sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_vae_tiling_is_that_of_diffusers(tiny):
    folder, model = tiny
    x = pictures(size=40, batch=1)
    codec = VAE(VAEConfig(path=str(folder), tiling=True))
    whole = model.encode(x).latent_dist.mean
    model.enable_tiling()
    tiled = model.encode(x).latent_dist.mean
    model.disable_tiling()
    got = codec.encode(x).mean / 1.5 + 0.25
    torch.testing.assert_close(got, tiled, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, whole, atol=1e-4)


def test_vae_size_error_names_the_neighbours(tiny):
    with pytest.raises(DitkitError, match="a side has 17 pixels.*multiple of 2, such as 16 or 18"):
        VAE(VAEConfig(path=str(tiny[0]))).encode(torch.zeros(1, 3, 16, 17))


def test_vae_opens_without_reading_weights(copy):
    (copy / WEIGHTS).unlink()
    codec = VAE(VAEConfig(path=str(copy)))
    assert codec.latent_shape((3, 32, 32)) == (4, 16, 16)
    (copy / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(WeightsError, match=r"does not exist; there is diffusion_pytorch_model\.bin"):
        codec.encode(pictures())


def test_vae_is_found_inside_a_pipeline_folder(copy, tmp_path_factory):
    pipeline = tmp_path_factory.mktemp("pipeline")
    copy.rename(pipeline / "vae")
    assert VAE(VAEConfig(path=str(pipeline))).channels == 4
    with pytest.raises(DitkitError, match="holds no VAE"):
        VAE(VAEConfig(path=str(pipeline / "nowhere")))


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "nan", "cut"])
def test_vae_names_the_tensor_at_fault(copy, damage):
    name, file = "decoder.conv_in.weight", copy / WEIGHTS
    weights = read_tensors(file)
    if damage == "missing":
        del weights[name]
    elif damage == "extra":
        name = "decoder.conv_in.gain"
        weights[name] = torch.ones(1)
    elif damage == "shape":
        weights[name] = weights[name][:-1]
    if damage != "cut":
        write_tensors(file, weights)
    raw = bytearray(file.read_bytes())
    if damage == "nan":
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        at = 8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0]
        raw[at : at + 4] = np.float32("nan").tobytes()
    file.write_bytes(raw[:-5] if damage == "cut" else raw)
    with pytest.raises(WeightsError, match=WEIGHTS if damage == "cut" else name):
        VAE(VAEConfig(path=str(copy))).encode(pictures())


def test_vae_config_is_strict_unless_a_key_is_allowed_by_name(copy):
    config = json.loads((copy / "config.json").read_text())

    def write(**changes):
        (copy / "config.json").write_text(json.dumps({**config, **changes}))

    write(latent_chanels=8)
    with pytest.raises(ConfigError, match="'latent_chanels'.*did you mean 'latent_channels'"):
        VAE(VAEConfig(path=str(copy)))
    assert VAE(VAEConfig(path=str(copy), allow=("latent_chanels",))).channels == 4
    write(_class_name="AutoencoderTiny")
    with pytest.raises(DitkitError, match="AutoencoderTiny; allowed: AutoencoderKL"):
        VAE(VAEConfig(path=str(copy)))
    write(norm_num_groups=3)
    with pytest.raises(ConfigError, match="no multiple of norm_num_groups 3"):
        VAE(VAEConfig(path=str(copy)))


@torch.no_grad()
def test_vae_reads_attention_under_its_old_names(copy):
    before = VAE(VAEConfig(path=str(copy))).encode(pictures()).mean
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in read_tensors(copy / WEIGHTS).items():
        for new_part, old_part in old.items():
            name = name.replace(f".{new_part}.", f".{old_part}.")
        weights[name] = value
    assert any(".proj_attn." in n for n in weights)
    write_tensors(copy / WEIGHTS, weights)
    assert torch.equal(VAE(VAEConfig(path=str(copy))).encode(pictures()).mean, before)


def test_vae_in_float16_is_refused_where_it_overflows(tiny):
    with pytest.raises(DitkitError, match="overflows in float16"):
        VAE(VAEConfig(path=str(tiny[0]), dtype="float16"))


@torch.no_grad()
def test_vae_in_bfloat16_keeps_the_dtype_of_the_data(tiny):
    codec = VAE(VAEConfig(path=str(tiny[0]), dtype="bfloat16")).to(torch.float64)  # .to chooses the device alone
    z = codec.encode(pictures()).mean
    assert z.dtype == torch.float32
    assert codec.model.dtype == torch.bfloat16
    want = VAE(VAEConfig(path=str(tiny[0]))).encode(pictures()).mean
    assert (z - want).norm() / want.norm() < 2e-2


@torch.no_grad()
def test_hash_follows_the_weights_and_not_the_path(tiny, copy, tmp_path_factory):
    codec = VAE(VAEConfig(path=str(tiny[0])))
    assert VAE(VAEConfig(path=str(copy))).content_hash() == codec.content_hash()
    saved = tmp_path_factory.mktemp("saved") / "codec"
    save_codec(codec, saved)
    again = load_codec(saved)
    assert again.content_hash() == codec.content_hash()
    assert torch.equal(again.encode(pictures()).mean, codec.encode(pictures()).mean)
    weights = read_tensors(copy / WEIGHTS)
    weights["encoder.conv_in.bias"][0] += 1e-3
    write_tensors(copy / WEIGHTS, weights)
    assert VAE(VAEConfig(path=str(copy))).content_hash() != codec.content_hash()


def small_kl(**changes):
    torch.manual_seed(0)
    return KL(KLConfig(**{"in_channels": 1, "channels": 2, "dim": 8, "dim_mult": (1, 2), "num_groups": 4, **changes}))


@torch.no_grad()
def test_kl_losses_are_their_formulas():
    codec = small_kl(reconstruction="l2", kl_weight=0.1)
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    mean, std = codec.encode_raw(x)
    assert mean.shape == (3, *codec.latent_shape((1, 8, 8))) == (3, 2, 4, 4)
    eps = torch.randn_like(mean)
    losses = codec.losses(x, eps)
    want_kl = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).flatten(1).sum(1) / 64
    want_error = (codec.decode_raw(mean + std * eps) - x).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.kl, want_kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.loss, want_error + 0.1 * want_kl, rtol=1e-4, atol=1e-5)


class Shapes:
    """White squares of 2 to 4 pixels somewhere on a black 8 x 8 picture."""

    def __len__(self):
        return 256

    def batch(self, indices):
        x = torch.full((len(indices), 1, 8, 8), -1.0)
        for row, i in enumerate(np.asarray(indices).tolist()):
            side, top, left = 2 + i % 3, i * 7 % 5, i * 11 % 5
            x[row, :, top : top + side, left : left + side] = 1.0
        return {"x": x}


@torch.no_grad()
def test_kl_learns_shapes_and_its_latents_are_normalised():
    codec, data = small_kl(), Shapes()
    with torch.enable_grad():
        history = fit(codec, data, num_steps=60, batch_size=16, learning_rate=4e-3, progress=False)
    assert np.mean(history[-5:]) < 0.5 * np.mean(history[:5])
    x = data.batch(np.arange(256))["x"]
    posterior = codec.encode(x)
    error = (codec.decode(posterior.mean) - x).square().mean()
    assert error < 0.5 * (x - x.mean(0)).square().mean()  # better than the mean picture
    z = posterior.sample(torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=0.05, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(2), atol=0.05, rtol=0)


@torch.no_grad()
def test_kl_training_is_a_function_of_its_seed():
    first, second, other = (small_kl() for _ in range(3))
    with torch.enable_grad():
        runs = [fit(c, Shapes(), num_steps=2, batch_size=4, seed=s, progress=False) for c, s in ((first, 0), (second, 0), (other, 1))]
    assert runs[0] == runs[1] != runs[2]
    assert first.content_hash() == second.content_hash() != other.content_hash()


@torch.no_grad()
def test_kl_survives_a_round_trip_through_a_folder(tmp_path):
    codec = small_kl()
    x = torch.rand(4, 1, 8, 8)
    codec.calibrate([x])
    assert all(math.isfinite(v) and v > 0 for v in codec.config.scale)
    save_codec(codec, tmp_path / "codec")
    again = load_codec(tmp_path / "codec")
    assert again.config == codec.config
    assert torch.equal(again.encode(x).mean, codec.encode(x).mean)
    assert again.content_hash() == codec.content_hash()
    raw = bytearray((tmp_path / "codec" / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "codec" / "model.safetensors").write_bytes(raw)
    with pytest.raises(WeightsError, match="altered"):
        load_codec(tmp_path / "codec")


def test_gradients_flow_through_the_codec_to_the_data():
    codec = small_kl()
    x = torch.rand(1, 1, 8, 8, requires_grad=True)
    codec.decode(codec.encode(x).mean).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
