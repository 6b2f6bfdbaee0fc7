"""Rectified flow (2209.03003; flow matching, 2210.02747): a straight path from data to noise, and its velocity.

x_t = (1 - t) x0 + t eps; the network says dx_t/dt = eps - x0, or with ``prediction="x0"`` the data, which are turned into that velocity
(2511.13720, table 1): among pixels data are simple and noise is not, and the network need not carry it through. Training times are
uniform, logit-normal or drawn by mode (SD3, 2403.03206, section 3.1), and may be shifted towards noise, as may the steps of a sampler:
t' = s t / (1 + (s - 1) t) (SD3, eq. 23).
More pixels need more noise to hide as much: s may grow with the resolution, by a rule of SD3 or of FLUX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ditkit.core.config import Config

from .process import Coefficients, Losses, Prediction, Process, Time, as_time, flat_mean, like

TimeConvention = Literal["thousand", "unit", "sit"]


class FlowConfig(Config):
    """Defaults: uniform times, no shift, and a network that is told 1000 t (SD3, FLUX)."""

    network_time: TimeConvention = Field(
        "thousand", description="what the network is told: thousand: 1000 t; unit: t; sit: 1 - t, and its velocity is along 1 - t too"
    )
    time_sampling: Literal["uniform", "logit_normal", "mode"] = Field("uniform", description="how training times are drawn")
    logit_mean: float = Field(0.0, description="of logit-normal times; above 0 towards noise")
    logit_std: float = Field(1.0, gt=0)
    mode_scale: float = Field(
        1.29, ge=-1, le=2 / (math.pi - 2), description="of times drawn by mode: above 0 more in the middle, below 0 more at the ends"
    )
    train_shift: float = Field(1.0, gt=0, description="shift of the training times; 1: none, below 1 towards data")
    train_range: tuple[float, float] = Field((0.0, 1.0), description="training times, 0 to 1, are brought into this range at last")
    shift: float = Field(1.0, gt=0, description="shift of a sampler's times; 1: none, 3: SD3")
    resolution: Literal["none", "sqrt", "exponential"] = Field(
        "none",
        description="a factor on both shifts by the area, the number of latent pixels. sqrt: sqrt(area / base_area) (SD3, eq. 23); "
        "exponential: e^mu, mu linear in the area (FLUX)",
    )
    base_area: int = Field(16384, ge=1, description="area at which the factor of sqrt is 1")
    mu: tuple[tuple[int, float], tuple[int, float]] = Field(
        ((1024, 0.5), (16384, 1.15)), description="two areas, and mu at each; FLUX counts tokens, of four latent pixels each: 256 and 4096"
    )
    num_train_steps: int = Field(1000, ge=1, description="only for the spacing 'linspace', whose last step starts at 1 / num_train_steps")
    prediction: Literal["velocity", "x0"] = Field("velocity", description="what the output channels are; the loss is of the velocity")
    floor: float = Field(0.05, gt=0, le=1, description="of the t that the error of an x0 is divided by to be a velocity's")
    backward: bool = Field(False, description="the network's velocity points from noise to data: x0 - eps (Qihoo-T2X)")
    discard_half: bool = Field(False, description="the network has a second half of output channels that means nothing (SiT's learn_sigma)")

    @field_validator("mu")
    @classmethod
    def _two_areas(cls, mu: tuple[tuple[int, float], tuple[int, float]]) -> tuple[tuple[int, float], tuple[int, float]]:
        if not 0 < mu[0][0] < mu[1][0]:
            raise ValueError("two ascending areas are needed")
        return mu

    @field_validator("train_range")
    @classmethod
    def _in_order(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= ends[0] < ends[1] <= 1:
            raise ValueError("two ascending times from 0 to 1 are needed")
        return ends

    @model_validator(mode="after")
    def _data_have_no_direction(self) -> FlowConfig:
        if self.prediction == "x0" and self.backward:
            raise ValueError("backward is the direction of a velocity, and prediction is 'x0'")
        return self


class Flow(Process):
    """See the module."""

    name = "flow"
    config_class = FlowConfig
    config: FlowConfig
    spacings = ("uniform", "linspace", "twice")
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

    def at(self, shape: Sequence[int]) -> Flow:
        """The flow with both shifts settled for data of ``shape`` (C, H, W)."""
        cfg = self.config
        if cfg.resolution == "none":
            return self
        area = math.prod(shape[1:])
        if cfg.resolution == "sqrt":
            factor = math.sqrt(area / cfg.base_area)
        else:
            (low, mu), (high, top) = cfg.mu
            factor = math.exp(mu + (top - mu) * (area - low) / (high - low))
        settled = {"resolution": "none", "shift": factor * cfg.shift, "train_shift": factor * cfg.train_shift}
        return Flow(cfg.model_copy(update=settled))

    def sample_time(self, u: Tensor) -> Tensor:
        cfg = self.config
        if cfg.time_sampling == "logit_normal":
            tiny = 2.0**-25  # u = 0 would be t = 0 exactly
            u = torch.sigmoid(cfg.logit_mean + cfg.logit_std * torch.special.ndtri(u.clamp(tiny, 1 - tiny)))
        elif cfg.time_sampling == "mode":
            u = 1 - u - cfg.mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)  # SD3, eq. 20
        low, high = cfg.train_range
        return low + (high - low) * shift_time(u, cfg.train_shift)

    def grid(self, num_steps: int, spacing: str) -> Tensor:
        """uniform: from 1 to 0 in equal steps; linspace: the last step starts at 1 / num_train_steps. Then shifted, once.

        twice: as linspace, where the last start has been shifted before: what diffusers' scheduler does with a static shift.
        """
        if spacing not in self.spacings:
            raise self.refuse_spacing(spacing)
        if spacing in ("linspace", "twice"):
            last = torch.tensor(1 / self.config.num_train_steps, dtype=torch.float64)
            last = shift_time(last, self.config.shift) if spacing == "twice" else last
            starts = torch.linspace(1, float(last), num_steps, dtype=torch.float64)
            t = torch.cat([starts, starts.new_zeros(1)])
        else:
            t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return shift_time(t, self.config.shift)

    def predict(self, output: Tensor, x_t: Tensor, t: Time) -> Prediction:
        t = as_time(t)
        value, _ = self.split(output, x_t)
        v = (x_t - value) / like(self.divisor(t), x_t) if self.config.prediction == "x0" else self.forward(value)
        return Prediction(x_t - like(t, x_t) * v, x_t + like(1 - t, x_t) * v, v)

    def loss(self, output: Tensor, x0: Tensor, eps: Tensor, t: Time) -> Losses:
        value, _ = self.split(output, x0)
        error = (value - x0) / like(self.divisor(as_time(t)), x0) if self.config.prediction == "x0" else self.forward(value) - (eps - x0)
        mse = flat_mean(error**2)
        return Losses(mse, {"mse": mse})

    def divisor(self, t: Tensor) -> Tensor:
        """What an error of x0 is divided by to be one of the velocity: t, but no less than the floor."""
        return t.clamp_min(self.config.floor)

    def forward(self, v: Tensor) -> Tensor:
        """The network's velocity -> dx_t/dt of public time."""
        return -v if (self.config.network_time == "sit") != self.config.backward else v


def told(convention: TimeConvention, t: Time) -> Tensor:
    """Public time -> network time by a named convention, float32."""
    t = as_time(t)
    return {"thousand": 1000 * t, "unit": t, "sit": 1 - t}[convention].float()


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): keeps 0 and 1, moves the rest towards noise for s > 1."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)
