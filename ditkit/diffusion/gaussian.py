"""The Gaussian process of DDPM (2006.11239) and Improved DDPM (2102.09672), as DiT (2212.09748) trains it.

x_t = sqrt(abar_n) x0 + sqrt(1 - abar_n) eps at the index n = 0 .. T - 1; index n is public t = (n + 1) / T, and t = 0 is data.
Between these levels log abar is linear in t and the network is told the fractional index (as DPM-Solver does).
The network says eps (or x0, or v) and, in a second half of its channels, where the log-variance of a reverse step lies
between that of the posterior and that of the noising step. The variance learns from the variational bound alone.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ditkit.core.config import Config
from ditkit.core.errors import DitkitError

from .process import Coefficients, Losses, Prediction, Process, Time, as_time, flat_mean, like, posterior
from .respacing import respace

Schedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


class GaussianConfig(Config):
    """Defaults: DiT's."""

    num_train_steps: int = Field(1000, ge=2, le=100_000, description="T, the number of noise levels")
    schedule: Schedule = Field("linear", description="the table of betas; scaled_linear is linear in sqrt(beta)")
    beta_range: tuple[float, float] | None = Field(
        None, description="first and last beta of a linear table; none: (1e-4, 0.02), multiplied by 1000 / T"
    )
    prediction: Literal["eps", "x0", "v"] = Field("eps", description="what the first C output channels are")
    variance: Literal["learned", "fixed_large", "fixed_small"] = Field(
        "learned", description="learned: a second half of the output channels; fixed: the noising step's or the posterior's"
    )
    loss: Literal["mse", "rescaled_mse", "kl", "rescaled_kl"] = Field(
        "mse", description="mse: plus the bound where the variance is learned; rescaled: the bound times T (times T / 1000 beside mse)"
    )


def make_betas(schedule: Schedule, steps: int, beta_range: tuple[float, float] | None = None) -> Tensor:
    """The table of betas, float64 (steps,)."""
    first, last = beta_range or (1e-4 * 1000 / steps, 0.02 * 1000 / steps)
    if schedule == "linear":
        betas = torch.linspace(first, last, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    else:
        f = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008).div(1.008).mul(math.pi / 2).cos() ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    if not ((betas > 0) & (betas < 1)).all():
        raise DitkitError(f"betas from {first} to {last} for {steps} steps", allowed="all between 0 and 1", hint="set beta_range")
    return betas


@dataclass(frozen=True)
class Tables:
    """The chain of a process, float64 (K,): entry i is its i-th noise level, ``index[i]`` that level's index in training."""

    betas: Tensor
    index: Tensor
    alphas_cumprod: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    posterior_variance: Tensor

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor, index: Tensor, betas: Tensor | None = None) -> Tables:
        """From abar; beta_i = 1 - abar_i / abar_{i-1} where no betas are given (Improved DDPM, eq. 19)."""
        before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        q = posterior(*(Coefficients(a.sqrt(), (1 - a).sqrt()) for a in (alphas_cumprod, before)))
        betas = 1 - alphas_cumprod / before if betas is None else betas
        return cls(betas, index, alphas_cumprod, q.x0_weight, q.x_weight, q.small)

    def respaced(self, index: list[int]) -> Tables:
        """The chain of the levels ``index`` only, ascending."""
        kept = torch.tensor(index)
        return Tables.from_alphas_cumprod(self.alphas_cumprod[kept], self.index[kept])

    @property
    def posterior_log_variance_clipped(self) -> Tensor:
        """log of the posterior variance; entry 0, which is log 0, is replaced by entry 1."""
        return self.posterior_variance[[min(1, len(self.betas) - 1), *range(1, len(self.betas))]].log()

    @property
    def sqrt_recip_alphas_cumprod(self) -> Tensor:
        return self.alphas_cumprod.rsqrt()

    @property
    def sqrt_recipm1_alphas_cumprod(self) -> Tensor:
        return (1 / self.alphas_cumprod - 1).sqrt()

    def posterior_mean(self, x0: Tensor, x_t: Tensor, i: Tensor) -> Tensor:
        """The mean of q(x_{i-1} | x_i, x0); i (B,)."""
        return like(at(self.posterior_mean_coef1, i), x0) * x0 + like(at(self.posterior_mean_coef2, i), x0) * x_t

    def log_variance(self, fraction: Tensor | float, i: Tensor, x: Tensor) -> Tensor:
        """fraction log beta + (1 - fraction) log beta~, like x (Improved DDPM, eq. 15); fraction 1 is "fixed large", 0 "fixed small"."""
        small, large = self.posterior_log_variance_clipped, self.betas.log()
        if not isinstance(fraction, Tensor) and fraction == 1:  # a fixed variance replaces entry 0, the learned one does not
            large = torch.cat([small[:1], large[1:]])
        small, large = (like(at(table, i), x) for table in (small, large))
        return (fraction * large + (1 - fraction) * small).expand_as(x)


