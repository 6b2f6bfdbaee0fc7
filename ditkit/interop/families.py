"""Which backbones have other layouts: the module ``ditkit/interop/NAME.py`` holds the tables of the backbone NAME.

A family is such a module. It is named in ``FAMILIES``; nothing else here or in ``convert``, ``layouts``, ``released`` and ``verify``
knows one from another.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from torch import Tensor

from ditkit.bundle import Part, Sampling
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError

from .hints import Hints
from .tables import Shape, Table

FAMILIES = ("dit", "pixart", "mmdit", "flux", "lumina", "pt_dit", "hunyuan")
Normal = Callable[[str, tuple[int, ...]], Tensor]  # purpose, shape of one sample -> (B, *shape)


class Arguments(Protocol):
    """Arguments of the released class, a ``Config``."""

    def to_ours(self, ours: Any = None) -> Any: ...
    def to_dict(self) -> dict[str, Any]: ...


class Family(Protocol):
    """What a module of tables gives."""

    CLASS: str  # of diffusers' transformer; "": it has none
    PIPELINES: tuple[str, ...]  # diffusers' pipelines around it
    INDEX_KEYS: tuple[str, ...]  # their parts, as model_index.json names them
    SYSTEMS: tuple[str, ...]  # the released systems that share the network
    Constructor: type[Config]
    Ours: type[Config]  # what no other layout can say

    # the released layout
    def is_official(self, names: Mapping[str, Any]) -> bool: ...
    def config_from_official(self, shapes: Mapping[str, Shape], hints: Hints, where: str) -> Any: ...
    def official_table(self, config: Any) -> Table: ...
    def constructor_of(self, config: Any) -> Arguments: ...
    def ours_of(self, config: Any) -> Config: ...
    def released_defaults(self, system: str, config: Any) -> tuple[Part, Sampling]: ...
    def system_of(self, process: str, config: Any) -> str: ...

    # diffusers' layout
    def is_diffusers(self, values: Mapping[str, Any]) -> bool: ...
    def config_from_diffusers(self, values: Mapping[str, Any], where: str, as_released: bool) -> Any: ...
    def config_to_diffusers(self, config: Any) -> dict[str, Any]: ...
    def diffusers_table(self, config: Any) -> Table: ...

    # what the other side computes otherwise; and whether diffusers computes this network at all, on which inputs
    def differences(self, config: Any, to: str) -> list[str]: ...
    def has_live(self, config: Mapping[str, Any]) -> bool: ...
    def live_inputs(self, config: Any, batch: int, normal: Normal, length: int = 6) -> tuple[dict[str, Any], dict[str, Any]]: ...

    # Of some families: ``FLOW_TIME``, what a flow tells the network (then rectified flow is what was released); ``LIVE_TIMES`` and
    # ``live_call(theirs, x, t, call)``, network times at which to compare, and a call that takes more than x and time to arrange;
    # ``text_encoder(folder, config) -> Part``, the encoder of prompts that a pipeline's folder holds in ``text_encoder/`` and its like.


def family(backbone: str) -> Family:
    """The tables of a backbone. Raises DitkitError for one that has no other layout."""
    if backbone not in FAMILIES:
        raise DitkitError(f"{backbone} has no other layout than ditkit's", allowed=", ".join(FAMILIES), hint="--to ditkit")
    return cast(Family, importlib.import_module(f"ditkit.interop.{backbone}"))


def families() -> dict[str, Family]:
    """All of them, by backbone."""
    return {name: family(name) for name in FAMILIES}


def family_of_system(system: str) -> str:
    """The backbone of a released system."""
    return next(name for name, tables in families().items() if system in tables.SYSTEMS)
