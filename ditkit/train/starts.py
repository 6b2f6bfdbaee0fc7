"""From a trained base to the network that the next stage trains: itself with other settings, or a PixArt from a DiT.

The stages of PixArt-alpha (2310.00426, section 2.3) and the hops of PixArt-Sigma (2403.04692, section 3.3) are recipes that begin like
this. Nothing of the base is dropped in silence: what has no place in the new network is an error.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from pydantic import Field

from ditkit.bundle import backbone_config
from ditkit.core.backbone import Backbone
from ditkit.core.config import Config
from ditkit.core.errors import ConfigError, nearest

from .recipe import Part

log = logging.getLogger("ditkit")
STARTS = ("from_dit",)


class FromDiT(Config):
    """Settings of the start from a class-conditional DiT."""

    t: float = Field(500.0, ge=0, le=1000, description="network time at which the new network modulates as the DiT does")


def started(base: Backbone, start: Part | None, new: Part | None, follows: dict[str, Any]) -> Backbone:
    """The network that is trained.

    Args:
        base: as it was trained; its methods must be merged.
        start: see ``Recipe.start``.
        new: settings of the network that differ; None: none.
        follows: settings that follow from data, process and encoder.

    Raises:
        ConfigError: there is no such start, or the base has no place in what is asked for.
    """
    if (start or new) and base.attached:
        raise ConfigError(f"the base has {base.attached[0].label} attached", allowed="a base without methods", hint="merge it first")
    if start is not None:
        if start.name not in STARTS:
            raise ConfigError(f"there is no start {start.name!r}", allowed=", ".join(STARTS), hint=nearest(start.name, STARTS))
        return from_dit(base, FromDiT.parse(start.config, "start from_dit"), new, follows)
    return base if new is None else reset(base, new, {k: v for k, v in follows.items() if k == "input_size"})


@torch.no_grad()
def reset(base: Backbone, new: Part, follows: dict[str, Any]) -> Backbone:
    """The base's network with other settings. Its weights stay; new ones (of compressed keys) start as the network starts them."""
    if new.name != base.name:
        raise ConfigError(f"backbone is {new.name}, the base is a {base.name}", allowed=base.name, hint="start: {name: from_dit}")
    cls, config = backbone_config(Part(name=base.name, config={**base.config.to_dict(), **follows, **new.config}), "recipe")
    model: Backbone = cls(config)  # type: ignore[call-arg]
    model.to(next(base.parameters()).device).encoder = base.encoder
    kept, there = base.state_dict(), model.state_dict()
    if lost := [name for name in kept if name not in there or there[name].shape != kept[name].shape]:
        found = tuple(there[lost[0]].shape) if lost[0] in there else "nothing"
        raise ConfigError(
            f"with {new.config} the weight {lost[0]} of the base, {tuple(kept[lost[0]].shape)}, has no place: there is {found}",
            allowed="settings under which all weights stay, such as input_size, position_base, position_scale, kv_ratio and kv_blocks",
        )
    fresh = sorted(set(there) - set(kept))
    if fresh:
        log.warning("%d weights are the base's, new are: %s", len(kept), ", ".join(fresh))
    model.load_state_dict({**there, **kept})
    return model


def from_dit(base: Backbone, config: FromDiT, new: Part | None, follows: dict[str, Any]) -> Backbone:
    """A PixArt with the sizes, weights and positions of the DiT (``backbones.pixart.from_dit``)."""
    from ditkit.backbones import pixart
    from ditkit.backbones.dit import DiT

    if not isinstance(base, DiT):
        raise ConfigError(f"the base is a {base.name}", allowed="a dit, for start from_dit")
    if new is not None and new.name != "pixart":
        raise ConfigError(f"backbone is {new.name}", allowed="pixart, for start from_dit")
    same = ("in_channels", "out_channels", "patch_size", "dim", "depth", "num_heads", "mlp_ratio")
    values = {name: getattr(base.config, name) for name in same}
    values["position_base"] = base.config.input_size[0] // base.config.patch_size
    values |= {name: value for name, value in follows.items() if name in pixart.PixArtConfig.model_fields and name not in same}
    values |= {} if new is None else new.config
    return pixart.from_dit(base, pixart.PixArtConfig.parse(values, "recipe: backbone pixart"), config.t)
