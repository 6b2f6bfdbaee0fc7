"""A recipe: everything that a training run is, as strict plain data. No torch is loaded here.

``ditkit/recipes/NAME.yaml`` is the recipe NAME; any other path works too. The resolved recipe stands beside every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import Field, model_validator

from ditkit.bundle import Part, Sampling
from ditkit.core.config import Config, read_data
from ditkit.core.errors import ConfigError, DitkitError, nearest

HOME = Path(__file__).resolve().parents[1] / "recipes"
_ELSEWHERE = {  # what other trainers call it
    "lr": "learning_rate",
    "batch": "batch_size",
    "train_batch_size": "batch_size",
    "epochs": "steps",
    "num_epochs": "steps",
    "num_steps": "steps",
    "max_train_steps": "steps",
    "iterations": "steps",
    "max_grad_norm": "grad_clip",
    "gradient_accumulation_steps": "accumulation",
    "mixed_precision": "dtype",
}


class CodecFit(Config):
    """How a codec that learns is trained, before the network."""

    steps: int = Field(1000, ge=1, description="updates, with pictures of the training split")
    batch_size: int = Field(64, ge=1, description="pictures of an update")
    learning_rate: float = Field(2e-3, gt=0)


class CodecRecipe(Part):
    """The codec that pictures are encoded with."""

    fit: CodecFit | None = Field(None, description="train it first, on the same pictures (kl); absent: it has its weights, or needs none")


class DataRecipe(Config):
    """What is learned from."""

    name: str = Field("digits", description="embedded data set, or the path of your own")
    config: dict[str, Any] = Field({}, description="options of that loader")
    codec: CodecRecipe | None = Field(None, description="encodes the pictures as they are drawn; absent: the base's, or none")


class TrainerRecipe(Config):
    """How it is learned. A step is one update with ``batch_size`` samples, over all processes."""

    steps: int = Field(1000, ge=1, description="updates in total")
    batch_size: int = Field(128, ge=1, description="samples of one update, over all processes and micro-batches")
    accumulation: int = Field(1, ge=1, description="micro-batches that a process's share of the batch is split into")
    optimizer: Literal["adamw", "muon", "came"] = Field(
        "adamw", description="muon: for the matrices of the blocks, adamw for the rest; came: half of adamw's state"
    )
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    betas: tuple[float, ...] = Field(
        (0.9, 0.999), description="averaging of gradients and squares; of came also a third, of its confidence, 0.9999 if not given"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; vectors and tables are never decayed")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate after the warm-up; cosine ends at 0")
    grad_clip: float = Field(0.0, ge=0, description="largest gradient norm; 0: no clipping")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="decay of the averaged weights")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the arithmetic; weights stay float32. auto: bfloat16 on a GPU"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    compile: Literal["off", "block", "step"] = Field("off", description="graph per block (quick start) or per step (faster)")
    activation_checkpointing: Literal["off", "selective", "full"] = Field(
        "off", description="recompute in the backward pass: everything cheap (selective) or the whole block (full)"
    )
    replicas: int = Field(1, ge=1, description="copies of the sharded model, where there are several processes (HSDP)")
    seed: int = Field(0, ge=0, lt=2**63, description="of initialisation, data order, noise and times")
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=2, description="checkpoints kept")
    sample_every: int = Field(250, ge=0, description="steps between sample grids; 0: none")
    validate_every: int = Field(250, ge=0, description="steps between validations; 0: none")
    validation_samples: int = Field(512, ge=1, description="held-out samples of a validation, at most")
    log_every: int = Field(10, ge=1, description="steps that one line of the log averages over")
    spike_sigma: float = Field(0.0, ge=0, description="skip steps whose loss or gradient norm exceeds mean + this many sigma; 0: never")

    @model_validator(mode="after")
    def _fits(self) -> TrainerRecipe:
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}")
        if self.activation_checkpointing != "off" and self.compile == "step":
            raise ValueError("activation_checkpointing recomputes block by block: compile block, or off")
        if len(self.betas) not in ((2, 3) if self.optimizer == "came" else (2,)):
            raise ValueError(f"betas {self.betas}: {self.optimizer} has two" + (" or three" if self.optimizer == "came" else ""))
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas {self.betas} are not in [0, 1)")
        return self


class Recipe(Config):
    """Base or backbone, methods, what is trainable, objective, data, trainer, and the claim it must show."""

    claim: str = Field("", description="what a run of this recipe must show")
    base: str | None = Field(None, description="bundle or diffusers folder to start from; absent: a new model")
    start: Part | None = Field(None, description="from_dit: what the base becomes; absent: itself, with what ``backbone`` sets anew")
    backbone: Part | None = Field(None, description="the network; with a base, settings of it that are new; absent: the base's")
    encoder: Part | None = Field(None, description="of captions, for a backbone that is told them; absent: the base's, or class labels")
    process: Part | None = Field(None, description="gaussian or flow; absent: the base's, or flow")
    objective: Part = Field(Part(name="diffusion"), description="the loss")
    methods: tuple[Part, ...] = Field((), description="attached before training, such as lora")
    trainable: tuple[str, ...] = Field(("*",), description="patterns of the names of the parameters that are trained")
    data: DataRecipe = DataRecipe()
    trainer: TrainerRecipe = TrainerRecipe()
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _one_origin(self) -> Recipe:
        if self.base is None and self.backbone is None:
            raise ValueError("give a base bundle or a backbone")
        if self.base is None and self.start is not None:
            raise ValueError(f"start {self.start.name} is from a base bundle: give base")
        if self.base is not None and self.backbone is not None and self.start is None and not self.backbone.config:
            raise ValueError("base and backbone are both given, and backbone has no config: it says which settings of the base's are new")
        if self.base is not None and self.process is not None:
            raise ValueError("the process comes with the base bundle: leave it out")
        return self

    @classmethod
    def parse(cls, values: Any, where: str = "") -> Self:
        """As ``Config.parse``; keys in the wrong place are named with the place where they belong."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where or 'recipe'} holds {type(values).__name__}", allowed="a mapping of sections")
        if faults := list(misplaced(values)):
            raise ConfigError(f"{where or 'recipe'}: " + "; ".join(faults), hint="correct the named keys")
        return super().parse(values, where)


