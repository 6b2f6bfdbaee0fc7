"""LoRA files onto any backbone and back: PEFT, diffusers and kohya read, PEFT and diffusers written.

The module names of a file may be those of any layout that the backbone's name tables know (ours, the released one, diffusers').
What a layout keeps apart (to_q, to_k, to_v) and we fuse is joined exactly, and comes apart again when written; rows in another
order are rows of B. Every tensor of a file is applied or refused by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ditkit.core.backbone import Backbone
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.core.files import write_json, write_tensors
from ditkit.methods.adaptation.lora import Adapted, LoRA, LoRAConfig, seam_projections

from .lora_factors import Factors, join_rows, pick_rows
from .lora_files import DIFFUSERS_WEIGHTS, METADATA, PEFT_CONFIG, PEFT_WEIGHTS, PairFile, read_pairs, some
from .tables import Table

Placed = dict[str, list[tuple[str, Factors, Tensor]]]  # target -> (module, pair, the target's rows that it changes)
_FAMILIES = {  # part of a module's name -> whose it is
    "double_blocks": "FLUX.1",
    "single_transformer_blocks": "FLUX.1",
    "single_blocks": "FLUX.1",
    "joint_blocks": "SD3",
    "add_q_proj": "SD3 or FLUX.1",
    "down_blocks": "a U-Net",
    "up_blocks": "a U-Net",
    "input_blocks": "a U-Net",
    "lora_te": "a text encoder",
    "text_encoder": "a text encoder",
    "cross_attn": "PixArt",
    "attn2": "a model with cross-attention",
}


class Wire(NamedTuple):
    """Where a module of some layout stands in our model: its rows are rows ``rows`` of the projection ``target``."""

    target: str
    rows: Tensor  # (out of the module,)


@dataclass(frozen=True)
class LoRAReport:
    """What a file held and what became of it. ``modules`` has one entry for each pair, by the file's own module names."""

    path: str
    format: str
    pairs: int
    applied: int
    skipped: tuple[str, ...]
    modules: tuple[Adapted, ...]

    def __str__(self) -> str:
        left = f", left out: {', '.join(self.skipped)}" if self.skipped else ""
        head = f"{self.path} ({self.format}): {self.applied} of {self.pairs} pairs applied{left}"
        return "\n".join([head, *(f"  {m}" for m in self.modules)])


@dataclass(frozen=True)
class LoadedLoRA:
    """A LoRA ready for ``with_methods``, and the report of its file."""

    lora: LoRA
    report: LoRAReport


@torch.no_grad()
def load_lora(path: str | Path, model: Backbone, *, strength: float = 1.0, label: str = "", skip: Sequence[str] = ()) -> LoadedLoRA:
    """Read a LoRA file, or a folder as PEFT or diffusers write it, for ``model``.

    Args:
        strength, label: as in ``LoRAConfig``.
        skip: patterns (``final_layer.*``) of module names that may be left out; they are named in the report.

    Raises:
        WeightsError: a module that the model has not, shapes that do not fit, two pairs for one weight, and what ``read_pairs`` refuses.
    """
    file = read_pairs(path)
    skipped = tuple(m for m in file.pairs if any(fnmatchcase(m, pattern) for pattern in skip))
    pairs = {m: f for m, f in file.pairs.items() if m not in skipped}
    placed = place(file, pairs, model)
    found = seam_projections(model)
    whole = {t: join_rows([(f, rows) for _, f, rows in placed[t]], _out(found[t])) for t in found if t in placed}
    lora = LoRA(config_for(whole, list(found), strength=strength, label=label))
    lora.build(model)
    for target, f in whole.items():
        pair = lora.pair(target)
        pair.A.copy_(f.a)
        pair.B.copy_(f.b)
    modules = tuple(Adapted(m, f.rank, f.alpha, f.scale, float(f.delta().abs().max())) for m, f in pairs.items())
    return LoadedLoRA(lora, LoRAReport(str(file.path), file.format, len(file.pairs), len(pairs), skipped, modules))


