"""What runs on what in the contract tests: networks, methods with their settings, and the views that are compared."""

from __future__ import annotations

import itertools
import os
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.core import registry
from ditkit.core.backbone import Backbone, count_graphs
from ditkit.core.errors import Conflict
from ditkit.core.method import Method
from ditkit.core.view import with_methods

from .trajectory import STEPS, Counted, sample

PAIR_BACKBONES = ("dit", "two_streams")
CAPTURED = ("fora", "int8", "lora")  # a cache, a replaced layer, a layer beside
ON_VARIANTS = {"fora", "lora"}  # one that keeps branches, one that adds to every projection: what other blocks could get wrong
MATRIX = bool(os.environ.get("DITKIT_MATRIX"))
LAYERS = ("plan", "feed", "reads", "fresh", "keys", "replace", "predict", "trunk", "block", "update", "branch", "attend", "linear", "mask")
BACKBONES = sorted(registry.entries("backbones"))
METHODS = [(name, i) for name in sorted(registry.entries("methods")) for i in range(len(registry.get("methods", name).tiny()))]  # type: ignore[attr-defined]
OFF = [(name, i) for name in sorted(registry.entries("methods")) for i in range(len(registry.get("methods", name).off()))]  # type: ignore[attr-defined]
PAIRS = [(a, b) for a, b in itertools.combinations(METHODS, 2) if a[0] != b[0] and a[1] == b[1] == 0]


@cache
def tinies(backbone: str) -> dict[str, Backbone]:
    cls: Any = registry.get("backbones", backbone)
    return cls.tinies()


def tiny(backbone: str) -> Backbone:
    """``dit`` or, for another network that its config can choose, ``dit:adaln``."""
    name, _, variant = backbone.partition(":")
    return tinies(name)[variant]


@cache
def of_base(backbone: str, scale: float = 1.0, num_steps: int = STEPS) -> Tensor:
    """The end of the base's trajectory, computed once."""
    return sample(tiny(backbone), scale=scale, num_steps=num_steps)


VARIANTS = [f"{name}:{variant}" if variant else name for name in BACKBONES for variant in tinies(name)]


def by_default(backbone: str, case: tuple[str, int]) -> bool:
    """Whether a method's setting runs on a network unless everything does."""
    if backbone in PAIR_BACKBONES:
        return True
    return case[1] == 0 and (backbone in BACKBONES or case[0] in ON_VARIANTS)


def make(case: tuple[str, int]) -> Method:
    """A fresh instance, its learned numbers drawn so that it does something."""
    cls: Any = registry.get("methods", case[0])
    return cls.tiny()[case[1]]


def view_of(backbone: str, *cases: tuple[str, int]) -> Backbone:
    """The tiny backbone with these methods. Skips what cannot meet: that a reason is given is a test of its own."""
    try:
        view = with_methods(tiny(backbone), *(make(c) for c in cases))
    except Conflict as reason:
        pytest.skip(str(reason))
    return draw(view)


@cache
def fresh(backbone: str, case: tuple[str, int], seed: int = 0, scale: float = 1.0) -> Tensor:
    """The end of a trajectory through a view that has done nothing before, computed once."""
    return sample(view_of(backbone, case), seed=seed, scale=scale)


def draw(view: Backbone, std: float = 0.1) -> Backbone:
    """Draw the parameters of the methods, by name, so that the order of attaching plays no part."""
    for name, p in sorted(view.methods.named_parameters()):
        if p.is_floating_point():
            g = torch.Generator().manual_seed(sum(map(ord, name)))
            p.data.copy_(torch.randn(p.shape, generator=g) * std)
    return view


def same_layers(name: str) -> str:
    """An earlier method whose functions are the same ones, but for what its schedule says; or ""."""

    def functions(method: str) -> list[Any]:
        return [getattr(registry.get("methods", method), f, None) for f in LAYERS]

    return next((other for other, _ in METHODS if other < name and functions(other) == functions(name)), "")


def label(case: Any) -> str:
    return f"{case[0]}-{case[1]}" if isinstance(case, tuple) and isinstance(case[0], str) else str(case)


def compiled_like_eager(view: Backbone, grain: str) -> None:
    """Bit-equal to eager, as many graphs as the schedule says, none added by a second run or other inputs."""
    torch._dynamo.reset()
    counted = Counted(view, grain)
    expected = count_graphs(counted.model, STEPS)
    assert torch.equal(sample(counted.model), sample(view))
    assert counted.graphs == expected
    sample(counted.model, seed=1)
    assert counted.graphs == expected
