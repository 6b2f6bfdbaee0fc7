"""Solvers against diffusers' schedulers, live, on a made-up network in float32."""

import numpy as np
import pytest
import torch
from golden import relative

from ditkit.bundle import BundleConfig, DataCard, Part
from ditkit.core.errors import DitkitError
from ditkit.diffusion.edm import EDM
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.solvers import SOLVERS
from ditkit.interop.schedulers import read_scheduler, write_scheduler
from ditkit.interop.verify import quiet_imports

with quiet_imports():
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EDMEulerScheduler,
        FlowMatchEulerDiscreteScheduler,
        SASolverScheduler,
    )
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:__array__ implementation")]  # diffusers with numpy 2
TOLERANCE = 1e-4
SHAPE = (2, 3, 5, 4)
NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


class Steps:
    """As many steps, no model."""

    methods = ()

    def __init__(self, num_steps):
        self.num_steps = num_steps

    def steps(self):
        yield from range(self.num_steps)


def network(x, t, learned=False):
    """Smooth in x and in the network's time; a second half of channels if ``learned``."""
    out = 0.9 * x + 0.3 * torch.sin(3 * x + t / 300)
    return torch.cat([out, torch.cos(2 * x)], 1) if learned else out


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def ours(name, process, num_steps, learned=False, noise_seed=1, noise_at_each_step=False, **options):
    """The states after each step. ``noise_at_each_step``: the other side draws where it needs none, too."""
    states, g = [], torch.Generator().manual_seed(noise_seed)
    drawn = [torch.randn(SHAPE, generator=g) for _ in range(num_steps)] if noise_at_each_step else None

    def denoise(x, t):
        states.append(x)
        return network(process.network_input(x, t), process.network_time(t), learned)

    def draw(step, purpose):
        return torch.randn(SHAPE, generator=g) if drawn is None else drawn[step]

    final = SOLVERS[name](denoise, process.start(start()), process, Steps(num_steps), draw, **options)
    return torch.stack([*states[1:], final])


def theirs(scheduler, learned=False, noise_seed=1, scale=1.0, noisy=True):
    states, x, g = [], scale * start(), torch.Generator().manual_seed(noise_seed)
    for t in scheduler.timesteps:
        inner = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = network(inner, t, learned)
        x = scheduler.step(out, t, x, generator=g).prev_sample if noisy else scheduler.step(out, t, x).prev_sample
        states.append(x)
    return torch.stack(states)


def same(a, b):
    assert relative(a[-1], b[-1]) <= TOLERANCE
    assert relative(a, b) <= TOLERANCE


VARIANCES = {"learned": "learned_range", "fixed_small": "fixed_small", "fixed_large": "fixed_large"}


@pytest.mark.parametrize("variance", list(VARIANCES))
@pytest.mark.parametrize(("num_steps", "spacing"), [(250, "linspace"), (50, "leading")])
def test_ddpm(variance, num_steps, spacing):
    scheduler = DDPMScheduler(variance_type=VARIANCES[variance], clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    process, learned = Gaussian(variance=variance), variance == "learned"
    same(ours("ddpm", process, num_steps, learned, spacing=spacing), theirs(scheduler, learned))


@pytest.mark.parametrize("prediction", list(NAMES))
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddim(prediction, schedule):
    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type=NAMES[prediction], clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    process = Gaussian(schedule=schedule, prediction=prediction, variance="fixed_small", beta_range=(1e-4, 0.02))
    same(ours("ddim", process, 50, spacing="trailing"), theirs(scheduler))


def test_ddim_with_noise():
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(50)
    states, x, g = [], start(), torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, eta=0.7, generator=g).prev_sample
        states.append(x)
    same(ours("ddim", Gaussian(variance="fixed_small"), 50, spacing="leading", eta=0.7), torch.stack(states))


