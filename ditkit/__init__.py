"""ditkit: one tested Diffusion Transformer backbone, and the field's papers as parts of it.

``import ditkit`` is light: torch is loaded with the first model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import backbones, methods
    from .core.errors import Conflict, DitkitError
    from .pipeline import Pipeline, from_pretrained

_HOMES = {
    "from_pretrained": "pipeline",
    "Pipeline": "pipeline",
    "DitkitError": "core.errors",
    "Conflict": "core.errors",
}
__all__ = ["Conflict", "DitkitError", "Pipeline", "backbones", "from_pretrained", "methods"]


def __getattr__(name: str) -> Any:
    if name in ("methods", "backbones"):
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'ditkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
