"""EDM (2206.00364): x_t = x0 + sigma eps with a preconditioned network, table 1.

    D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4)
    c_skip = sd^2 / (sigma^2 + sd^2)   c_out = sigma sd / sqrt(sigma^2 + sd^2)   c_in = 1 / sqrt(sigma^2 + sd^2)

Public time is t = sigma / sigma_max, so that a step of Euler or Heun in t is the paper's step in sigma.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ditkit.core.config import Config

from .process import Coefficients, Losses, Prediction, Process, Time, as_time, flat_mean, like


class EDMConfig(Config):
    """Defaults: the paper's."""

    sigma_data: float = Field(0.5, gt=0, description="standard deviation of the data")
    sigma_min: float = Field(0.002, gt=0, description="where a sampler's last step starts")
    sigma_max: float = Field(80.0, gt=0, description="where sampling starts; t = 1")
    rho: float = Field(7.0, gt=0, description="of the Karras schedule; larger: more steps near the data")
    mean: float = Field(-1.2, description="of ln sigma in training")
    std: float = Field(1.2, gt=0, description="of ln sigma in training")

    @model_validator(mode="after")
    def _ordered(self) -> EDMConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        return self


class EDM(Process):
    """See the module."""

    name = "edm"
    config_class = EDMConfig
    config: EDMConfig
    spacings = ("karras", "exponential")
    continuous = True
    singular = True

    def coefficients(self, t: Time) -> Coefficients:
        t = as_time(t)
        return Coefficients(torch.ones_like(t), self.config.sigma_max * t)

    def rates(self, t: Time) -> Coefficients:
        t = as_time(t)
        return Coefficients(torch.zeros_like(t), torch.full_like(t, self.config.sigma_max))

    def network_time(self, t: Time) -> Tensor:
        return (self.coefficients(t).sigma.log() / 4).float()

    def network_input(self, x_t: Tensor, t: Time) -> Tensor:
        return like((self.coefficients(t).sigma ** 2 + self.config.sigma_data**2).rsqrt(), x_t) * x_t

    def start(self, noise: Tensor) -> Tensor:
        return self.config.sigma_max * noise

    def sample_time(self, u: Tensor) -> Tensor:
        """ln sigma ~ N(mean, std^2); beyond sigma_max (4.7 standard deviations by default) it is sigma_max."""
        tiny = 2.0**-25
        z = torch.special.ndtri(u.clamp(tiny, 1 - tiny))
        return ((self.config.mean + self.config.std * z).exp() / self.config.sigma_max).clamp(max=1.0)

    def grid(self, num_steps: int, spacing: str) -> Tensor:
        """karras: equal steps in sigma^(1 / rho) (eq. 5); exponential: in ln sigma. The last step goes from sigma_min to 0."""
        low, high, rho = self.config.sigma_min, self.config.sigma_max, self.config.rho
        if spacing == "karras":
            sigma = torch.linspace(high ** (1 / rho), low ** (1 / rho), num_steps, dtype=torch.float64) ** rho
        elif spacing == "exponential":
            sigma = torch.linspace(math.log(high), math.log(low), num_steps, dtype=torch.float64).exp()
        else:
            raise self.refuse_spacing(spacing)
        return torch.cat([sigma / high, sigma.new_zeros(1)]).clamp(max=1.0)

    def predict(self, output: Tensor, x_t: Tensor, t: Time) -> Prediction:
        raw, _ = self.split(output, x_t)
        sigma = self.coefficients(t).sigma
        skip, out = self._scales(sigma)
        x0 = like(skip, x_t) * x_t + like(out, x_t) * raw
        eps = (x_t - x0) / like(sigma, x_t)
        return Prediction(x0, eps, self.config.sigma_max * eps)

    def loss(self, output: Tensor, x0: Tensor, eps: Tensor, t: Time) -> Losses:
        """(sigma^2 + sd^2) / (sigma sd)^2 (D - x0)^2, which is (F - (x0 - c_skip x) / c_out)^2 (eq. 8)."""
        raw, _ = self.split(output, x0)
        sigma = self.coefficients(t).sigma
        skip, out = self._scales(sigma)
        x_t = self.add_noise(x0, eps, t)
        mse = flat_mean((raw - (x0 - like(skip, x0) * x_t) / like(out, x0)) ** 2)
        return Losses(mse, {"mse": mse})

    def _scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out."""
        sd, total = self.config.sigma_data, sigma**2 + self.config.sigma_data**2
        return sd**2 / total, sigma * sd * total.rsqrt()