@pytest.mark.parametrize(("cls", "solver"), [(DDIMScheduler, "ddim"), (DDPMScheduler, "ddpm")], ids=["ddim", "ddpm"])
def test_steps_offset(cls, solver, tmp_path):
    """As Hunyuan-DiT's scheduler has it: its file is read so, written back so, and samples so; levels beyond the last are refused."""
    cls(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear", prediction_type="v_prediction").save_config(tmp_path)
    process, sampling = read_scheduler(tmp_path / "scheduler_config.json", learned=False)
    assert (sampling.solver, sampling.options) == (solver, {"spacing": "leading+1", "clip": False})
    config = BundleConfig(backbone=Part(name="dit"), process=process, data=DataCard(name="x", shape=(4, 8, 8)), sampling=sampling)
    scheduler = cls.from_config(write_scheduler(config))
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[-1] == 1
    made = Gaussian(**{**process.config, "variance": "fixed_small"})
    same(ours(solver, made, 50, spacing="leading+1"), theirs(scheduler))
    with pytest.raises(DitkitError, match="starts at level 1000"):
        made.times(1000, "leading+1")


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("prediction", list(NAMES))
@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_dpm_plus_plus(prediction, num_steps, order):
    scheduler = DPMSolverMultistepScheduler(prediction_type=NAMES[prediction], solver_order=order)
    scheduler.set_timesteps(num_steps)
    times = torch.cat([(scheduler.timesteps + 1).double() / 1000, torch.zeros(1)])
    process = Gaussian(prediction=prediction, variance="fixed_small")
    same(ours(f"dpm++{order}m", process, num_steps, times=times), theirs(scheduler, noisy=False))


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (2, 2), (3, 3), (3, 2)])
def test_sa(tau, predictor, corrector):
    """diffusers ends at level 0 instead of at data, and asks where a step starts whether tau counts, we where it ends."""
    scheduler = SASolverScheduler(
        predictor_order=predictor, corrector_order=corrector, tau_func=lambda t: torch.tensor(tau if 200 <= t <= 800 else 0.0)
    )
    scheduler.set_timesteps(50)
    times = (torch.cat([scheduler.timesteps, torch.zeros(1, dtype=torch.long)]) + 1).double() / 1000
    inside = ((scheduler.timesteps >= 200) & (scheduler.timesteps <= 800)).nonzero().flatten()
    interval = (float(times[inside[-1] + 1]), float(times[inside[0] + 1]))
    process = Gaussian(variance="fixed_small")
    options = dict(tau=tau, tau_interval=interval, predictor_order=predictor, corrector_order=corrector)
    same(ours("sa", process, 50, times=times, noise_at_each_step=True, **options), theirs(scheduler))


def test_solver_order_is_read_and_written(tmp_path):
    DPMSolverMultistepScheduler(solver_order=3).save_config(tmp_path)
    process, sampling = read_scheduler(tmp_path / "scheduler_config.json", learned=False)
    assert (sampling.solver, sampling.options) == ("dpm++3m", {"spacing": "dpm"})
    config = BundleConfig(backbone=Part(name="dit"), process=process, data=DataCard(name="x", shape=(4, 8, 8)), sampling=sampling)
    assert DPMSolverMultistepScheduler.from_config(write_scheduler(config)).config.solver_order == 3


def test_dpm_plus_plus_2m_on_a_flow():
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.set_timesteps(20)
    process = Flow()
    got = ours("dpm++2m", process, 20, times=scheduler.sigmas)
    scheduler.timesteps = scheduler.sigmas[:-1] * 1000  # diffusers rounds the times it tells the network
    states, x = [], start()
    for i, t in enumerate(scheduler.timesteps):
        scheduler._step_index = i
        x = scheduler.step(network(x, t), t, x).prev_sample
        states.append(x)
    same(got, torch.stack(states))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(50)
    same(ours("euler", Flow(), 50, times=scheduler.sigmas), theirs(scheduler, noisy=False))


def test_flow_match_times():
    """Without a shift the tables are equal; with one, diffusers shifts the end points twice (A03), and we once."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(50)
    assert (Flow().times(50, "linspace") - scheduler.sigmas).abs().max() < 1e-6
    built = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas
    assert (Flow(shift=3.0).times(1000, "linspace")[:-1] - built).abs().max() < 1e-6


@pytest.mark.parametrize("num_steps", [4, 28])
def test_flow_match_times_of_a_static_shift(num_steps):
    """As diffusers samples SD3: its range comes from a table that is shifted already (A03)."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    assert (Flow(shift=3.0).times(num_steps, "twice") - scheduler.sigmas).abs().max() < 1e-6
    assert num_steps != 28 or float(scheduler.sigmas[-2]) == pytest.approx(0.0089, abs=1e-4)
    same(ours("euler", Flow(shift=3.0), num_steps, spacing="twice"), theirs(scheduler, noisy=False))


@pytest.mark.parametrize("sides", [(32, 32), (64, 96), (160, 160)])
def test_flow_match_times_of_a_dynamic_shift(sides):
    """As diffusers samples FLUX: steps 1, 1 - 1/n, ... 1/n, shifted by e^mu, mu linear in the tokens."""
    scheduler, n = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), 12
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / n, n), mu=calculate_shift(sides[0] * sides[1] // 4))
    assert (Flow(resolution="exponential").at((16, *sides)).times(n) - scheduler.sigmas).abs().max() < 1e-6


def test_edm_euler():
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(50)
    process = EDM()
    assert (80 * process.times(50) - scheduler.sigmas).abs().max() < 1e-4
    same(ours("euler", process, 50), theirs(scheduler, scale=80.0, noisy=False))


@pytest.mark.parametrize("num_steps", [10, 20, 25])
def test_dpm_solver_times(num_steps):
    """Its "linspace" is our spacing dpm: the last of the evenly spaced levels is left out."""
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(num_steps)
    assert Gaussian().network_time(Gaussian().times(num_steps, "dpm")[:-1]).tolist() == scheduler.timesteps.tolist()
    scheduler = DPMSolverMultistepScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    assert Gaussian().network_time(Gaussian().times(num_steps, "trailing")[:-1]).tolist() == scheduler.timesteps.tolist()
