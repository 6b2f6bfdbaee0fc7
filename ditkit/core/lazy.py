"""Optional libraries are imported where they are used, with an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingDependency


def require(module: str, extra: str) -> ModuleType:
    """Import ``module`` or raise ``MissingDependency`` naming the extra of ditkit that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingDependency(f"{module.split('.')[0]} is not installed", hint=f"pip install 'ditkit[{extra}]'") from error
