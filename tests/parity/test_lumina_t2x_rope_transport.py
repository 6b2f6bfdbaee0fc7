"""Rotary tables, time grids, ODE solvers, training times and losses of Lumina-T2X: every tensor of lumina-t2x-rope-transport.safetensors.

The released time runs from noise at 0 to data at 1; public time is 1 minus it. Sizes, steps and scales are read from the file.
"""

import pytest
import torch
from golden import open_golden, relative

from ditkit.diffusion.flow import Flow
from ditkit.diffusion.process import like
from ditkit.diffusion.solvers import SOLVERS
from ditkit.nn.extrapolation import Extrapolation, turns
from ditkit.nn.positions import Rope, coordinates

G = open_golden("lumina-t2x-rope-transport")
pytestmark = pytest.mark.parity


def close(got, key):
    assert relative(got, G[key]) <= 1e-5, key


def numbered(prefix):
    """Outputs named after ``prefix`` and a number, with the number."""
    return [(key, int(number)) for key in G.starting(f"out/{prefix}_") if (number := key.removeprefix(f"out/{prefix}_")).isdigit()]


def scaled(axes, call):
    return Rope(
        (call["dim"] // axes,) * axes, mix="alternating", linear=call.get("rope_scaling_factor", 1.0), ntk=call.get("ntk_factor", 1.0)
    )


def angles(table, shape):
    """cos and sin of each pair of channels: (*shape, dim / 2, 2)."""
    cos, sin = (u[0, :, ::2].unflatten(0, shape) for u in table)
    return torch.stack([cos, sin], -1)


@pytest.mark.parametrize(("key", "n"), numbered("flag_rope"))
def test_positions_in_the_sequence(key, n):
    call = G.call["flag"][n]
    close(angles(scaled(1, call).table((call["end"],)), (call["end"],)), key)


@pytest.mark.parametrize(("key", "n"), numbered("next_imagenet_rope"))
def test_positions_by_row_and_column(key, n):
    call = G.call["next_imagenet"][n]
    grid = (call["end"],) * 2
    close(angles(scaled(2, call).table(grid), grid), key)


@pytest.mark.parametrize(("key", "n"), numbered("next_rope"))
def test_positions_by_time(key, n):
    call = G.call["next"][n]
    grid, scale = (call["end"],) * 2, call.get("scale_factor", 1.0)
    how = Extrapolation(rule="switch", scale=scale, watershed=call.get("scale_watershed", 1.0))
    t = torch.tensor([call.get("timestep", 1.0)], dtype=torch.float64)
    rope = scaled(2, call)
    close(angles(rope.at(coordinates(grid), turns(rope, how, scale, grid, t)), grid), key)


@pytest.mark.parametrize(("key", "n"), numbered("grid"))
def test_grids(key, n):
    points, shift = G.call["grids"][n]
    close(1 - Flow(shift=shift or 1.0).times(points - 1), key)


@pytest.mark.parametrize(("key", "n"), numbered("grid_sd3"))
def test_grids_of_sd3(key, n):
    """Noise at 1, as ours; with a strength below 1 it starts from a picture."""
    points, shift, strength = G.call["sd3"][n]
    close(Flow(shift=shift).times(points - 1)[int(points * (1 - strength)) :], key)


class Steps:
    """As many steps, no model."""

    methods = ()

    def __init__(self, num_steps):
        self.num_steps, self.step = num_steps, -1

    def steps(self):
        for step in range(self.num_steps):
            self.step = step
            yield step


@pytest.mark.parametrize(("key", "n"), numbered("ode"))
def test_trajectories(key, n):
    method, points, shift = G.call["ode"][n]
    process, run, states = Flow(network_time="sit", shift=shift or 1.0), Steps(points - 1), {}

    def field(x, t):
        states.setdefault(run.step, x)  # the first evaluation of a step is at its start
        return torch.sin(3 * x + process.network_time(t)) - x / 2

    last = SOLVERS[method](field, G["in/x"], process, run, lambda *a: None)
    close(torch.stack([*states.values(), last]), key)


def training(kind):
    """The process with the training times named ``kind``, and the uniform numbers from which it draws those of the file."""
    name, *numbers = kind.split("_")
    u = 1 - G["in/u"].double()
    if name == "lognorm":
        return Flow(network_time="sit", time_sampling="logit_normal"), torch.special.ndtr(-G["in/n"].double())
    if name == "shift":
        return Flow(network_time="sit", train_shift=1 / float(numbers[0])), u
    low, high = map(float, numbers or (0, 1))
    return Flow(network_time="sit", train_range=(1 - high, 1 - low)), u


@pytest.mark.parametrize("key", G.starting("out/t_"))
def test_training_times(key):
    process, u = training(key.removeprefix("out/t_"))
    close(1 - process.sample_time(u), key)


@pytest.mark.parametrize("key", G.starting("out/loss_"))
def test_losses(key):
    process, u = training(key.removeprefix("out/loss_"))
    data, noise, t = G["in/x1"], G["in/noise"], process.sample_time(u)
    x = process.add_noise(data, noise, t)
    close(process.loss(0.3 * x - 0.7 * like(process.network_time(t), x), data, noise, t).loss, key)


def test_every_tensor_is_compared():
    known = ("flag_rope", "next_imagenet_rope", "next_rope", "grid", "grid_sd3", "ode")
    seen = [key for prefix in known for key, _ in numbered(prefix)] + G.starting("out/t_") + G.starting("out/loss_")
    assert sorted(seen) == G.starting("out/")
