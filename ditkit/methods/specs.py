"""Methods written on one line: ``fora:interval=3``, ``fora:interval=2+int8+compile:grain=step``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditkit.core import registry
from ditkit.core.config import parse_yaml
from ditkit.core.errors import ConfigError

if TYPE_CHECKING:
    from ditkit.core.method import Method

GRAINS = ("block", "step")


@dataclass(frozen=True)
class Spec:
    """What a line asks for: methods with their settings, and the grain of compilation ("" for none)."""

    text: str
    methods: tuple[tuple[str, dict[str, Any]], ...]
    grain: str = ""

    def build(self) -> list[Method]:
        """New instances of the methods."""
        return [registry.get("methods", name)(**values) for name, values in self.methods]


def parse_spec(text: str) -> Spec:
    """``name:key=value,key=value+name...``; ``compile`` (``:grain=block`` or ``step``, the default) asks for compilation.

    Raises:
        ConfigError, DitkitError: no such method, or a piece that does not read as above.
    """
    methods: list[tuple[str, dict[str, Any]]] = []
    grain = ""
    for part in text.split("+"):
        name, _, settings = part.strip().partition(":")
        values = _settings(settings, text)
        if name == "compile":
            grain = values.pop("grain", "step")
            if values or grain not in GRAINS:
                raise ConfigError(f"{part!r} in {text!r}", allowed="compile, compile:grain=block, compile:grain=step")
        else:
            registry.get("methods", name)
            methods.append((name, values))
    return Spec(text, tuple(methods), grain)


def _settings(text: str, whole: str) -> dict[str, Any]:
    """Values are read as YAML: 3, 0.5, true."""
    values = {}
    for pair in text.split(",") if text else ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{pair!r} in {whole!r}", allowed="key=value pairs, separated by commas", hint="fora:interval=3")
        values[key.strip()] = parse_yaml(value.strip(), text)
    return values
