"""A small trainable KL autoencoder for embedded data: convolutions and group norms, a diagonal Gaussian posterior.

"Auto-Encoding Variational Bayes", arXiv:1312.6114, with the light KL weight of "High-Resolution Image Synthesis with Latent
Diffusion Models", arXiv:2112.10752, section 3.1. Different from the latter: no discriminator, no perceptual loss and no
attention, since a few thousand small pictures are to be learnt in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from ..core.config import Config
from ..core.errors import DitkitError
from ..diffusion.noise import normal, uniform
from .base import Codec


class KLConfig(Config):
    """Sizes of the autoencoder, its loss, and the normalisation of its latents."""

    in_channels: int = Field(3, ge=1, le=64, description="channels of the data")
    channels: int = Field(4, ge=1, le=256, description="channels of the latents")
    dim: int = Field(32, ge=1, le=1024, description="width of the first level")
    dim_mult: tuple[int, ...] = Field(
        (1, 2, 4), min_length=1, max_length=6, description="width of each level over dim; each halves the side"
    )
    num_res_blocks: int = Field(1, ge=1, le=8, description="residual blocks a level")
    num_groups: int = Field(8, ge=1, description="groups of the group norms")
    reconstruction: Literal["l1", "l2"] = Field("l1", description="distance between a picture and its reconstruction")
    kl_weight: float = Field(1e-6, ge=0, description="weight of the KL term, both terms summed over a picture")
    scale: tuple[float, ...] = Field((1.0,), min_length=1, description="latents are (z - shift) * scale; set by calibrate")
    shift: tuple[float, ...] = Field((0.0,), min_length=1, description="see scale")

    @model_validator(mode="after")
    def _consistent(self) -> KLConfig:
        for mult in self.dim_mult:
            if mult < 1 or self.dim * mult % self.num_groups:
                raise ValueError(f"width {self.dim * mult} is no positive multiple of num_groups {self.num_groups}")
        for values in (self.scale, self.shift):
            if len(values) not in (1, self.channels):
                raise ValueError(f"scale and shift have 1 or {self.channels} numbers")
        return self


@dataclass(frozen=True)
class KLLosses:
    """Losses of each picture (B,), per number of the picture: loss = reconstruction + kl_weight * kl."""

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor


class KL(Codec):
    """Encoder and decoder with one level a width; sides are halved between levels."""

    name = "kl"
    config_class = KLConfig

    def __init__(self, config: KLConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or KLConfig()
        self.in_channels, self.channels, self.factor = c.in_channels, c.channels, 2 ** (len(c.dim_mult) - 1)
        self.scale, self.shift = c.scale, c.shift
        widths = [c.dim * m for m in c.dim_mult]
        self.encoder = _encoder(c, widths)
        self.decoder = _decoder(c, widths[::-1])

    def encode_raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std; the log-variance is held in [-30, 20]."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, (0.5 * log_variance.clamp(-30.0, 20.0)).exp()

    def decode_raw(self, z: Tensor) -> Tensor:
        """Latents (B, c, h, w) -> pictures, not clipped."""
        x: Tensor = self.decoder(z)
        return x

    def losses(self, x: Tensor, eps: Tensor) -> KLLosses:
        """The negative evidence bound on x (B, C, H, W), with one posterior sample made from eps (B, c, h, w).

        KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2, summed over latents; both terms are divided by C H W.
        """
        mean, std = self.encode_raw(x)
        error = self.decode_raw(mean + std * eps) - x
        distance = error.abs() if self.config.reconstruction == "l1" else error.square()
        reconstruction = distance.flatten(1).mean(1)
        divergence = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log())
        kl = divergence.flatten(1).sum(1) / x[0].numel()
        return KLLosses(reconstruction + self.config.kl_weight * kl, reconstruction, kl)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set ``scale`` and ``shift`` so that the latents of these pictures have mean 0 and variance 1 in each channel."""
        count, total, squares = 0, torch.zeros(self.channels, dtype=torch.float64), torch.zeros(self.channels, dtype=torch.float64)
        for x in batches:
            mean, std = (u.double().cpu() for u in self.encode_raw(x))
            count += mean.numel() // self.channels
            total += mean.sum((0, 2, 3))
            squares += (mean.square() + std.square()).sum((0, 2, 3))
        if not count:
            raise DitkitError("there are no pictures to calibrate on", hint="give at least one batch")
        centre = total / count
        deviation = (squares / count - centre.square()).clamp_min(1e-12).sqrt()
        self.shift, self.scale = tuple(centre.tolist()), tuple((1 / deviation).tolist())
        self.config = self.config.model_copy(update={"scale": self.scale, "shift": self.shift})


class _ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, dim: int, dim_out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, dim), nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, dim_out), nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.skip = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return out


def _level(c: KLConfig, dim: int, dim_out: int) -> list[nn.Module]:
    return [_ResBlock(dim if i == 0 else dim_out, dim_out, c.num_groups) for i in range(c.num_res_blocks)]


def _encoder(c: KLConfig, widths: list[int]) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Conv2d(c.in_channels, widths[0], 3, padding=1)]
    for i, width in enumerate(widths):
        if i:
            parts.append(nn.Conv2d(widths[i - 1], widths[i - 1], 3, stride=2, padding=1))
        parts += _level(c, widths[max(i - 1, 0)], width)
    return nn.Sequential(*parts, *_last(c, widths[-1], 2 * c.channels))


def _decoder(c: KLConfig, widths: list[int]) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Conv2d(c.channels, widths[0], 3, padding=1)]
    for i, width in enumerate(widths):
        if i:
            parts += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(widths[i - 1], widths[i - 1], 3, padding=1)]
        parts += _level(c, widths[max(i - 1, 0)], width)
    return nn.Sequential(*parts, *_last(c, widths[-1], c.in_channels))


def _last(c: KLConfig, dim: int, channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(c.num_groups, dim), nn.SiLU(), nn.Conv2d(dim, channels, 3, padding=1)]


class Pictures(Protocol):
    """What ``fit`` needs of a data set."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> dict[str, Any]: ...


def fit(
    codec: KL,
    dataset: Pictures,
    *,
    num_steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Train ``codec`` on the pictures "x" of ``dataset`` with AdamW, calibrate it, and return the loss of every step.

    Pictures and noise are drawn by counters from (seed, step).
    """
    optimiser = torch.optim.AdamW(codec.parameters(), lr=learning_rate, weight_decay=0.0)
    device = next(codec.parameters()).device
    history = []
    codec.train()
    for step in tqdm(range(num_steps), desc="codec", disable=not progress, delay=2):
        indices = (uniform([seed], step, "codec order", (batch_size,))[0] * len(dataset)).long().numpy()
        x = dataset.batch(indices)["x"].to(device)
        eps = normal([seed], step, "codec posterior", (len(x), *codec.latent_shape(tuple(x.shape[1:]))))[0].to(device)
        loss = codec.losses(x, eps).loss.mean()
        if not torch.isfinite(loss):
            raise DitkitError(f"the loss of the codec is {loss.item()} at step {step}", hint="lower the learning rate")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimiser.step()
        history.append(loss.item())
    codec.eval()
    starts = range(0, min(len(dataset), 4096), batch_size)
    codec.calibrate(dataset.batch(np.arange(i, min(i + batch_size, len(dataset))))["x"].to(device) for i in starts)
    return history
