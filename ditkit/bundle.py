"""A bundle: the folder that ``ditkit.from_pretrained`` reads. ``config.json``, ``model.safetensors``, ``methods/LABEL.safetensors``
and ``.json``, ``codec/`` where pictures are decoded, ``manifest.json``. This file holds its schema, its writer and its reader; it loads
no torch until something is written or read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ditkit.core import registry
from ditkit.core.config import Config, read_data
from ditkit.core.errors import ConfigError, DitkitError, WeightsError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from ditkit.codecs.base import Codec
    from ditkit.core.backbone import Backbone
    from ditkit.core.files import Source
    from ditkit.core.method import Method

CONFIG, MODEL, METHODS, CODEC = "config.json", "model.safetensors", "methods", "codec"
SHIPPED = Path(__file__).parent / "bundles"


class Part(Config):
    """A part of a model by its registered name, with its own configuration."""

    name: str = Field(description="registered name")
    config: dict[str, Any] = Field({}, description="values of the part's own configuration; what is absent has its default")


class EncoderPart(Part):
    """The text encoder that the model is told captions through."""

    hash: str = Field("", description="its content hash, where its weights are not in the bundle; empty: not known")


class MethodPart(Part):
    """A method attached to the model; its state is ``methods/LABEL.safetensors``."""

    label: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="name under which it is attached")


class DataCard(Config):
    """What the model was trained on."""

    name: str = Field(description="name or path of the data set")
    config: dict[str, Any] = Field({}, description="options it was loaded with; what is absent has its default")
    shape: tuple[int, ...] = Field(min_length=1, description="shape of one sample, channels first")
    labels: tuple[str, ...] = Field((), description="class names in the order of their numbers")
    captions: tuple[str, ...] = Field((), description="some captions of its test split, where the model is told captions")
    licence: str = Field("", description="of the data, where what is made from them must name it")
    credit: str = Field("", description="whom the data's licence asks to name")


class Sampling(Config):
    """How to sample unless the caller says otherwise."""

    solver: str = Field("ddim", description="name of the solver")
    num_inference_steps: int = Field(50, ge=1, description="solver steps")
    guidance: dict[str, Any] = Field({}, description="scale, channels, rescale, interval")
    options: dict[str, Any] = Field({}, description="further options of the solver: spacing, eta, clip")


class BundleConfig(Config):
    """Content of ``config.json``."""

    format: Literal[1] = 1
    backbone: Part
    process: Part
    codec: Part = Part(name="identity")
    encoder: EncoderPart | None = None
    data: DataCard
    sampling: Sampling = Sampling()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    methods: tuple[MethodPart, ...] = ()


class Validity(Config):
    """What a learned state of a method was made for; it is refused elsewhere. None: any."""

    backbone: Part
    process: Part
    solver: str | None = Field(None, description="name of the solver")
    num_inference_steps: int | None = Field(None, ge=1, description="solver steps")

    @classmethod
    def of(cls, config: BundleConfig, method: Method) -> Validity:
        """What ``method`` depends on in this bundle: solver and steps too, if its state is bound to them."""
        any_run = cls(backbone=config.backbone, process=config.process)
        steps = {"solver": config.sampling.solver, "num_inference_steps": config.sampling.num_inference_steps}
        return any_run.model_copy(update=steps) if method.step_bound else any_run

    def check_model(self, label: str, config: BundleConfig) -> None:
        """Raise ConfigError where backbone or process are others."""
        for kind, mine, theirs in (("backbone", self.backbone, config.backbone), ("process", self.process, config.process)):
            if mine != theirs and mine.name == theirs.name:
                mine, theirs = _complete(kind, mine), _complete(kind, theirs)
            if mine != theirs:
                raise ConfigError(
                    f"the state of {label} was made for another {kind}: {_difference(mine, theirs)}",
                    hint="train the method on this model, or drop its state",
                )

    def check_run(self, label: str, solver: str, num_inference_steps: int) -> None:
        """Raise ConfigError where solver or steps are others."""
        for what, mine, asked in (("solver", self.solver, solver), ("num_inference_steps", self.num_inference_steps, num_inference_steps)):
            if mine is not None and mine != asked:
                raise ConfigError(f"{what} is {asked!r}", allowed=f"{mine!r}, for which the state of {label} was made", hint="use that one")


class MethodCard(Config):
    """Content of ``methods/LABEL.json``."""

    format: Literal[1] = 1
    method: MethodPart
    valid_for: Validity


def backbone_config(part: Part, where: str = "") -> tuple[type[Backbone], Config]:
    """The registered class of a backbone and its strict configuration."""
    cls: Any = registry.get("backbones", part.name)
    return cls, cls.config_class.parse(part.config, f"{where}: backbone {part.name}".lstrip(": "))


def _complete(kind: str, part: Part) -> Part:
    """The part with the values it leaves to its defaults: an older file may not have them all."""
    from ditkit.diffusion.process import process_from

    config = backbone_config(part)[1] if kind == "backbone" else process_from(part.name, part.config).config
    return part.model_copy(update={"config": config.to_dict()})


def _difference(a: Part, b: Part) -> str:
    if a.name != b.name:
        return f"{a.name}, not {b.name}"
    keys = sorted(k for k in {*a.config, *b.config} if a.config.get(k) != b.config.get(k))
    return ", ".join(f"{k} {a.config.get(k)!r}, not {b.config.get(k)!r}" for k in keys)


def write_bundle(
    folder: str | Path,
    config: BundleConfig,
    tensors: Mapping[str, Tensor],
    valid_for: Mapping[str, Validity] | None = None,
    codec: Codec | None = None,
) -> None:
    """Write a bundle, atomically; what else is in ``folder`` (checkpoints, logs) is left alone.

    Args:
        tensors: the state of the model or view, names as in its ``state_dict``; those of a method begin with ``methods.LABEL.``.
        valid_for: what each method's state was made for, by label.
        codec: written to ``codec/`` unless it is the identity.
    """
    from ditkit.core.files import atomic_folder, fingerprints, write_json, write_tensors

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
        write_tensors(new / MODEL, base, {"dtype": config.dtype, **fingerprints(base)})
        if states:
            (new / METHODS).mkdir()
        for method in config.methods:
            write_tensors(new / METHODS / f"{method.label}.safetensors", states[method.label])
            if method.label in (valid_for or {}):
                card = MethodCard(method=method, valid_for=(valid_for or {})[method.label])
                write_json(new / METHODS / f"{method.label}.json", card.to_dict())
        if codec is not None and codec.name != "identity":
            from ditkit.codecs.base import save_codec

            save_codec(codec, new / CODEC)


@dataclass(frozen=True)
class Opened:
    """A model on the disk, before anything large is read: a bundle, or another layout in our words.

    ``tensors`` reads the weights by our names; ``hash`` is the SHA-256 of the files.
    """

    folder: Path
    config: BundleConfig
    tensors: Source
    hash: str
    codec: Path | None = None


def find_bundle(name: str | Path) -> Path:
    """The folder ``name``; or, for a name without a slash where there is no such folder, the bundle of that name that ditkit ships."""
    path = Path(name)
    if path.exists():
        return path
    if len(path.parts) > 1:
        raise DitkitError(
            f"there is no folder {name}", hint=f"check the path; from the Hugging Face hub: hf download {name} --local-dir FOLDER"
        )
    shipped = sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG}"))
    if str(name) in shipped:
        return SHIPPED / str(name)
    raise DitkitError(
        f"there is no folder {str(name)!r} and no bundle of that name",
        allowed=f"a folder, or one of: {', '.join(shipped)}" if shipped else "a folder",
        hint=nearest(str(name), shipped) or "check the path; ditkit train digits makes runs/digits",
    )


def open_bundle(folder: str | Path) -> Opened:
    """Check the manifest (every file's size and SHA-256) and the configuration; weights are read from ``tensors``.

    Raises:
        ConfigError, WeightsError: naming the file, the key or the value.
    """
    from ditkit.core.files import TensorFile, folder_hash, verify_manifest

    folder = Path(folder)
    _check_listed(folder, verify_manifest(folder))
    config = BundleConfig.load(folder / CONFIG)
    codec = folder / CODEC
    return Opened(folder, config, TensorFile(folder / MODEL), folder_hash(folder), codec if codec.is_dir() else None)


def _check_listed(folder: Path, listed: Mapping[str, Any]) -> None:
    """Raise WeightsError for a file that is read and that the manifest does not know: nobody could say whether it was altered."""
    states = sorted(p.name for kind in ("json", "safetensors") for p in (folder / METHODS).glob(f"[!.]*.{kind}"))
    read = [CONFIG, MODEL, *(f"{METHODS}/{name}" for name in states)]
    if unlisted := [name for name in read if name not in listed]:
        raise WeightsError(
            f"{folder / unlisted[0]} is not in manifest.json", allowed="the files of a saved bundle", hint="save or copy the folder again"
        )


def read_card(folder: Path, part: MethodPart) -> Validity | None:
    """What the state of a method in this bundle was made for; None where it has no card."""
    path = folder / METHODS / f"{part.label}.json"
    if not path.is_file():
        return None
    card = MethodCard.parse(read_data(path), str(path))
    if card.method != part:
        raise ConfigError(
            f"{path} describes {card.method.name} with {card.method.config}", allowed=f"what {CONFIG} says: {part.name}, {part.config}"
        )
    return card.valid_for
