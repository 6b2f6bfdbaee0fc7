"""LoRA files as they come: PEFT, diffusers and kohya. What a file holds, by the module names it uses, and nothing of any model.

    PEFT       adapter_config.json, adapter_model.safetensors:  base_model.model.MODULE.lora_A.weight, .lora_B.weight
    diffusers  pytorch_lora_weights.safetensors:                transformer.MODULE.lora_A.weight, alpha in the metadata
    kohya      NAME.safetensors:                                lora_unet_MODULE_WITH_UNDERSCORES.lora_down.weight, .lora_up.weight, .alpha

The scale of a pair is alpha / rank (alpha / sqrt(rank) for rank-stabilised ones). A stored alpha counts: that of the module first,
then a pattern of the configuration, then the configuration's. Where there is none, alpha is the rank of each pair by itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.core.config import read_data
from ditkit.core.errors import ConfigError, WeightsError
from ditkit.core.files import TensorFile

from .lora_factors import Factors

PEFT_CONFIG, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # where diffusers keeps the configuration inside the file
WRAPPERS = {  # what stands before the module's name
    "base_model.model.": "peft",
    "transformer.": "diffusers",
    "diffusion_model.": "diffusers",
    "model.diffusion_model.": "diffusers",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "lycoris_": "kohya",
}
_PARTS = {
    "A": re.compile(r"^(.+)\.(?:lora_A(?:\.[^.]+)?|lora[._]down)\.weight$"),
    "B": re.compile(r"^(.+)\.(?:lora_B(?:\.[^.]+)?|lora[._]up)\.weight$"),
    "alpha": re.compile(r"^(.+)\.alpha$"),
}
_OTHERS = {  # parts of a name that tell another kind of adapter
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "a convolution in the middle (LoCon)",
    "lora_embedding_": "an embedding",
    ".diff": "whole weight differences",
    ".bias": "changed biases",
}
_INERT = {  # of adapter_config.json: what changes nothing about a finished adapter
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core"),
    *("qalora_group_size", "runtime_config", "eva_config"),
}
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's weights


@dataclass(frozen=True)
class Settings:
    """What an adapter's configuration says of ranks and scales; names are patterns, as PEFT matches them."""

    rank: int | None = None
    alpha: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False


@dataclass(frozen=True)
class PairFile:
    """A LoRA file: ``pairs`` by module name as the file has it, without what stands before it."""

    path: Path
    format: str
    pairs: Mapping[str, Factors]


def read_pairs(path: str | Path) -> PairFile:
    """All pairs of a file, or of a folder as PEFT or diffusers write it.

    Raises:
        WeightsError: no such file, a tensor that belongs to no pair, half a pair, shapes that do not fit each other, a value that is
            not finite, another kind of adapter.
        ConfigError: a configuration that is no plain LoRA's.
    """
    path = locate(Path(path))
    with TensorFile(path) as file:
        format, modules = sort_keys(path, list(file.entries))
        settings = read_settings(path, format, file.metadata)
        pairs = {}
        for module, keys in sorted(modules.items(), key=lambda item: _natural(item[0])):
            tensors = {part: file.read(key) for part, key in keys.items()}
            pairs[module] = factors(path, module, keys, tensors, settings)
    return PairFile(path, format, pairs)


def locate(path: Path) -> Path:
    """The weights file that ``path`` means."""
    if path.is_dir():
        found = [path / n for n in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS) if (path / n).is_file()]
        if len(found) != 1:
            what = "both LoRA files" if found else "no LoRA file"
            raise WeightsError(f"{path} holds {what}", allowed=f"{PEFT_WEIGHTS} or {DIFFUSERS_WEIGHTS}", hint="name the file")
        return found[0]
    if path.exists() and path.suffix != ".safetensors":
        raise WeightsError(f"{path} is no .safetensors file", hint="save it as safetensors with the program that wrote it")
    return path


def sort_keys(path: Path, names: list[str]) -> tuple[str, dict[str, dict[str, str]]]:
    """The format, and by module the keys of its parts: A, B, perhaps alpha. Every key has a place, every pair is whole."""
    modules: dict[str, dict[str, str]] = {}
    formats, unknown = set(), []
    for key in names:
        part, match = next(((p, m) for p, r in _PARTS.items() if (m := r.match(key))), ("", None))
        if match is None:
            unknown.append(key)
            continue
        format, module = unwrap(match[1])
        formats.add(format)
        other = modules.setdefault(module, {}).setdefault(part, key)
        if other != key:
            raise WeightsError(f"{path}: {other!r} and {key!r} are the same thing", hint="keep one of them")
    if unknown:
        raise WeightsError(f"{path}: {some(unknown)} {_kind(unknown[0])}", allowed="pairs lora_A, lora_B or lora_down, lora_up, and alpha")
    if not modules:
        raise WeightsError(f"{path} holds no tensors", hint="check the file")
    half = [f"{m} has {' and '.join(sorted(keys))} only" for m, keys in modules.items() if not {"A", "B"} <= set(keys)]
    if half:
        raise WeightsError(f"{path}: {some(half, quote=False)}", allowed="A and B for each module", hint="save the adapter again")
    return next((f for f in ("kohya", "peft") if f in formats), "diffusers"), modules


