"""Stochastic interpolants as SiT (2401.08740) trains and samples them: three paths, and what the network says of them.

x_t = alpha x0 + sigma eps. With tau = 1 - t, which runs from noise at 0 to data at 1 (the time of the released code):

    linear  alpha = tau               sigma = 1 - tau
    gvp     alpha = sin(pi tau / 2)   sigma = cos(pi tau / 2)
    vp      log alpha = -(1 - tau)^2 (b1 - b0) / 4 - (1 - tau) b0 / 2,   sigma = sqrt(1 - alpha^2),   b0, b1 = 0.1, 20

The network says the velocity dx/dtau, the noise, or the score -eps / sigma. Steps along the path are fields of one ODE, or of
a family of SDEs with the same marginals (``euler_maruyama``). Differs from the released code where that is undefined: see
``ditkit.diffusion.sde``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ditkit.core.config import Config

from .flow import TimeConvention, told
from .process import Coefficients, Losses, Prediction, Process, Time, as_time, flat_mean, like

B0, B1 = 0.1, 20.0


class InterpolantConfig(Config):
    """Defaults: SiT's published models."""

    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "eps", "score"] = Field("velocity", description="what the output channels are")
    weighting: Literal["none", "velocity", "likelihood"] = Field(
        "none", description="of the eps and score losses: 1, (D / sigma)^2, D / sigma^2, with D of the path (SiT, appendix A)"
    )
    network_time: TimeConvention = Field("sit", description="what the network is told: sit: 1 - t; unit: t; thousand: 1000 t")
    discard_half: bool = Field(False, description="the network has a second half of output channels that means nothing (learn_sigma)")
    train_margin: float | None = Field(
        None, ge=0, lt=0.5, description="how far training times stay from the ends; none: 0 or 1e-3, for vp 1e-5 from the data"
    )
    sample_margin: float | None = Field(None, ge=0, lt=0.5, description="the same for sampling; none: 0 or 1e-3, for vp 1e-3 from the data")

    @model_validator(mode="after")
    def _fits(self) -> InterpolantConfig:
        if self.prediction == "velocity" and self.weighting != "none":
            raise ValueError(f"weighting {self.weighting} has no meaning for a velocity")
        return self


class Path(NamedTuple):
    """alpha, sigma and their derivatives in tau."""

    alpha: Tensor
    d_alpha: Tensor
    sigma: Tensor
    d_sigma: Tensor


def linear(tau: Tensor) -> Path:
    """The straight line."""
    one = torch.ones_like(tau)
    return Path(tau, one, 1 - tau, -one)


def gvp(tau: Tensor) -> Path:
    """Generalised variance preserving: a quarter circle."""
    angle, speed = tau * math.pi / 2, math.pi / 2
    return Path(angle.sin(), speed * angle.cos(), angle.cos(), -speed * angle.sin())


def vp(tau: Tensor) -> Path:
    """The variance-preserving SDE of 2011.13456."""
    left = 1 - tau
    log_alpha, half_beta = -0.25 * left**2 * (B1 - B0) - 0.5 * left * B0, 0.5 * (left * (B1 - B0) + B0)
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    return Path(alpha, alpha * half_beta, sigma, -(alpha**2) * half_beta / sigma)


PATHS: dict[str, Callable[[Tensor], Path]] = {"linear": linear, "gvp": gvp, "vp": vp}


class Interpolant(Process):
    """See the module."""

    name = "interpolant"
    config_class = InterpolantConfig
    config: InterpolantConfig
    spacings = ("uniform",)
    continuous = True

    def path(self, t: Time) -> Path:
        """The path at public time t; computed in float64 where the device has it."""
        t = as_time(t)
        return PATHS[self.config.path](1 - (t if t.device.type == "mps" else t.double()))

    def output_channels(self, channels: int) -> int:
        return 2 * channels if self.config.discard_half else channels

    def coefficients(self, t: Time) -> Coefficients:
        path = self.path(t)
        return Coefficients(path.alpha, path.sigma)

    def rates(self, t: Time) -> Coefficients:
        path = self.path(t)
        return Coefficients(-path.d_alpha, -path.d_sigma)

    def network_time(self, t: Time) -> Tensor:
        return told(self.config.network_time, t)

    def margins(self, training: bool = False) -> tuple[float, float]:
        """How far times stay from noise and from data (the released code's defaults)."""
        cfg = self.config
        given = cfg.train_margin if training else cfg.sample_margin
        if cfg.path == "vp":
            return 0.0, given if given is not None else 1e-5 if training else 1e-3
        if cfg.prediction == "velocity":
            return given or 0.0, given or 0.0
        return (1e-3, 1e-3) if given is None else (given, given)

    def sample_time(self, u: Tensor) -> Tensor:
        from_noise, from_data = self.margins(training=True)
        return 1 - from_noise - u * (1 - from_noise - from_data)

    def grid(self, num_steps: int, spacing: str) -> Tensor:
        if spacing not in self.spacings:
            raise self.refuse_spacing(spacing)
        from_noise, from_data = self.margins()
        return torch.linspace(1 - from_noise, from_data, num_steps + 1, dtype=torch.float64)

    def predict(self, output: Tensor, x_t: Tensor, t: Time) -> Prediction:
        raw, _ = self.split(output, x_t)
        path = self.path(t)
        alpha, d_alpha, sigma, d_sigma = (like(c, x_t) for c in path)
        if self.config.prediction == "velocity":  # solve x = alpha x0 + sigma eps and v = alpha' x0 + sigma' eps
            det = like(path.alpha * path.d_sigma - path.sigma * path.d_alpha, x_t)
            return Prediction((d_sigma * x_t - sigma * raw) / det, (alpha * raw - d_alpha * x_t) / det, -raw)
        eps = raw if self.config.prediction == "eps" else -sigma * raw
        x0 = (x_t - sigma * eps) / alpha
        drift, diffusion = path.d_alpha / path.alpha, path.d_alpha / path.alpha * path.sigma - path.d_sigma
        return Prediction(x0, eps, like(diffusion, x_t) * eps - like(drift, x_t) * x_t)

    def loss(self, output: Tensor, x0: Tensor, eps: Tensor, t: Time) -> Losses:
        """mean (v - alpha' x0 - sigma' eps)^2, w (eps^ - eps)^2 or w (sigma s + eps)^2 (SiT, eq. 6 and appendix A)."""
        raw, _ = self.split(output, x0)
        path = self.path(t)
        if self.config.prediction == "velocity":
            mse = flat_mean((raw - like(path.d_alpha, x0) * x0 - like(path.d_sigma, x0) * eps) ** 2)
            return Losses(mse, {"mse": mse})
        error = raw - eps if self.config.prediction == "eps" else like(path.sigma, x0) * raw + eps
        mse = flat_mean(error**2)
        return Losses(mse * self._weight(path).to(mse), {"mse": mse})

    def _weight(self, path: Path) -> Tensor:
        d = path.d_alpha / path.alpha * path.sigma**2 - path.sigma * path.d_sigma
        if self.config.weighting == "velocity":
            return (d / path.sigma) ** 2
        return d / path.sigma**2 if self.config.weighting == "likelihood" else torch.ones_like(d)
