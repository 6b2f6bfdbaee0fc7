"""A bundle: the folder that ``ditkit.from_pretrained`` reads. ``config.json``, ``model.safetensors``, ``methods/LABEL.safetensors``,
``manifest.json``. This file holds its schema and its writer; it loads no torch until something is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ditkit.core.config import Config

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, MODEL, METHODS = "config.json", "model.safetensors", "methods"


class Part(Config):
    """A part of a model by its registered name, with its own configuration."""

    name: str = Field(description="registered name")
    config: dict[str, Any] = Field({}, description="values of the part's own configuration; what is absent has its default")


class MethodPart(Part):
    """A method attached to the model; its state is ``methods/LABEL.safetensors``."""

    label: str = Field(description="name under which it is attached")


class DataCard(Config):
    """What the model was trained on."""

    name: str = Field(description="name or path of the data set")
    shape: tuple[int, ...] = Field(description="shape of one sample, channels first")
    labels: tuple[str, ...] = Field((), description="class names in the order of their numbers")


class Sampling(Config):
    """How to sample unless the caller says otherwise."""

    solver: str = Field("ddim", description="name of the solver")
    num_inference_steps: int = Field(50, ge=1, description="solver steps")
    guidance: dict[str, Any] = Field({}, description="scale, channels, rescale, interval")


class BundleConfig(Config):
    """Content of ``config.json``."""

    format: Literal[1] = 1
    backbone: Part
    process: Part
    codec: Part = Part(name="identity")
    data: DataCard
    sampling: Sampling = Sampling()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    methods: tuple[MethodPart, ...] = ()


def write_bundle(folder: str | Path, config: BundleConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a bundle, atomically; what else is in ``folder`` (checkpoints, logs) is left alone.

    Args:
        tensors: the state of the model or view, names as in its ``state_dict``; those of a method begin with ``methods.LABEL.``.
    """
    from ditkit.core.files import atomic_folder, write_json, write_tensors

    states: dict[str, dict[str, Tensor]] = {m.label: {} for m in config.methods}
    base: dict[str, Tensor] = {}
    for name, value in tensors.items():
        label = next((k for k in states if name.startswith(f"{METHODS}.{k}.")), None)
        if label is None:
            base[name] = value
        else:
            states[label][name.removeprefix(f"{METHODS}.{label}.")] = value
    with atomic_folder(folder) as new:
        write_json(new / CONFIG, config.to_dict())
        write_tensors(new / MODEL, base, {"dtype": config.dtype})
        if states:
            (new / METHODS).mkdir()
        for label, state in states.items():
            write_tensors(new / METHODS / f"{label}.safetensors", state)