def at(table: Tensor, i: Tensor) -> Tensor:
    """table[i] on i's device."""
    return _on(table, i.device)[i]


def _on(table: Tensor, device: torch.device) -> Tensor:
    return table.to(device, torch.float32 if device.type == "mps" else torch.float64)


class Gaussian(Process):
    """See the module. ``tables`` holds the whole chain of T levels."""

    name = "gaussian"
    config_class = GaussianConfig
    config: GaussianConfig
    spacings = ("linspace", "ddim", "leading", "trailing", "dpm")  # of those that end at data

    def __init__(self, config: GaussianConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        cfg = self.config
        betas = make_betas(cfg.schedule, cfg.num_train_steps, cfg.beta_range)
        self.tables = Tables.from_alphas_cumprod((1 - betas).cumprod(0), torch.arange(len(betas)), betas)
        self._log_abar = torch.cat([betas.new_zeros(1), self.tables.alphas_cumprod.log()])  # entry n + 1, so that entry 0 is data
        self._known: dict[float, Coefficients] = {}

    def output_channels(self, channels: int) -> int:
        return 2 * channels if self.config.variance == "learned" else channels

    def index(self, t: Time) -> Tensor:
        """The nearest index n of public time t = (n + 1) / T."""
        return (self._place(t).round().long() - 1).clamp(min=0)

    def _place(self, t: Time) -> Tensor:
        """t T, in float32 or more, on a level where rounding has moved it off one."""
        place = as_time(t) * self.config.num_train_steps
        return torch.where((place - place.round()).abs() < 1e-3, place.round(), place)

    def coefficients(self, t: Time) -> Coefficients:
        t = as_time(t)
        if t.dim() or t.device.type != "cpu":
            return self._coefficients(t)
        key = float(t)  # the few times of a trajectory are asked for again and again
        if key not in self._known:
            with torch.inference_mode(False):  # what is kept may be needed with gradients later
                self._known[key] = self._coefficients(torch.tensor(key, dtype=torch.float64))
        return self._known[key]

    def _coefficients(self, t: Tensor) -> Coefficients:
        place = self._place(t)
        low = place.floor().long().clamp(0, self.config.num_train_steps - 1)
        start, end = at(self._log_abar, low), at(self._log_abar, low + 1)
        log_abar = start + (place - low) * (end - start)
        return Coefficients((log_abar / 2).exp(), (-torch.expm1(log_abar)).sqrt())

    def network_time(self, t: Time) -> Tensor:
        return (self._place(t) - 1).float()

    def sample_time(self, u: Tensor) -> Tensor:
        steps = self.config.num_train_steps
        return ((u * steps).floor() + 1).clamp(max=steps) / steps

    def grid(self, num_steps: int, spacing: str) -> Tensor:
        """``spacing``: linspace (the official "K"), ddim (the official "ddimK"), leading, trailing and dpm (diffusers'), "leading+1"
        (all levels one up: diffusers' steps_offset), or the official sections ("10,15,20", whose sum must be num_steps). One step of
        linspace starts at t = 1. uniform and logsnr: equal steps of t or of log(alpha / sigma) from t = 1 to 1 / T, between levels too, as
        the released DPM-Solver has them (PixArt): not to data."""
        steps = self.config.num_train_steps
        if spacing == "linspace":
            index = respace(steps, str(num_steps)) if num_steps > 1 else [steps - 1]
        elif spacing == "ddim":
            index = respace(steps, f"ddim{num_steps}")
        elif spacing == "uniform":
            return torch.linspace(1, 1 / steps, num_steps + 1, dtype=torch.float64)
        elif spacing == "logsnr":
            return self._equal_log_ratios(num_steps)
        elif spacing in ("leading", "trailing", "dpm"):
            index = respace(steps, f"{spacing}{num_steps}")
        elif re.fullmatch(r"leading\+\d+", spacing):
            index = [n + int(spacing.removeprefix("leading+")) for n in respace(steps, f"leading{num_steps}")]
            if index[-1] >= steps:
                raise DitkitError(f"spacing {spacing!r} of {num_steps} steps starts at level {index[-1]}", allowed=f"0 to {steps - 1}")
        elif spacing.replace(",", "").replace(" ", "").isdigit():
            index = respace(steps, spacing)
        else:
            raise self.refuse_spacing(spacing)
        if len(index) != num_steps:
            raise DitkitError(f"spacing {spacing!r} has {len(index)} steps, not {num_steps}", hint=f"num_inference_steps={len(index)}")
        return torch.tensor([*reversed([n + 1 for n in index]), 0], dtype=torch.float64) / steps

    def _equal_log_ratios(self, num_steps: int) -> Tensor:
        """From t = 1 to 1 / T such that log(alpha / sigma) = -log(1 / abar - 1) / 2 rises in equal steps."""
        log_abar = self._log_abar[1:]  # falls with t
        ratio = -torch.expm1(-log_abar).log() / 2
        wanted = torch.linspace(float(ratio[-1]), float(ratio[0]), num_steps + 1, dtype=torch.float64)
        known = -torch.nn.functional.softplus(-2 * wanted)
        place = np.interp(-known.numpy(), -log_abar.numpy(), np.arange(1, len(log_abar) + 1))
        return torch.from_numpy(place) / len(log_abar)

    def predict(self, output: Tensor, x_t: Tensor, t: Time) -> Prediction:
        raw, rest = self.split(output, x_t)
        alpha, sigma = self.coefficients(t)
        a, s = like(alpha, x_t), like(sigma, x_t)
        if self.config.prediction == "eps":
            x0, eps = like(1 / alpha, x_t) * x_t - like(sigma / alpha, x_t) * raw, raw
        elif self.config.prediction == "x0":
            x0, eps = raw, like(1 / sigma, x_t) * x_t - like(alpha / sigma, x_t) * raw
        else:
            x0, eps = a * x_t - s * raw, s * x_t + a * raw
        fixed = 1.0 if self.config.variance == "fixed_large" else 0.0
        return Prediction(x0, eps, a * eps - s * x0, (rest + 1) / 2 if self.config.variance == "learned" else fixed)

    def loss(self, output: Tensor, x0: Tensor, eps: Tensor, t: Time) -> Losses:
        """mse (eps, x0 or v) + vb, whose mean is detached; or the bound alone (kl), times T if rescaled."""
        cfg, x_t = self.config, self.add_noise(x0, eps, t)
        if cfg.loss in ("kl", "rescaled_kl"):
            vb = self.bound(output, x0, x_t, t)
            return Losses(vb * cfg.num_train_steps if cfg.loss == "rescaled_kl" else vb, {"vb": vb})
        raw, rest = self.split(output, x_t)
        mse = flat_mean((self.target(x0, eps, t) - raw) ** 2)
        if cfg.variance != "learned":
            return Losses(mse, {"mse": mse})
        vb = self.bound(torch.cat([raw.detach(), rest], 1), x0, x_t, t)
        if cfg.loss == "rescaled_mse":
            vb = vb * (cfg.num_train_steps / 1000)
        return Losses(mse + vb, {"mse": mse, "vb": vb})

    def target(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """What the first C channels should be."""
        if self.config.prediction == "v":
            alpha, sigma = self.coefficients(t)
            return like(alpha, x0) * eps - like(sigma, x0) * x0
        return eps if self.config.prediction == "eps" else x0

    def bound(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Time) -> Tensor:
        """(B,) one term of the variational bound in bits per dimension: KL(q || p), and at index 0 -log p(x0)."""
        i = self.index(t).expand(len(x0))
        p = self.predict(output, x_t, t)
        fraction = 0.0 if p.fraction is None else p.fraction
        mean = self.tables.posterior_mean(p.x0, x_t, i)
        log_var = self.tables.log_variance(fraction, i, x0)
        true_mean = self.tables.posterior_mean(x0, x_t, i)
        true_log_var = like(at(self.tables.posterior_log_variance_clipped, i), x0)
        kl = flat_mean(normal_kl(true_mean, true_log_var, mean, log_var))
        nll = -flat_mean(discrete_log_likelihood(x0, mean, 0.5 * log_var))
        return torch.where(i.to(x0.device) == 0, nll, kl) / math.log(2)

    def prior_bpd(self, x0: Tensor) -> Tensor:
        """(B,) KL of q(x_T | x0) to N(0, 1), bits per dimension: the bound's only term without the network."""
        alpha, sigma = (float(c) for c in self.coefficients(1.0))
        zero = x0.new_zeros(())
        return flat_mean(normal_kl(alpha * x0, zero + 2 * math.log(sigma), zero, zero)) / math.log(2)


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)), elementwise, in nats."""
    return 0.5 * (-1 + log_var2 - log_var1 + (log_var1 - log_var2).exp() + (mean1 - mean2) ** 2 * (-log_var2).exp())


def discrete_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the Gaussian's mass in the bin x +- 1/255, with open tails beyond +-0.999 (DDPM, eq. 13), elementwise, in nats.

    The normal distribution function is the tanh approximation that the released code uses; masses are clamped at 1e-12.
    """
    centred, inv_scale = x - mean, (-log_scale).exp()
    upper, lower = _tanh_cdf(inv_scale * (centred + 1 / 255)), _tanh_cdf(inv_scale * (centred - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _tanh_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
