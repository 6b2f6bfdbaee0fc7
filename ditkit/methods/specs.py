"""Methods written on one line: ``fora:interval=3``, ``fora:interval=2+int8+compile:grain=step``, ``compile:engine=openvino``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditkit.core import registry
from ditkit.core.config import parse_yaml
from ditkit.core.errors import ConfigError
from ditkit.core.grains import ENGINES, GRAINS

if TYPE_CHECKING:
    from ditkit.core.method import Method
    from ditkit.pipeline import Pipeline


@dataclass(frozen=True)
class Spec:
    """What a line asks for: methods with their settings, the grain of compilation ("" for none) and its engine."""

    text: str
    methods: tuple[tuple[str, dict[str, Any]], ...]
    grain: str = ""
    engine: str = ""

    @property
    def compilation(self) -> str:
        """How it is written: "compile:grain=step", or "" for none."""
        engine = f",engine={self.engine}" if self.engine not in ("", ENGINES[0]) else ""
        return f"compile:grain={self.grain}{engine}" if self.grain else ""

    def compiled(self, pipe: Pipeline) -> Pipeline:
        """The pipeline compiled as the line asks, or as it is."""
        return pipe.compile(self.grain, engine=self.engine) if self.grain else pipe

    def applied(self, pipe: Pipeline) -> Pipeline:
        """The pipeline with the methods attached, and compiled as the line asks."""
        return self.compiled(pipe.with_methods(*self.build()) if self.methods else pipe)

    def build(self) -> list[Method]:
        """New instances of the methods."""
        return [registry.get("methods", name)(**values) for name, values in self.methods]


def parse_spec(text: str) -> Spec:
    """``name:key=value,key=value+name...``; ``compile`` asks for compilation (``:grain=block``, or ``step``, the default;
    ``:engine=openvino``, or ``inductor``, the default).

    Raises:
        ConfigError, DitkitError: no such method, or a piece that does not read as above.
    """
    methods: list[tuple[str, dict[str, Any]]] = []
    grain = engine = ""
    for part in text.split("+"):
        name, _, settings = part.strip().partition(":")
        values = _settings(settings, text)
        if name == "compile":
            grain, engine = values.pop("grain", "step"), values.pop("engine", ENGINES[0])
            if values or grain not in GRAINS or engine not in ENGINES:
                raise ConfigError(f"{part!r} in {text!r}", allowed="compile, compile:grain=block, compile:grain=step,engine=openvino")
        else:
            registry.get("methods", name)
            methods.append((name, values))
    return Spec(text, tuple(methods), grain, engine)


def _settings(text: str, whole: str) -> dict[str, Any]:
    """Values are read as YAML: 3, 0.5, true."""
    values = {}
    for pair in text.split(",") if text else ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{pair!r} in {whole!r}", allowed="key=value pairs, separated by commas", hint="fora:interval=3")
        values[key.strip()] = parse_yaml(value.strip(), text)
    return values
