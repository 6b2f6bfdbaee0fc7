"""The one error type that users meet: it says what was wrong, what is allowed, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DitkitError(ValueError):
    """A mistake that the caller can mend.

    Args:
        what: the value at fault, named (``"guidance_scale is -1"``).
        allowed: what would have been accepted.
        hint: the next step.
    """

    def __init__(self, what: str, *, allowed: str = "", hint: str = "") -> None:
        self.what, self.allowed, self.hint = what, allowed, hint
        parts = [what, f"allowed: {allowed}" if allowed else "", f"next: {hint}" if hint else ""]
        super().__init__("; ".join(p for p in parts if p))


class ConfigError(DitkitError):
    """A configuration that does not fit its schema: unknown key, wrong type, out of range."""


class WeightsError(DitkitError):
    """A weight file, checkpoint or state that does not fit: missing, extra, misshapen, non-finite, damaged."""


class Conflict(DitkitError):
    """Two methods, or a method and a backbone, that cannot be combined. Raised before anything runs."""


class MissingDependency(DitkitError, ImportError):
    """An optional library is needed and not installed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'depth'?"`` or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""
