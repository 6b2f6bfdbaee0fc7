"""What meets what: every method on every backbone, and every pair of methods, attached as the contract tests attach them."""

from __future__ import annotations

import itertools
from typing import Any

from ditkit.core import registry
from ditkit.core.errors import Conflict
from ditkit.core.view import with_methods


def by_backbone() -> dict[str, dict[str, str]]:
    """method -> backbone -> "" where it attaches, else the reason why not."""
    networks = {name: _class("backbones", name).tiny() for name in sorted(registry.entries("backbones"))}
    return {m: {b: _reason(network, m) for b, network in networks.items()} for m in sorted(registry.entries("methods"))}


def pairs(backbone: str = "dit") -> dict[tuple[str, str], str]:
    """(method, method) -> "" where both attach to the backbone's small network, else the reason why not."""
    network = _class("backbones", backbone).tiny()
    return {(a, b): _reason(network, a, b) for a, b in itertools.combinations(sorted(registry.entries("methods")), 2)}


def _reason(network: Any, *methods: str) -> str:
    try:
        with_methods(network, *(_class("methods", m).tiny()[0] for m in methods))
    except Conflict as refused:
        return str(refused)
    return ""


def _class(kind: Any, name: str) -> Any:
    return registry.get(kind, name)
