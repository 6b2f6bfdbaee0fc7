"""Rectified flow: the path, its times, and the shift that is applied once."""

import math

import pytest
import torch

from ditkit.core.errors import ConfigError, DitkitError
from ditkit.diffusion.flow import Flow, FlowConfig, shift_time
from ditkit.diffusion.solvers import SOLVERS


def test_the_path_and_its_velocity():
    flow = Flow()
    x0, eps = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    x_t = flow.add_noise(x0, eps, 0.25)
    assert float(x_t) == 0.75 * 2 - 0.25
    p = flow.predict(eps - x0, x_t, 0.25)
    assert (float(p.x0), float(p.eps), float(p.velocity)) == (2, -1, -3)
    assert float(flow.loss(eps - x0, x0, eps, 0.25).loss) == 0


def test_predicted_data_are_the_same_velocity_and_the_same_loss():
    """2511.13720, table 1: x0 = x_t - t v, so an error e of x0 is one of e / t of v; below the floor of t as many as at the floor."""
    g = torch.Generator().manual_seed(0)
    x0, eps, wrong = (torch.randn(3, 2, 4, 4, generator=g) for _ in range(3))
    of_data, of_velocity = Flow(prediction="x0", floor=0.1), Flow()
    t = torch.tensor([1.0, 0.4, 0.1])
    x_t = of_data.add_noise(x0, eps, t)
    found, same = of_data.predict(wrong, x_t, t), of_velocity.predict((x_t - wrong) / t.view(3, 1, 1, 1), x_t, t)
    for a, b in ((found.velocity, same.velocity), (found.eps, same.eps), (found.x0, wrong)):
        assert torch.allclose(a, b, atol=1e-5)
    expected = of_velocity.loss(found.velocity, x0, eps, t).loss
    assert torch.allclose(of_data.loss(wrong, x0, eps, t).loss, expected, rtol=1e-5)
    low = torch.full((3,), 0.01)
    assert torch.allclose(of_data.loss(wrong, x0, eps, low).loss, (wrong - x0).square().flatten(1).mean(1) / 0.01)
    assert of_data.predict(wrong, x_t, 0.0).velocity.isfinite().all()
    with pytest.raises(ConfigError, match="backward is the direction"):
        FlowConfig.parse({"prediction": "x0", "backward": True})


def test_a_silent_network_on_unit_data_has_loss_two():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 8, 4, 32, 32, generator=g)
    loss = Flow().loss(torch.zeros_like(x0), x0, eps, torch.rand(8, generator=g)).loss
    assert float(loss.mean()) == pytest.approx(2, rel=0.03)


def test_a03_the_shift_is_applied_once():
    flow = Flow(shift=3.0)
    first = flow.times(1000, "linspace")
    assert first.shape == (1001,)
    assert float(first[-2]) == pytest.approx(0.002994, abs=5e-7)
    assert float(first[0]) == 1
    assert torch.equal(first, flow.times(1000, "linspace"))
    assert torch.equal(first, Flow(**flow.config.to_dict()).times(1000, "linspace"))


def test_explicit_times_are_used_as_given():
    given = [0.9, 0.5, 0.1]
    assert Flow(shift=3.0).times(2, times=given).tolist() == given


@pytest.mark.parametrize(
    ("times", "message"),
    [([0.9, 0.1], "3: where each step starts"), ([0.1, 0.9, 0.5], "strictly decreasing"), ([1.1, 0.5, 0.0], r"in \[0, 1\]")],
)
def test_explicit_times_are_refused(times, message):
    with pytest.raises(DitkitError, match=message):
        Flow().times(2, times=times)


def test_times_and_spacing_exclude_each_other():
    with pytest.raises(DitkitError, match="one of them"):
        Flow().times(1, "uniform", [1.0, 0.0])
    with pytest.raises(DitkitError, match="did you mean 'uniform'"):
        Flow().times(1, "unifrom")


def test_shift():
    t = torch.linspace(0, 1, 11)
    assert torch.equal(shift_time(t, 1.0), t)
    assert shift_time(t, 3.0)[[0, 5, -1]].tolist() == pytest.approx([0, 0.75, 1])
    assert torch.allclose(shift_time(shift_time(t, 3.0), 1 / 3), t)


def test_training_times():
    u = (torch.arange(10_000) + 0.5) / 10_000
    assert torch.equal(Flow().sample_time(u), u)
    normal = Flow(time_sampling="logit_normal", logit_mean=0.5, logit_std=2.0).sample_time(u)
    logits = torch.logit(normal.double())
    assert float(logits.mean()) == pytest.approx(0.5, abs=1e-2)
    assert float(logits.std()) == pytest.approx(2, abs=1e-2)
    ends = Flow(time_sampling="logit_normal").sample_time(torch.tensor([0.0, 1 - 2**-24]))
    assert ((ends > 0) & (ends < 1)).all()
    assert torch.allclose(Flow(train_shift=3.0).sample_time(u), shift_time(u, 3.0))


