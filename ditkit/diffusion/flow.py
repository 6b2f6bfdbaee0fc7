"""Rectified flow (2209.03003; flow matching, 2210.02747): a straight path from data to noise, and its velocity.

x_t = (1 - t) x0 + t eps; the network says dx_t/dt = eps - x0. Training times are uniform or logit-normal (SD3, 2403.03206,
section 3.1), and may be shifted towards noise, as may the steps of a sampler: t' = s t / (1 + (s - 1) t) (SD3, eq. 23).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ditkit.core.config import Config

from .process import Coefficients, Losses, Prediction, Process, Time, as_time, flat_mean, like

TimeConvention = Literal["thousand", "unit", "sit"]


class FlowConfig(Config):
    """Defaults: uniform times, no shift, and a network that is told 1000 t (SD3, FLUX)."""

    network_time: TimeConvention = Field(
        "thousand", description="what the network is told: thousand: 1000 t; unit: t; sit: 1 - t, and its velocity is along 1 - t too"
    )
    time_sampling: Literal["uniform", "logit_normal"] = Field("uniform", description="how training times are drawn")
    logit_mean: float = Field(0.0, description="of logit-normal times; above 0 towards noise")
    logit_std: float = Field(1.0, gt=0)
    train_shift: float = Field(1.0, gt=0, description="shift of the training times; 1: none")
    shift: float = Field(1.0, gt=0, description="shift of a sampler's times; 1: none, 3: SD3")
    num_train_steps: int = Field(1000, ge=1, description="only for the spacing 'linspace', whose last step starts at 1 / num_train_steps")
    discard_half: bool = Field(False, description="the network has a second half of output channels that means nothing (SiT's learn_sigma)")


class Flow(Process):
    """See the module."""

    name = "flow"
    config_class = FlowConfig
    config: FlowConfig
    spacings = ("uniform", "linspace")
    continuous = True

    def output_channels(self, channels: int) -> int:
        return 2 * channels if self.config.discard_half else channels

    def coefficients(self, t: Time) -> Coefficients:
        t = as_time(t)
        return Coefficients(1 - t, t)

    def rates(self, t: Time) -> Coefficients:
        one = torch.ones_like(as_time(t))
        return Coefficients(-one, one)

    def network_time(self, t: Time) -> Tensor:
        return told(self.config.network_time, t)

    def sample_time(self, u: Tensor) -> Tensor:
        cfg = self.config
        if cfg.time_sampling == "logit_normal":
            tiny = 2.0**-25  # u = 0 would be t = 0 exactly
            u = torch.sigmoid(cfg.logit_mean + cfg.logit_std * torch.special.ndtri(u.clamp(tiny, 1 - tiny)))
        return shift_time(u, cfg.train_shift)

    def grid(self, num_steps: int, spacing: str) -> Tensor:
        """uniform: from 1 to 0 in equal steps; linspace: the last step starts at 1 / num_train_steps (diffusers). Then shifted, once."""
        if spacing not in self.spacings:
            raise self.refuse_spacing(spacing)
        if spacing == "linspace":
            starts = torch.linspace(1, 1 / self.config.num_train_steps, num_steps, dtype=torch.float64)
            t = torch.cat([starts, starts.new_zeros(1)])
        else:
            t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return shift_time(t, self.config.shift)

    def predict(self, output: Tensor, x_t: Tensor, t: Time) -> Prediction:
        v = self.velocity(output, x_t)
        t = as_time(t)
        return Prediction(x_t - like(t, x_t) * v, x_t + like(1 - t, x_t) * v, v)

    def loss(self, output: Tensor, x0: Tensor, eps: Tensor, t: Time) -> Losses:
        mse = flat_mean((self.velocity(output, x0) - (eps - x0)) ** 2)
        return Losses(mse, {"mse": mse})

    def velocity(self, output: Tensor, x: Tensor) -> Tensor:
        """dx_t/dt of public time."""
        v, _ = self.split(output, x)
        return -v if self.config.network_time == "sit" else v


def told(convention: TimeConvention, t: Time) -> Tensor:
    """Public time -> network time by a named convention, float32."""
    t = as_time(t)
    return {"thousand": 1000 * t, "unit": t, "sit": 1 - t}[convention].float()


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): keeps 0 and 1, moves the rest towards noise for s > 1."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)