def load_recipe(name: str | Path) -> Recipe:
    """The recipe of that name, or in that file. Raises ConfigError naming what there is."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        known = recipes()
        if str(name) not in known:
            hint = nearest(str(name), known) or "ditkit list recipes, or the path of a .yaml file"
            raise ConfigError(f"there is no recipe {str(name)!r}", allowed=", ".join(known), hint=hint)
        path = known[str(name)]
    return Recipe.parse(read_data(path), str(path))


def recipes() -> dict[str, Path]:
    """The recipes of the package: name -> file."""
    return {path.stem: path for path in sorted(HOME.glob("*.yaml"))}


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys at which two plain recipes differ."""
    found: list[str] = []
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append(prefix + key)
    return found


def misplaced(values: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each key that no section of a recipe knows, naming its section and the nearest name."""
    for key, value in nested(values).items():
        if key in Recipe.model_fields:
            continue
        section = _section_like(key)
        if section is not None and isinstance(value, Mapping):
            yield from _inside(key, value, f"section {section!r}", list(_fields(section)), f"did you mean section {section!r}?")
        elif isinstance(value, Mapping) and (known := _keys_of_part(key)):
            yield from _inside(
                key, value, f"the config of {key!r}", known, f"{key!r} belongs in section 'methods' as {{name: {key}, config: ...}}"
            )
        else:
            yield f"unknown key {key!r} ({_home(key)})"


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` -> ``{"a": {"b": 1}}``: dotted keys are written that way by hand, and explained alike."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        head, _, rest = str(key).partition(".")
        if rest and isinstance(inner := found.setdefault(head, {}), dict):
            inner[rest] = value
        else:
            found[head] = value
    return found


def _inside(section: str, value: Mapping[str, Any], place: str, known: list[str], remark: str) -> Iterator[str]:
    yield f"unknown section {section!r} ({remark})"
    for key in value:
        if key not in known:
            hint = nearest(_plain(key), known) or f"known: {', '.join(known)}"
            yield f"unknown key '{section}.{key}' ({place}: {hint})"


def _home(key: str) -> str:
    """Where a top-level key that belongs in a section should stand."""
    sections = [s for s in Recipe.model_fields if _fields(s)]
    for section in sections:
        if _plain(key) in _fields(section):
            return f"it belongs in section {section!r}: {section}.{_plain(key)}"
    known = [*Recipe.model_fields, *(f"{s}.{f}" for s in sections for f in _fields(s))]
    return nearest(_plain(key), known) or f"known: {', '.join(Recipe.model_fields)}"


def _plain(key: Any) -> str:
    name = str(key).replace("-", "_")
    return _ELSEWHERE.get(name, name)


def _section_like(key: str) -> str | None:
    sections = [s for s in Recipe.model_fields if _fields(s)]
    close = [s for s in sections if s.startswith(_plain(key)) or f"{s!r}" in nearest(_plain(key), [s])]
    return close[0] if close else None


def _fields(section: str) -> dict[str, Any]:
    """Fields of a section that is a configuration of its own."""
    inner = Recipe.model_fields[section].annotation
    kinds = [k for k in (inner, *get_args(inner)) if isinstance(k, type) and issubclass(k, Config)]
    return dict(kinds[0].model_fields) if kinds else {}


def _keys_of_part(name: str) -> list[str]:
    """Keys of the configuration of the method ``name``; none if there is no such method."""
    from ditkit.core import registry

    try:
        return list(registry.get("methods", name).config_class.model_fields)  # type: ignore[attr-defined]
    except DitkitError:
        return []


__all__ = ["DataRecipe", "Part", "Recipe", "Sampling", "TrainerRecipe", "differences", "dump_recipe", "load_recipe", "recipes"]
