"""Guidance: u + s (c - u) on the channels that are asked for."""

import pytest
import torch

from ditkit.backbones.dit import DiT
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.run import Run
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.guidance import Guidance, combine, guided


class Stub:
    """Returns the value of its conditioning everywhere, ``extra`` times the channels of x; remembers its passes."""

    def __init__(self, extra=1):
        self.extra, self.passes = extra, []

    def prepare(self, *, value):
        return value

    def __call__(self, x, t, prepared, *, run, guidance_pass):
        self.passes.append(guidance_pass)
        b, c, *rest = x.shape
        return prepared.reshape(-1, 1, 1, 1).expand(b, c * self.extra, *rest).clone()


class StubRun:
    """Closes by adding 100, so that a prediction which was not closed shows."""

    def close(self, prediction):
        return prediction + 100


def denoise(guidance, x, t=0.5, process=None, cond=1.0, null=0.0, extra=1):
    stub = Stub(extra)
    values = [{"value": torch.full((len(x),), v)} for v in (cond, null)]
    out = guided(stub, process or Flow(), guidance, StubRun(), *values)(x, t) - 100
    return out, stub.passes


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("batched", [False, True])
def test_a01_every_channel_is_guided_by_default(channels, batched):
    out, _ = denoise(Guidance(scale=4.0, batched=batched), torch.zeros(2, channels, 4, 4))
    assert (out == 4).all()


@pytest.mark.parametrize("channels", [4, 16])
def test_a01_the_official_rule_guides_three(channels):
    out, _ = denoise(Guidance(scale=4.0, channels=3), torch.zeros(2, channels, 4, 4))
    assert (out[:, :3] == 4).all()
    assert (out[:, 3:] == 1).all()


@pytest.mark.parametrize("channels", ["all", 3])
def test_a01_the_learned_variance_is_not_guided(channels):
    out, _ = denoise(Guidance(scale=4.0, channels=channels), torch.zeros(2, 4, 4, 4), process=Gaussian(), extra=2)
    assert (out[:, 4:] == 1).all()
    assert (out[:, :3] == 4).all()


@pytest.mark.parametrize(("scale", "want", "passes"), [(0, -1, 2), (1, 1, 1), (2, 3, 2)])
def test_a02_what_the_scales_mean(scale, want, passes):
    out, seen = denoise(Guidance(scale=float(scale)), torch.zeros(2, 4, 4, 4), cond=1.0, null=-1.0)
    assert (out == want).all()
    assert len(seen) == passes


def test_outside_the_interval_there_is_one_pass():
    guidance, x = Guidance(scale=4.0, interval=(0.2, 0.7)), torch.zeros(3, 4, 2, 2)
    assert (denoise(guidance, x, 0.9)[0] == 1).all()
    assert denoise(guidance, x, 0.9)[1] == ["cond"]
    assert (denoise(guidance, x, 0.7)[0] == 4).all()
    mixed, _ = denoise(guidance, x, torch.tensor([0.1, 0.5, 0.9]))
    assert mixed[:, 0, 0, 0].tolist() == [1, 4, 1]


def test_rescaling_restores_the_deviation():
    c, u = torch.randn(2, 3, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    full = combine(c, u, 5.0, (4, 4), rescale=1.0)
    assert torch.allclose(full[:, :4].flatten(1).std(1), c[:, :4].flatten(1).std(1), rtol=1e-5)
    plain = combine(c, u, 5.0, (4, 4))
    assert torch.allclose(combine(c, u, 5.0, (4, 4), rescale=0.25), 0.25 * full + 0.75 * plain, atol=1e-5)
    assert torch.equal(full[:, 4:], c[:, 4:])


def test_refusals():
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(DitkitError, match="guidance on 3 channels of data with 2"):
        denoise(Guidance(scale=2.0, channels=3), x)
    with pytest.raises(DitkitError, match="needs the unconditional prediction"):
        guided(Stub(), Flow(), Guidance(scale=2.0), StubRun(), {"value": torch.ones(1)}, None)
    for bad in ({"channels": 0}, {"interval": (0.7, 0.2)}, {"rescale": 1.5}, {"scale": float("nan")}, {"channels": "some"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            Guidance(**bad)
    with pytest.raises(ConfigError, match="did you mean 'rescale'"):
        Guidance(rescal=0.5)


@pytest.fixture(scope="module")
def tiny():
    return DiT.tiny()


def outputs(model, guidance, t=0.3):
    x, _, cond = model.example(3)
    run = Run(model, 1)
    with torch.inference_mode():
        return guided(model, Gaussian(), guidance, run, cond, model.null(cond["y"]))(x, t)


def test_two_passes_equal_one_of_twice_the_batch(tiny):
    two, one = (outputs(tiny, Guidance(scale=3.0, channels=2, rescale=0.5, batched=b)) for b in (False, True))
    assert (two - one).norm() <= 1e-5 * two.norm()


def test_scale_one_is_the_conditional_model_bit_for_bit(tiny):
    x, _, cond = tiny.example(3)
    with torch.inference_mode():
        want = tiny(x, Gaussian().network_time(0.3).expand(3), **cond)
    assert torch.equal(outputs(tiny, Guidance()), want)


def test_scale_zero_is_the_unconditional_model(tiny):
    x, _, cond = tiny.example(3)
    with torch.inference_mode():
        want = tiny(x, Gaussian().network_time(0.3).expand(3), **tiny.null(cond["y"]))
    got = outputs(tiny, Guidance(scale=0.0))
    assert torch.equal(got[:, :3], want[:, :3])


@pytest.mark.parametrize("scale", [0.0, 1.5, 7.0])
def test_the_official_rule_leaves_the_other_channels_conditional(tiny, scale):
    assert torch.equal(outputs(tiny, Guidance(scale=scale, channels=2))[:, 2:], outputs(tiny, Guidance())[:, 2:])


def test_a_bfloat16_network_in_a_float32_solver():
    model = DiT.tiny().to(torch.bfloat16)
    assert outputs(model, Guidance(scale=2.0)).dtype == torch.float32
