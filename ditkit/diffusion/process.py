"""A process: how data become noise, what a network predicts of it, and the loss.

Public time t lies in [0, 1]: 0 is data, 1 is noise. Each process owns the translation to what its network was trained on.
Training and sampling read

    x_t = process.add_noise(x0, eps, t)
    output = model(process.network_input(x_t, t), process.network_time(t), prepared)
    loss = process.loss(output, x0, eps, t).loss          # or, when sampling: process.predict(output, x_t, t)

Times are floats or tensors (B,) on any device; the coefficients are computed in float64 and cast to the data's dtype.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ditkit.core.config import Config
from ditkit.core.errors import DitkitError, nearest

Time = Tensor | float

PROCESSES = {  # name -> module, class
    "gaussian": ("gaussian", "Gaussian"),
    "flow": ("flow", "Flow"),
    "interpolant": ("interpolant", "Interpolant"),
    "edm": ("edm", "EDM"),
}


@dataclass(frozen=True)
class Losses:
    """``loss`` (B,) is what training minimises; ``parts`` (B,) are its terms, detached or not as they entered."""

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """What an output says, each (B, C, ...): the data, the noise, and the direction dx_t/dt in public time.

    The Gaussian process has no dx/dt; its velocity is alpha eps - sigma x0 (Salimans and Ho, 2202.00512). ``fraction`` places
    the log-variance of a reverse step between the smallest (0) and the largest (1) sensible one; None: the process says nothing.
    """

    x0: Tensor
    eps: Tensor
    velocity: Tensor
    fraction: Tensor | float | None = None


class Coefficients(NamedTuple):
    """x_t = alpha x0 + sigma eps; both have the shape of t."""

    alpha: Tensor
    sigma: Tensor


class Posterior(NamedTuple):
    """q(x_s | x_t, x0) = N(x0_weight x0 + x_weight x_t, small); ``large`` is the variance of q(x_t | x_s)."""

    x0_weight: Tensor
    x_weight: Tensor
    small: Tensor
    large: Tensor


def posterior(t: Coefficients, s: Coefficients) -> Posterior:
    """One step back, from t to s < t, for any alpha and sigma (VDM, 2107.00630, appendix A; for DDPM: 2006.11239, eq. 7)."""
    ratio = t.alpha / s.alpha
    large = t.sigma**2 - ratio**2 * s.sigma**2
    return Posterior(s.alpha * large / t.sigma**2, ratio * s.sigma**2 / t.sigma**2, large * s.sigma**2 / t.sigma**2, large)


def as_time(t: Time) -> Tensor:
    """A float becomes a float64 scalar tensor; a tensor stays."""
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


def like(c: Tensor, x: Tensor) -> Tensor:
    """A coefficient (), (B,) or (B, ...) with x's device, dtype and number of axes, so that it multiplies x (B, C, ...).

    A scalar on the CPU stays one: kernels on any device take it as an argument, at no copy and no loss of precision.
    """
    if c.dim() == 0 and c.device.type == "cpu":
        return c
    return c.to(device=x.device, dtype=x.dtype).reshape(*c.shape, *[1] * (x.dim() - c.dim()))


def flat_mean(x: Tensor) -> Tensor:
    """(B, ...) -> (B,): the mean over everything but the batch."""
    return x.flatten(1).mean(1)


class Process(ABC):
    """Base of all processes. A subclass gives ``coefficients``, ``network_time``, ``predict``, ``loss`` and ``grid``."""

    name: ClassVar[str]
    config_class: ClassVar[type[Config]]
    spacings: ClassVar[tuple[str, ...]]  # the first is the default
    continuous: ClassVar[bool] = False  # has dx/dt, and ``rates``
    singular: ClassVar[bool] = False  # dx/dt is not defined at t = 0
    config: Any

    def __init__(self, config: Config | None = None, **values: Any) -> None:
        if config is not None and (values or not isinstance(config, self.config_class)):
            raise DitkitError(f"{type(self).__name__} got {config!r} and {sorted(values)}", allowed=f"a {self.config_class.__name__}")
        self.config = self.config_class(**values) if config is None else config

    def output_channels(self, channels: int) -> int:
        """Channels of the network's output for data of ``channels``."""
        return channels

    @abstractmethod
    def coefficients(self, t: Time) -> Coefficients:
        """alpha and sigma at public time t, float64 (float32 where the device has no other)."""

    @abstractmethod
    def network_time(self, t: Time) -> Tensor:
        """Public time -> what the network was trained on, float32."""

    def rates(self, t: Time) -> Coefficients:
        """d alpha / dt and d sigma / dt, of continuous processes."""
        raise DitkitError(f"the {self.name} process has no rates", allowed="continuous processes: flow, interpolant, edm")

    def at(self, shape: Sequence[int]) -> Process:
        """The process for data of ``shape`` (C, H, W): times that depend on the resolution are settled (flow)."""
        return self

    def network_input(self, x_t: Tensor, t: Time) -> Tensor:
        """x_t as the network sees it; EDM scales it."""
        return x_t

    @abstractmethod
    def predict(self, output: Tensor, x_t: Tensor, t: Time) -> Prediction:
        """What the output (B, output_channels(C), ...) says of x_t (B, C, ...)."""

    @abstractmethod
    def loss(self, output: Tensor, x0: Tensor, eps: Tensor, t: Time) -> Losses:
        """The training loss of the output for x_t = add_noise(x0, eps, t)."""

    @abstractmethod
    def grid(self, num_steps: int, spacing: str) -> Tensor:
        """The times of ``times`` for one of ``spacings``."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """x_t = alpha x0 + sigma eps; x0 and eps (B, C, ...)."""
        alpha, sigma = self.coefficients(t)
        return like(alpha, x0) * x0 + like(sigma, x0) * eps

    def start(self, noise: Tensor) -> Tensor:
        """Where sampling starts, from standard normal noise (B, C, ...)."""
        return noise

    def sample_time(self, u: Tensor) -> Tensor:
        """Training times from uniform numbers u (B,) in [0, 1)."""
        return u

    def times(self, num_steps: int, spacing: str = "", times: Sequence[float] | Tensor | None = None) -> Tensor:
        """The times of a trajectory, (num_steps + 1,) float64 on the CPU: step i goes from times[i] to times[i + 1].

        Args:
            spacing: one of ``spacings``; "" is the first of them.
            times: used as given, or refused: num_steps + 1 times in [0, 1], strictly decreasing (to invert: increasing).
        """
        if num_steps < 1:
            raise DitkitError(f"num_steps is {num_steps}", allowed="1 or more")
        if times is None:
            return self.grid(num_steps, spacing or self.spacings[0])
        if spacing:
            raise DitkitError(f"times and spacing={spacing!r} are both given", allowed="one of them")
        given = torch.as_tensor(times, dtype=torch.float64).cpu()
        if given.shape != (num_steps + 1,):
            raise DitkitError(
                f"{given.numel()} times for {num_steps} steps", allowed=f"{num_steps + 1}: where each step starts, and the end"
            )
        one_way = (given.diff() < 0).all() or (given.diff() > 0).all()
        if not one_way or given.min() < 0 or given.max() > 1:
            raise DitkitError(f"times are {given.tolist()}", allowed="strictly decreasing, in [0, 1] (0 is data, 1 is noise)")
        return given

    def refuse_spacing(self, spacing: str) -> DitkitError:
        """The error for a spacing this process does not know."""
        return DitkitError(
            f"the {self.name} process has no spacing {spacing!r}", allowed=", ".join(self.spacings), hint=nearest(spacing, self.spacings)
        )

    def split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output's first C channels and the others; raises DitkitError if its shape is not what the process expects."""
        channels = x.shape[1]
        expected = (len(x), self.output_channels(channels), *x.shape[2:])
        if tuple(output.shape) != expected:
            raise DitkitError(
                f"the network's output is {tuple(output.shape)} for x {tuple(x.shape)}",
                allowed=f"{expected} with the {self.name} process",
                hint="out_channels of the backbone and the process must fit",
            )
        return output[:, :channels], output[:, channels:]


def process_from(name: str, config: Mapping[str, Any] | None = None) -> Process:
    """The process registered under ``name``, from its plain configuration. Raises DitkitError for what does not exist."""
    if name not in PROCESSES:
        raise DitkitError(f"there is no process {name!r}", allowed=", ".join(PROCESSES), hint=nearest(name, PROCESSES))
    module, cls = PROCESSES[name]
    process: type[Process] = getattr(importlib.import_module(f"ditkit.diffusion.{module}"), cls)
    return process(process.config_class.parse(dict(config or {}), f"process {name}"))
