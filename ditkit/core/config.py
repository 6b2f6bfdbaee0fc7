"""Strict, frozen configurations: an unknown key, a wrong type or a value out of range is an error that names it.

Every configurable part owns a subclass of ``Config``; files are JSON (bundles) or YAML (recipes).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from .errors import ConfigError, nearest

MAX_FILE_BYTES = 1_000_000
MAX_VALUES = 100_000


class Config(BaseModel):
    """Base of all configurations: frozen, no unknown keys, no silent conversion (lists become tuples)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _explain(type(self), error, type(self).__name__) from None

    # pydantic then validates nested configurations itself, and the error carries the whole path
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: _as_annotated(v, cls.model_fields[k].annotation) if k in cls.model_fields else v for k, v in values.items()}

    @classmethod
    def parse(cls, values: Any, where: str = "") -> Self:
        """Build from plain data. ``where`` (a file, a section) is named in errors."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _explain(cls, error, where or cls.__name__) from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a ``.json`` or ``.yaml`` file."""
        return cls.parse(read_data(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to ``config.json``."""
        return self.model_dump(mode="json")


def _as_annotated(value: Any, annotation: Any) -> Any:
    wants_tuple = any(get_origin(a) is tuple for a in (annotation, *get_args(annotation)))
    if not (wants_tuple and isinstance(value, list)):
        return value
    return tuple(tuple(v) if isinstance(v, list) else v for v in value)


def _explain(cls: type[BaseModel], error: ValidationError, where: str) -> ConfigError:
    """One line a fault: its path, the value, what is allowed, the nearest known key."""
    lines = []
    for fault in error.errors():
        path = ".".join(str(p) for p in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = _known_keys(cls, fault["loc"][:-1])
            hint = nearest(str(fault["loc"][-1]).replace("-", "_"), known)
            lines.append(f"unknown key {path!r} (known: {', '.join(known)}{'; ' + hint if hint else ''})")
        elif fault["type"] == "missing":
            lines.append(f"{path!r} is missing")
        else:
            text = re.sub(r"^(Value|Assertion) error, ", "", fault["msg"])
            lines.append((f"{path!r} is {fault['input']!r}: " if path else "") + text[:1].lower() + text[1:])
    return ConfigError(f"{where}: " + "; ".join(lines), hint="correct the named keys")


def _known_keys(cls: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Keys of the section at ``path``, whose parts are fields, keys of a mapping, places in a list, or tags of a union."""
    models = [cls]
    for part in map(str, path):
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        tagged = [m for m in models if any(part in get_args(f.annotation) for f in m.model_fields.values())]
        models = [m for f in fields for m in _models_in(f.annotation)] if fields else tagged or models
    return list(dict.fromkeys(key for m in models for key in m.model_fields))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The configurations that an annotation holds: itself, or inside a union, a tuple or a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which reads ``1e-3`` as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: key {key!r} is given twice", hint="keep one of them")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$|^[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"key {key!r} is given twice", hint="keep one of them")
    return dict(pairs)


def read_data(path: str | Path) -> Any:
    """The plain data in a ``.json`` or ``.yaml`` file of at most 1 MB; raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist", hint="check the path")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes", allowed=f"at most {MAX_FILE_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, object_pairs_hook=_unique) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
        return _bounded(data, str(path))
    except ConfigError:
        raise
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a number or date that cannot be
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}", hint="correct the file") from None


def _bounded(data: Any, where: str) -> Any:
    """``data``, unless it holds too many values: aliases of aliases in YAML make a short text endless."""
    todo, seen = [data], 0
    while todo:
        value = todo.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise ConfigError(f"{where} holds more than {MAX_VALUES} values", hint="aliases (*name) of aliases multiply: write them out")
        todo.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    return data


def parse_yaml(text: str, where: str) -> Any:
    """The plain data in a piece of YAML, such as a value on the command line; ``where`` is named in errors."""
    try:
        return _bounded(yaml.load(text, Loader=_Loader), where)
    except ConfigError:
        raise
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where} is {text!r}: {str(error).splitlines()[0]}", hint="quote it, or correct it") from None