def place(file: PairFile, pairs: Mapping[str, Factors], model: Backbone) -> Placed:
    """Each pair at the projection that it changes."""
    wires: dict[str, Wire] = {}
    for layout in layouts(model).values():
        wires.update(layout)
    if file.format == "kohya":
        wires = {name.replace(".", "_"): wire for name, wire in wires.items()}
    if unknown := [m for m in pairs if m not in wires]:
        raise _unknown(file, unknown, pairs, model)
    found, placed = seam_projections(model), Placed()
    for module, f in pairs.items():
        target, rows = wires[module]
        fan_in: Any = found[target].in_features
        if f.a.shape[1] != fan_in or len(f.b) != len(rows):
            raise WeightsError(
                f"{file.path}: {module} takes {f.a.shape[1]} and gives {len(f.b)} numbers",
                allowed=f"{fan_in} and {len(rows)}, as {target} of this model",
                hint="is the LoRA for another size?",
            )
        there = placed.setdefault(target, [])
        if twice := [m for m, _, r in there if bool(torch.isin(r, rows).any())]:
            raise WeightsError(f"{file.path}: {twice[0]} and {module} both change {target}", hint="keep one of them")
        there.append((module, f, rows))
    return placed


def layouts(model: Backbone) -> dict[str, dict[str, Wire]]:
    """By layout, every name under which a projection of ``model`` may stand in a file.

    "ditkit" has our own names and module paths; the others come from the tables of ``ditkit/interop/BACKBONE.py``.
    """
    found = seam_projections(model)
    paths = {id(m): path for path, m in model.named_modules()}
    identity = {t: Wire(t, torch.arange(_out(m))) for t, m in found.items()}
    layouts = {"ditkit": {**identity, **{paths[id(m)]: identity[t] for t, m in found.items()}}}
    for layout, table in _tables(model).items():
        links, wires = table.links(), {}
        for target, module in found.items():
            link = links.get(f"{paths[id(module)]}.weight")
            if link is None:
                continue
            rows = link.rule.export(torch.arange(_out(module))[:, None], len(link.theirs))
            wires.update({n.removesuffix(".weight"): Wire(target, r.flatten()) for n, r in zip(link.theirs, rows)})
        layouts[layout] = wires
    return layouts


def _tables(model: Backbone) -> dict[str, Table]:
    name = f"ditkit.interop.{model.name}"
    if not model.name or importlib.util.find_spec(name) is None:
        return {}
    module = importlib.import_module(name)
    if hasattr(module, "is_released") and not module.is_released(model.config.to_dict()):
        return {}
    if not hasattr(module, "OFFICIAL"):  # rows that depend on the block
        return {layout: getattr(module, f"{layout}_table")(model.config) for layout in ("official", "diffusers")}
    rows = {k.lower(): getattr(module, k) for k in ("OFFICIAL", "DIFFUSERS")}
    return {layout: Table(r, len(model.blocks), {}) for layout, r in rows.items()}


def _unknown(file: PairFile, unknown: list[str], pairs: Mapping[str, Any], model: Backbone) -> WeightsError:
    """Why these modules cannot be adapted, and what could."""
    family = next((f for mark, f in _FAMILIES.items() if any(mark in m for m in unknown)), None)
    examples = ", ".join(next(iter(names)) for names in layouts(model).values())
    allowed = f"projections of the model's {len(model.blocks)} blocks: {examples}, ..."
    if len(unknown) == len(pairs):
        whose = f"a LoRA for {family}" if family else "a LoRA for another model"
        return WeightsError(
            f"{file.path} is {whose} ({some(unknown, 2)}), not for {model.name}", allowed=allowed, hint="load it on its model"
        )
    return WeightsError(
        f"{file.path}: {len(unknown)} of {len(pairs)} modules cannot be adapted: {some(unknown)}",
        allowed=allowed,
        hint="name what may be left out: skip=[...]",
    )


