"""Cached latents: the values, what costs an encoding, resuming, and A26 (mirroring and crops)."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ditkit import data
from ditkit.codecs.base import Codec
from ditkit.codecs.identity import Identity, IdentityConfig
from ditkit.codecs.kl import KL, KLConfig
from ditkit.core.errors import ConfigError, DitkitError, WeightsError
from ditkit.core.files import read_tensors, write_tensors
from ditkit.data import latents
from ditkit.data.folder import ImageFolder
from ditkit.data.latents import LatentSet, cache_latents


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def noise(side, seed):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path):
    """Seven pictures of 8 x 8 in two classes."""
    root = tmp_path / "pictures"
    for i in range(7):
        save(root / "ab"[i % 2] / f"{i}.png", noise(8, i))
    return root


def folder(root, **options):
    return ImageFolder(root, progress=False, **options)


class Spread(Codec):
    """z = x with a known std, and a count of the pictures encoded."""

    name = "identity"
    config_class = IdentityConfig

    def __init__(self, std=0.5):
        super().__init__()
        self.config, self.in_channels, self.channels = IdentityConfig(), 3, 3
        self.register_buffer("std", torch.tensor(std))
        self.encoded = 0

    def encode_raw(self, x):
        self.encoded += len(x)
        return x, self.std.expand_as(x)

    def decode_raw(self, z):
        return z


def cache(dataset, codec, where, **options):
    return cache_latents(dataset, codec, where, progress=False, **options)


def content(where):
    return {p.relative_to(where): p.read_bytes() for p in where.rglob("*") if p.is_file()}


# --- values ---


@torch.no_grad()
def test_the_cache_holds_the_posterior_of_every_picture(pictures, tmp_path):
    torch.manual_seed(0)
    codec = KL(KLConfig(channels=2, dim=4, dim_mult=(1, 2), num_groups=2, scale=(2.0, 3.0), shift=(0.1, -0.2)))
    source = folder(pictures)
    found = cache(source, codec, tmp_path / "latents", batch_size=3)
    assert (found.shape, found.labels, len(found)) == ((2, 4, 4), ["a", "b"], 7)
    ids = np.array([4, 0, 6])
    batch, want = found.batch(ids), codec.encode(source.batch(ids)["x"])
    torch.testing.assert_close(batch["x"], want.mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(batch["y"], source.batch(ids)["y"])
    draws = torch.stack([found.augmented(ids, seed=0, step=step)["x"] for step in range(400)])
    torch.testing.assert_close(draws.mean(0), want.mean, rtol=0, atol=float(want.std.max()) * 5 / 20)
    torch.testing.assert_close((draws.var(0) / want.std.square()).mean(), torch.tensor(1.0), rtol=0.03, atol=0)


def test_a_new_sample_of_the_posterior_at_every_step_whatever_the_batch(pictures, tmp_path):
    found = cache(folder(pictures), Spread(0.5), tmp_path / "latents")
    first = found.augmented(np.arange(7), seed=1, step=0)["x"]
    alone = torch.cat([found.augmented(np.array([i]), seed=1, step=0)["x"] for i in range(7)])
    assert torch.equal(first, alone)
    eps = torch.stack([(found.augmented(np.arange(7), seed=1, step=s)["x"] - found.batch(np.arange(7))["x"]) / 0.5 for s in range(30)])
    assert abs(eps.mean()) < 0.03
    assert abs(eps.std() - 1) < 0.03
    assert not torch.equal(first, found.augmented(np.arange(7), seed=2, step=0)["x"])


def test_captions_travel_with_the_latents(tmp_path):
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png", noise(8, i))
        (tmp_path / "in" / f"{i}.txt").write_text(f"“text” {i}", encoding="utf-8")
    found = cache(folder(tmp_path / "in"), Spread(), tmp_path / "out")
    assert found.captions(np.array([2, 0])) == ["“text” 2", "“text” 0"]
    assert set(found.batch(np.arange(3))) == {"x"}
    (tmp_path / "in" / "1.txt").write_text("another", encoding="utf-8")
    codec = Spread()
    assert cache(folder(tmp_path / "in"), codec, tmp_path / "out").captions(np.array([1])) == ["another"]
    assert codec.encoded == 0  # the words changed, not the picture


def test_embedded_data_can_be_cached(tmp_path):
    digits = data.load("digits", "test")
    found = cache(digits, Identity(IdentityConfig(channels=1)), tmp_path / "out", batch_size=128)
    ids = np.arange(0, 360, 7)
    assert torch.equal(found.batch(ids)["x"], digits.batch(ids)["x"])
    assert torch.equal(found.batch(ids)["y"], digits.batch(ids)["y"])
    assert torch.equal(found.augmented(ids, seed=0, step=3)["x"], digits.batch(ids)["x"])  # std 0: nothing to draw
    assert found.codec().content_hash() == Identity(IdentityConfig(channels=1)).content_hash()


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("float16", 2e-3), ("bfloat16", 1e-2)])
def test_dtypes(pictures, tmp_path, dtype, error):
    source = folder(pictures)
    found = cache(source, Spread(), tmp_path / "out", dtype=dtype)
    x = found.batch(np.arange(7))["x"]
    assert x.dtype == torch.float32
    assert (x - source.batch(np.arange(7))["x"]).abs().max() <= error


# --- A26: mirroring and crops ---


@pytest.fixture
def half(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    save(tmp_path / "half" / "c" / "half.png", pixels)
    return tmp_path / "half"


def flipped(found, draws=200):
    return sum(found.augmented(np.arange(1), seed=0, step=s)["x"][0, 0, 0, 0].item() > 0 for s in range(draws)) / draws


def test_a26_the_coin_is_tossed_at_every_step(half, tmp_path):
    found = cache(folder(half, flip=True), Identity(), tmp_path / "out")
    assert 0.4 <= flipped(found) <= 0.6
    assert found.batch(np.arange(1))["x"][0, 0, 0, 0] == -1
    assert flipped(LatentSet(tmp_path / "out", flip=False)) == 0
    (shard,) = (tmp_path / "out").glob("latents-*.safetensors")
    tensors = read_tensors(shard)
    assert torch.equal(tensors["mean_mirrored"], tensors["mean"].flip(-1))


def test_a26_the_mirrored_latent_is_that_of_the_mirrored_picture(tmp_path, pictures):
    """Not the mirrored latent: a codec need not commute with mirroring, and its biased borders do not."""
    torch.manual_seed(0)
    codec = KL(KLConfig(channels=2, dim=4, dim_mult=(1, 2), num_groups=2))
    source = folder(pictures, flip=True)
    cache(source, codec, tmp_path / "out")
    tensors = read_tensors(next((tmp_path / "out").glob("latents-*.safetensors")))
    with torch.no_grad():
        want = codec.encode(source.batch(np.arange(7))["x"].flip(-1))
    torch.testing.assert_close(tensors["mean_mirrored"], want.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tensors["std_mirrored"], want.std, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(tensors["mean_mirrored"], tensors["mean"].flip(-1), atol=1e-3)


def test_a26_an_old_cache_without_the_mirrored_latent_is_rebuilt(half, tmp_path):
    old = cache(folder(half), Spread(0.0), tmp_path / "out")
    assert flipped(old) == 0
    with pytest.raises(DitkitError, match="lacks the latents of the mirrored pictures.*flip=True"):
        LatentSet(tmp_path / "out", flip=True)
    codec = Spread(0.0)
    rebuilt = cache(folder(half, flip=True), codec, tmp_path / "out")
    assert (rebuilt.report.encoded, codec.encoded) == (1, 2)  # one picture, both ways round
    assert 0.4 <= flipped(rebuilt) <= 0.6
    assert len(list((tmp_path / "out").glob("latents-*.safetensors"))) == 1  # the old shard is gone


def test_a26_random_crop_with_a_cache_is_refused(half, tmp_path):
    with pytest.raises(DitkitError, match="crop is 'random'.*allowed: crop='centre'"):
        cache(folder(half, resolution=8, crop="random"), Identity(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is encoded, and what is found ---


def test_a_second_call_encodes_nothing(pictures, tmp_path):
    codec = Spread()
    first = cache(folder(pictures), codec, tmp_path / "out")
    before = content(tmp_path / "out")
    second = cache(folder(pictures), codec, tmp_path / "out")
    assert (first.report.encoded, second.report.encoded, second.report.reused) == (7, 0, 7)
    assert codec.encoded == 7
    assert content(tmp_path / "out") == before


def test_only_a_changed_picture_is_encoded_again(pictures, tmp_path):
    small = {"shard_bytes": 2 * 2 * 3 * 8 * 8 * 4}  # two samples a shard
    cache(folder(pictures), Spread(), tmp_path / "out", **small)
    save(pictures / "a" / "2.png", noise(8, 99))
    save(pictures / "a" / "00.png", noise(8, 100))  # everything behind it moves by one
    codec = Spread()
    found = cache(folder(pictures), codec, tmp_path / "out", **small)
    assert codec.encoded == 2
    source = folder(pictures)
    assert torch.equal(found.batch(np.arange(8))["x"], source.batch(np.arange(8))["x"])
    assert torch.equal(found.batch(np.arange(8))["y"], source.batch(np.arange(8))["y"])
    assert sorted(p.name for p in (tmp_path / "out").glob("latents-*.safetensors")) == sorted(s.file for s in found.index.shards)


@pytest.mark.parametrize("change", ["codec", "resolution", "dtype"])
def test_another_codec_transform_or_dtype_encodes_all_again(pictures, tmp_path, change):
    cache(folder(pictures), Spread(0.5), tmp_path / "out")
    codec = Spread(0.25 if change == "codec" else 0.5)
    source = folder(pictures, resolution=4) if change == "resolution" else folder(pictures)
    found = cache(source, codec, tmp_path / "out", **({"dtype": "float16"} if change == "dtype" else {}))
    assert codec.encoded == 7
    assert found.shape == tuple(source.shape)
    assert len(list((tmp_path / "out").glob("latents-*.safetensors"))) == 1


def test_a_call_that_was_cut_off_goes_on(pictures, tmp_path):
    class Breaks(Spread):
        def encode_raw(self, x):
            if self.encoded >= 4:
                raise KeyboardInterrupt
            return super().encode_raw(x)

    options = {"batch_size": 1, "shard_bytes": 2 * 2 * 3 * 8 * 8 * 4}
    with pytest.raises(KeyboardInterrupt):
        cache(folder(pictures), Breaks(), tmp_path / "out", **options)
    with pytest.raises(DitkitError, match="no cached latents"):  # not whole, so not there
        LatentSet(tmp_path / "out")
    codec = Spread()
    found = cache(folder(pictures), codec, tmp_path / "out", **options)
    assert codec.encoded == 3
    whole = cache(folder(pictures), Spread(), tmp_path / "whole", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert torch.equal(found.batch(np.arange(7))["x"], whole.batch(np.arange(7))["x"])


def test_the_old_cache_stands_until_the_new_one_is_whole(pictures, tmp_path, monkeypatch):
    cache(folder(pictures), Spread(0.5), tmp_path / "out")
    before = LatentSet(tmp_path / "out").batch(np.arange(7))["x"]
    monkeypatch.setattr(latents, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache(folder(pictures, resolution=4), Spread(0.5), tmp_path / "out")
    assert torch.equal(LatentSet(tmp_path / "out").batch(np.arange(7))["x"], before)


def test_a_latent_that_is_not_finite_names_its_picture(pictures, tmp_path):
    class Overflows(Spread):
        def encode_raw(self, x):
            return x * 1e30 * 1e30, x.abs()

    with pytest.raises(DitkitError, match=r"codec 'identity' makes mean of a/0\.png not finite"):
        cache(folder(pictures), Overflows(), tmp_path / "out")
    assert not list((tmp_path / "out").glob("latents-*.safetensors"))

    class TooLarge(Spread):
        def encode_raw(self, x):
            return x * 1e6, x.abs()

    with pytest.raises(DitkitError, match="not finite.*float32"):
        cache(folder(pictures), TooLarge(), tmp_path / "out", dtype="float16")


# --- damage ---


def test_damaged_caches_are_named(pictures, tmp_path):
    out = tmp_path / "out"
    cache(folder(pictures), Spread(), out)
    (shard,) = out.glob("latents-*.safetensors")
    raw, index = shard.read_bytes(), (out / "latents.json").read_text()
    shard.write_bytes(raw[:-4])
    with pytest.raises(WeightsError, match=shard.name):
        LatentSet(out)
    codec = Spread()
    cache(folder(pictures), codec, out)  # and the next call makes it again
    assert codec.encoded == 7
    assert shard.read_bytes() == raw
    flipped_byte = bytearray(raw)
    flipped_byte[-1] ^= 1
    shard.write_bytes(flipped_byte)
    with pytest.raises(WeightsError, match=f"{shard.name} was altered"):
        LatentSet(out).verify()
    tensors = read_tensors(shard)
    write_tensors(shard, {**tensors, "y": tensors["y"] + 9})
    with pytest.raises(WeightsError, match="'y' is out of range; allowed: 0 to 1"):
        LatentSet(out)
    shard.unlink()
    with pytest.raises(WeightsError, match="does not exist"):
        LatentSet(out)
    for key, value in (("shape", [3, 8]), ("dtype", "float8"), ("mirored", True), ("format", 2)):
        (out / "latents.json").write_text(json.dumps({**json.loads(index), key: value}))
        with pytest.raises(ConfigError, match=key):
            LatentSet(out)
    bad = json.loads(index)
    bad["shards"][0]["file"] = "../../etc/passwd"
    (out / "latents.json").write_text(json.dumps(bad))
    with pytest.raises(ConfigError, match=r"shards\.0\.file"):
        LatentSet(out)


def test_a_number_that_is_not_finite_on_disk_is_found_when_it_is_read(pictures, tmp_path):
    cache(folder(pictures), Spread(), tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("latents-*.safetensors")
    raw = bytearray(shard.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    start = json.loads(raw[8:header])["mean"]["data_offsets"][0]
    raw[header + start : header + start + 4] = np.float32("nan").tobytes()
    shard.write_bytes(raw)
    with pytest.raises(WeightsError, match="'mean' is not finite"):
        LatentSet(tmp_path / "out").batch(np.arange(7))


# --- as a data set ---


def test_load_opens_caches_and_their_splits(pictures, tmp_path):
    for split in ("train", "test"):
        cache(folder(pictures), Spread(), tmp_path / "out" / split)
    assert len(data.load(str(tmp_path / "out"), "test")) == 7
    one = str(tmp_path / "out" / "train")
    assert len(data.load(one)) == 7
    with pytest.raises(DitkitError, match="one set of latents, for split 'train'"):
        data.load(one, "test")


@torch.no_grad()
def test_the_cache_brings_the_codec_that_decodes_it(pictures, tmp_path):
    torch.manual_seed(0)
    codec = KL(KLConfig(channels=2, dim=4, dim_mult=(1, 2), num_groups=2))
    found = cache(folder(pictures), codec, tmp_path / "out")
    z = found.batch(np.arange(3))["x"]
    assert torch.equal(data.load(str(tmp_path / "out")).codec().decode(z), codec.decode(z))
    assert (found.picture_shape, found.shape) == ((3, 8, 8), (2, 4, 4))
    index = json.loads((tmp_path / "out" / "latents.json").read_text())
    (tmp_path / "out" / "latents.json").write_text(json.dumps({**index, "codec_hash": "0" * 64}))
    with pytest.raises(DitkitError, match="not the one that made the latents"):
        LatentSet(tmp_path / "out").codec()


def test_options_are_strict(pictures, tmp_path):
    cache(folder(pictures), Spread(), tmp_path / "out")
    with pytest.raises(ConfigError, match="'flpi'.*did you mean 'flip'"):
        data.load(str(tmp_path / "out"), flpi=True)


@torch.no_grad()
def test_a_model_trains_on_latents_and_its_samples_decode(tmp_path):
    """The whole way: digits -> codec -> cache -> batches of the trainer -> pictures."""
    from ditkit.train.batches import Batches

    digits = data.load("digits", "test")
    torch.manual_seed(0)
    codec = KL(KLConfig(in_channels=1, channels=2, dim=4, dim_mult=(1, 2), num_groups=2))
    found = cache(digits, codec, tmp_path / "out")
    batch = Batches(found, lambda shape: {}, seed=0, batch_size=8)(5)
    assert batch.tensors["x"].shape == (8, 2, 4, 4)
    assert codec.decode(batch.tensors["x"]).shape == (8, 1, 8, 8)
