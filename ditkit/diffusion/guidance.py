"""Classifier-free guidance (2207.12598): u + s (c - u), from the network's outputs with and without conditioning.

Scale 0 is the unconditional model, 1 the conditional one. A network into which guidance was distilled (2210.03142) is told a scale
instead, in one pass. Output channels beyond the data's (a learned variance) come from
the conditional pass and are not guided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.run import Run

from .process import Process, Time, as_time

Denoise = Callable[[Tensor, Time], Tensor]


class Guidance(Config):
    """How the two predictions are combined."""

    scale: float = Field(1.0, description="s in u + s (c - u); 0: unconditional, 1: conditional, no second pass")
    channels: Literal["all"] | int = Field(
        "all",
        description="guide all channels, or the first n; the rule of the released DiT and SiT is 3, which their published scores need",
    )
    rescale: float = Field(0.0, ge=0, le=1, description="how far the guided output's deviation is brought back (2305.08891, section 3.4)")
    interval: tuple[float, float] = Field((0.0, 1.0), description="guide only where low <= t <= high, public time (2404.07724)")
    batched: bool = Field(False, description="one forward of twice the batch instead of two")
    told: float | None = Field(None, ge=0, description="scale that a network with an input for it is told (FLUX-dev); None: its own")

    @model_validator(mode="after")
    def _in_range(self) -> Guidance:
        if self.channels != "all" and self.channels < 1:
            raise ValueError(f"channels {self.channels} is less than 1")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"interval {self.interval} is not 0 <= low <= high <= 1")
        return self


def guided(
    model: Any, process: Process, guidance: Guidance, run: Run, cond: Mapping[str, Any], null: Mapping[str, Any] | None = None
) -> Denoise:
    """``denoise(x, t) -> output``: the guided network output, after ``run.close``, in x's dtype.

    Args:
        model: a backbone or a view of one.
        cond: conditioning by name, as ``model.prepare`` takes it.
        null: the same for no conditioning (``model.null``); may be None at scale 1.

    x is (B, C, ...), t public time: a float or (B,).
    """
    if guidance.scale != 1 and null is None:
        raise DitkitError(
            f"guidance scale {guidance.scale} needs the unconditional prediction", hint="scale 1, or a model with a null condition"
        )
    return _Guided(model, process, guidance, run, cond, null)


class _Guided:
    def __init__(
        self, model: Any, process: Process, guidance: Guidance, run: Run, cond: Mapping[str, Any], null: Mapping[str, Any] | None
    ) -> None:
        self.model, self.process, self.guidance, self.run = model, process, guidance, run
        self.sources = {"cond": cond, "null": null or {}}
        self.prepared: dict[str, Any] = {}  # pass -> what model.prepare made, once a run

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        t = as_time(t).expand(len(x))
        scale = self._scale(t)
        if scale is None:
            return self.run.close(self._forward(x, t, "cond"))
        if self.guidance.batched:
            c, u = self._forward(torch.cat([x, x]), torch.cat([t, t]), "cond+null").chunk(2)
        else:
            c, u = self._forward(x, t, "cond"), self._forward(x, t, "null")
        return self.run.close(combine(c, u, scale, self._channels(x), self.guidance.rescale))

    def _scale(self, t: Tensor) -> Tensor | float | None:
        """The scale for each sample; None where no sample needs the null pass."""
        low, high = self.guidance.interval
        inside = (t >= low) & (t <= high)
        if self.guidance.scale == 1 or not inside.any():
            return None
        return self.guidance.scale if inside.all() else torch.where(inside, self.guidance.scale, 1.0)

    def _channels(self, x: Tensor) -> tuple[int, int]:
        """How many channels are guided, and how many the data have."""
        channels = x.shape[1]
        chosen = channels if self.guidance.channels == "all" else self.guidance.channels
        if chosen > channels:
            raise DitkitError(f"guidance on {chosen} channels of data with {channels}", allowed=f"'all', or 1 to {channels}")
        return chosen, channels

    def _forward(self, x: Tensor, t: Tensor, name: str) -> Tensor:
        if name not in self.prepared:
            told = {} if self.guidance.told is None else {"guidance": self.guidance.told}
            self.prepared[name] = self.model.prepare(**self._conditioning(name), **told)
        h = self.process.network_input(x, t).to(_dtype(self.model, x))
        time = self.process.network_time(t).to(x.device)
        return self.model(h, time, self.prepared[name], run=self.run, guidance_pass=name).to(x.dtype)

    def _conditioning(self, name: str) -> Mapping[str, Any]:
        if name != "cond+null":
            return self.sources[name]
        cond, null = self.sources["cond"], self.sources["null"]
        if cond.keys() != null.keys():
            raise DitkitError(
                f"conditioning {sorted(cond)} and null {sorted(null)} differ", hint="batched=False, or the same names in both"
            )
        return {key: torch.cat([cond[key], null[key]]) for key in cond}


def _dtype(model: Any, x: Tensor) -> torch.dtype:
    """The floating dtype the network computes in; a plain callable gets x as it is."""
    if not isinstance(model, nn.Module):
        return x.dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)


def combine(c: Tensor, u: Tensor, scale: Tensor | float, channels: tuple[int, int], rescale: float = 0.0) -> Tensor:
    """u + s (c - u) on the first ``channels[0]`` of the data's ``channels[1]``; all others are c's.

    Rescaling brings the deviation of each sample's data channels back to that of c, by the part ``rescale``.
    """
    chosen, data = channels
    if isinstance(scale, Tensor):
        scale = scale.to(c).reshape(-1, *[1] * (c.dim() - 1))
    c_part, u_part = c[:, :chosen], u[:, :chosen]
    g = torch.cat([u_part + scale * (c_part - u_part), c[:, chosen:data]], 1)
    if rescale:
        back = g * (_std(c[:, :data]) / _std(g))
        g = rescale * back + (1 - rescale) * g
    return torch.cat([g, c[:, data:]], 1) if c.shape[1] > data else g


def _std(x: Tensor) -> Tensor:
    """(B, 1, ...): each sample's deviation."""
    return x.flatten(1).std(1).reshape(-1, *[1] * (x.dim() - 1))