def config_for(whole: Mapping[str, Factors], names: Sequence[str], **values: Any) -> LoRAConfig:
    """The shortest configuration that means these targets, ranks and alphas; ``names`` are all projections of the model."""
    ranks = {t: f.rank for t, f in whole.items()}
    alphas = {t: f.alpha for t, f in whole.items()}
    plain = all(alphas[t] == ranks[t] for t in whole)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = None if plain else Counter(alphas.values()).most_common(1)[0][0]
    return LoRAConfig(
        rank=rank,
        alpha=alpha,
        include=tuple(shorten({t: None for t in whole}, names)),
        ranks=shorten({t: r for t, r in ranks.items() if r != rank}, names),
        alphas=shorten({t: a for t, a in alphas.items() if a != alpha and not plain}, names),
        **values,
    )


def shorten(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """``img.qkv`` in place of ``blocks.0.img.qkv`` and so on, where all blocks have it with one value."""
    short: dict[str, Any] = {}
    for name, value in values.items():
        ending = name.split(".", 2)[2]
        all_of_it = [n for n in names if n.split(".", 2)[2] == ending]
        same = all(n in values and values[n] == value for n in all_of_it)
        short[ending if same else name] = value
    return short


def save_lora(
    folder: str | Path,
    lora: LoRA,
    model: Backbone,
    format: Literal["peft", "diffusers"] = "diffusers",
    layout: Literal["ditkit", "official", "diffusers"] = "diffusers",
) -> Path:
    """Write a LoRA as PEFT or diffusers do, with the module names of ``layout``; returns the weights file.

    Raises:
        DitkitError: the backbone has no such layout, or the LoRA has a strength, window or schedule, which no file format holds.
    """
    known = layouts(model)
    if layout not in known or format not in ("peft", "diffusers"):
        raise DitkitError(f"format {format!r}, layout {layout!r}", allowed=f"peft or diffusers; {', '.join(known)}")
    if lora.config.strength != 1 or not lora.constant or lora.config.schedule not in ((), (1.0,)):
        raise DitkitError(f"{lora.label} has a strength that these formats cannot hold", allowed="strength 1, always", hint="save a bundle")
    pairs = _export(lora, model, known[layout])
    tensors = {f"{m}.{part}.weight": u for m, f in pairs.items() for part, u in (("lora_A", f.a), ("lora_B", f.b))}
    config, folder = peft_config(pairs), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "peft":
        write_tensors(folder / PEFT_WEIGHTS, {f"base_model.model.{k}": u for k, u in tensors.items()}, {"format": "pt"})
        write_json(folder / PEFT_CONFIG, config)
        return folder / PEFT_WEIGHTS
    metadata = json.dumps({f"transformer.{k}": v for k, v in config.items()}, indent=2, sort_keys=True)
    write_tensors(folder / DIFFUSERS_WEIGHTS, {f"transformer.{k}": u for k, u in tensors.items()}, {"format": "pt", METADATA: metadata})
    return folder / DIFFUSERS_WEIGHTS


@torch.no_grad()
def _export(lora: LoRA, model: Backbone, wires: Mapping[str, Wire]) -> dict[str, Factors]:
    """The pairs by the layout's module names; a part of a fused projection that does not change gets none."""
    paths = {path for path, _ in model.named_modules()}
    lora.build(model)
    pairs = {}
    for module, (target, rows) in wires.items():
        if target not in lora.targets or (module == target and module not in paths):
            continue  # our short name stands beside the module's path
        pair = lora.pair(target)
        whole = Factors(pair.A.detach(), pair.B.detach(), lora.targets[target].alpha)
        part = pick_rows(whole, rows.to(pair.B.device))
        if bool(part.b.any()) or not bool(whole.b.any()):
            pairs[module] = part
    return pairs


def peft_config(pairs: Mapping[str, Factors]) -> dict[str, Any]:
    """``adapter_config.json`` for these pairs: the commonest rank and alpha, and a pattern for each module that differs."""
    rank = Counter(f.rank for f in pairs.values()).most_common(1)[0][0]
    alpha = Counter(f.alpha for f in pairs.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {m: f.rank for m, f in pairs.items() if f.rank != rank},
        "alpha_pattern": {m: _whole(f.alpha) for m, f in pairs.items() if f.alpha != alpha},
        "target_modules": list(pairs),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _out(module: Any) -> int:
    return module.out_features