def unwrap(name: str) -> tuple[str, str]:
    """The format that a module's name tells, and the name without what stands before it."""
    for wrapper, format in WRAPPERS.items():
        if name.startswith(wrapper):
            return format, name.removeprefix(wrapper)
    return "diffusers", name


def _natural(name: str) -> list[tuple[int, str]]:
    """For sorting: block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _kind(key: str) -> str:
    kind = next((k for mark, k in _OTHERS.items() if mark in key), None)
    return f"belongs to no LoRA pair: this is {kind}" if kind else "belongs to no LoRA pair"


def some(names: list[str], limit: int = 5, quote: bool = True) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(n) if quote else n for n in names[:limit]) + more


def factors(path: Path, module: str, keys: dict[str, str], tensors: dict[str, Tensor], settings: Settings) -> Factors:
    """One checked pair with its alpha, so that scale is alpha / rank."""
    a, b = tensors["A"], tensors["B"]
    if not (a.is_floating_point() and b.is_floating_point()):
        raise WeightsError(f"{path}: {keys['A']!r} and {keys['B']!r} are {a.dtype} and {b.dtype}", allowed="floating-point numbers")
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or not len(a):
        raise WeightsError(f"{path}: {keys['A']!r} is {tuple(a.shape)}, {keys['B']!r} {tuple(b.shape)}", allowed="(r, in) and (out, r)")
    declared = match(settings.ranks, module, settings.rank)
    if declared is not None and declared != len(a):
        raise WeightsError(f"{path}: {keys['A']!r} has rank {len(a)}, its configuration says {declared}", hint="use the two of one adapter")
    alpha = match(settings.alphas, module, settings.alpha)
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise WeightsError(f"{path}: {keys['alpha']!r} is {tuple(tensors['alpha'].shape)}", allowed="one number")
        alpha = float(tensors["alpha"])
    alpha = float(len(a)) if alpha is None else float(alpha)
    if not 0 < alpha < math.inf:
        raise WeightsError(f"{path}: alpha of {module} is {alpha}", allowed="above 0", hint="strength=0 switches a LoRA off")
    a, b = (u if u.dtype == torch.float64 else u.float() for u in (a, b))
    return Factors(a, b, alpha * math.sqrt(len(a)) if settings.rslora else alpha)


def match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the whole name, or all of it after a dot."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_settings(path: Path, format: str, metadata: Mapping[str, str]) -> Settings:
    """Ranks and alphas from the configuration beside the file or in its metadata."""
    if format == "peft" and (path.parent / PEFT_CONFIG).is_file():
        return settings_from(read_data(path.parent / PEFT_CONFIG), str(path.parent / PEFT_CONFIG))
    if METADATA in metadata:
        where = f"{path}, {METADATA}"
        try:
            values = json.loads(metadata[METADATA])
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} cannot be read: {str(error)[:120]}", hint="save the adapter again") from None
        if isinstance(values, dict):
            values = {k.removeprefix("transformer."): v for k, v in values.items() if not k.startswith("text_encoder")}
        return settings_from(values, where)
    for name in ("ss_network_alpha", "lora_alpha", "alpha"):
        if name in metadata:
            try:
                return Settings(alpha=float(metadata[name]))
            except ValueError:
                raise ConfigError(f"{path}: {name} is {metadata[name]!r}", allowed="a number") from None
    return Settings()


def settings_from(values: Any, where: str) -> Settings:
    """The settings in a PEFT configuration; whatever else it switches on is refused by name."""
    if not isinstance(values, dict) or str(values.get("peft_type", "LORA")).split(".")[-1] != "LORA":
        raise ConfigError(f"{where}: peft_type is {values.get('peft_type') if isinstance(values, dict) else values!r}", allowed="LORA")
    init = values.get("init_lora_weights", True)
    if init not in _PLAIN_INITIALISATIONS:
        hint = "save it with path_initial_model_for_weight_conversion"
        raise ConfigError(f"{where}: init_lora_weights is {init!r}, which changes the base's weights", hint=hint)
    ours = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
    if on := [f"{k} = {v!r}" for k, v in values.items() if k not in ours | _INERT and v and v != "none"]:
        raise ConfigError(f"{where}: {some(on, quote=False)}", allowed="plain LoRA: r, lora_alpha, their patterns, use_rslora")
    try:
        return Settings(
            rank=None if values.get("r") is None else int(values["r"]),
            alpha=None if values.get("lora_alpha") is None else float(values["lora_alpha"]),
            ranks={_pattern(k): int(v) for k, v in (values.get("rank_pattern") or {}).items()},
            alphas={_pattern(k): float(v) for k, v in (values.get("alpha_pattern") or {}).items()},
            rslora=bool(values.get("use_rslora")),
        )
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise ConfigError(f"{where}: ranks and alphas cannot be read ({error})", hint="save the adapter again") from None


def _pattern(key: str) -> str:
    """A pattern from a foreign file: a name or a simple expression, none that could take for ever to match."""
    re.compile(key)
    if re.search(r"\)[*+?{]", key) or len(re.findall(r"[*+?{]", key)) > 3:
        raise ValueError(f"the pattern {key!r} is too involved")
    return key