def test_training_times_stay_within_their_range():
    flow = Flow(train_range=(0.2, 0.6), train_shift=3.0)
    assert flow.sample_time(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist() == pytest.approx([0.2, 0.5, 0.6])
    for ends in ((0.6, 0.2), (0.5, 0.5), (-0.1, 1.0), (0.0, 1.5)):
        with pytest.raises(ConfigError, match="two ascending times"):
            Flow(train_range=ends)


def test_mode_sampling_is_a_map_of_the_unit_interval_onto_itself():
    """SD3, eq. 20: scale 0 is uniform; above 0 the middle gets more, symmetrically; at -1 t = cos^2(pi u / 2)."""
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert torch.allclose(Flow(time_sampling="mode", mode_scale=0.0).sample_time(u), 1 - u)
    assert torch.allclose(Flow(time_sampling="mode", mode_scale=-1.0).sample_time(u), torch.cos(torch.pi / 2 * u) ** 2)
    t = Flow(time_sampling="mode").sample_time(u)
    assert (t.diff() <= 1e-12).all()
    assert t[[0, 500, 1000]].tolist() == pytest.approx([1, 0.5, 0])
    assert float(((t > 0.25) & (t < 0.75)).double().mean()) > 0.6
    with pytest.raises(ConfigError, match="mode_scale"):
        Flow(time_sampling="mode", mode_scale=1.8)


def test_sd3s_shift_grows_with_the_side():
    """Eq. 23: sqrt of the ratio of areas, a factor on both shifts; shifts compose by multiplication."""
    flow = Flow(resolution="sqrt", shift=3.0, train_shift=2.0)
    assert flow.at((16, 128, 128)).config.shift == 3
    wide = flow.at((16, 256, 64))
    assert wide.config.shift == 3
    large = flow.at((16, 256, 256))
    assert (large.config.shift, large.config.train_shift) == (6, 4)
    assert large.at((16, 8, 8)) is large
    u = torch.linspace(0, 1, 11)
    assert torch.allclose(large.sample_time(u), shift_time(shift_time(u, 2.0), 2.0))


def test_fluxs_shift_is_exponential_in_the_tokens():
    flow = Flow(resolution="exponential")
    assert flow.at((16, 32, 32)).config.shift == pytest.approx(math.exp(0.5))
    assert flow.at((16, 128, 128)).config.shift == pytest.approx(math.exp(1.15))
    t = flow.at((16, 64, 96)).times(4)
    mu = 0.5 + 0.65 * (64 * 96 / 4 - 256) / (4096 - 256)
    assert t[1:-1].tolist() == pytest.approx([math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in (0.75, 0.5, 0.25)])
    with pytest.raises(ConfigError, match="ascending areas"):
        Flow(mu=((2, 0.5), (1, 1.0)))


def test_a_process_without_such_rules_is_the_same_at_every_resolution():
    flow = Flow(shift=3.0)
    assert flow.at((4, 8, 8)) is flow


def test_solvers_settle_the_resolution():
    told = []

    class Run:
        num_steps, methods, times = 2, (), None

        def steps(self):
            yield from range(2)

    def denoise(x, t):
        told.append(float(t))
        return torch.zeros_like(x)

    SOLVERS["euler"](denoise, torch.zeros(1, 1, 4, 4), Flow(resolution="sqrt", base_area=4), Run(), lambda *a: None)
    assert told == [1.0, pytest.approx(2 / 3)]


def test_what_the_network_is_told():
    told = {name: float(Flow(network_time=name).network_time(0.25)) for name in ("thousand", "unit", "sit")}
    assert told == {"thousand": 250.0, "unit": 0.25, "sit": 0.75}
    with pytest.raises(ConfigError, match="network_time"):
        Flow(network_time="index")


def test_the_sit_convention_turns_time_and_velocity_around():
    """SiT runs from noise at 0 to data at 1, and predicts dx/dtau = data - noise."""
    sit, x0, eps = Flow(network_time="sit"), torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    assert float(sit.predict(x0 - eps, sit.add_noise(x0, eps, 0.25), 0.25).x0) == 2
    assert float(sit.loss(x0 - eps, x0, eps, 0.25).loss) == 0


def test_a_half_that_means_nothing_is_left_out():
    flow = Flow(discard_half=True)
    assert flow.output_channels(4) == 8
    output = torch.arange(8.0).reshape(1, 8, 1, 1)
    assert torch.equal(flow.predict(output, torch.zeros(1, 4, 1, 1), 0.5).velocity, output[:, :4])
