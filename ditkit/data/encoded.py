"""Pictures that a codec encodes as they are drawn: latents to train on, with nothing kept on disk.

``cache_latents`` is faster wherever the codec costs something; this one also follows random crops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ditkit.diffusion.noise import normal

from .transforms import sample_seeds

if TYPE_CHECKING:
    from ditkit.codecs.base import Codec

    from . import Dataset


class Encoded:
    """A data set whose ``x`` are latents (B, c, h, w); all else (labels, captions, groups, framing, licence) is the pictures'.

    Raises:
        DitkitError: the codec takes pictures of other channels, or sides that are no multiple of its factor.
    """

    def __init__(self, data: Dataset, codec: Codec) -> None:
        self.data, self._codec = data, codec.eval()
        self.picture_shape = (data.shape[0], data.shape[1], data.shape[2])
        self.shape = codec.latent_shape(self.picture_shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "data" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def codec(self) -> Codec:
        """The codec that decodes these latents."""
        return self._codec

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """As the pictures', ``x`` the means of their posteriors."""
        batch = self.data.batch(indices)
        return {**batch, "x": self._encode(batch["x"], None)}

    def augmented(self, indices: np.ndarray, *, seed: int, step: int) -> dict[str, Tensor]:
        """As the pictures', ``x`` samples of the posteriors: functions of (seed, step, index)."""
        inner: Callable[..., dict[str, Tensor]] | None = getattr(self.data, "augmented", None)
        batch = self.data.batch(indices) if inner is None else inner(indices, seed=seed, step=step)
        seeds = sample_seeds(indices, seed)
        return {**batch, "x": self._encode(batch["x"], lambda shape: normal(seeds, step, "posterior", shape))}

    @torch.no_grad()
    def _encode(self, x: Tensor, draw: Callable[[tuple[int, ...]], Tensor] | None) -> Tensor:
        found = self._codec.encode(x.to(self._codec.device))
        mean, std = found.mean.float().cpu(), found.std.float().cpu()
        return mean if draw is None else mean + std * draw(tuple(mean.shape[1:]))
