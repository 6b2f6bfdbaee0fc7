"""``ditkit verify``: real weights on the user's machine, against diffusers where it has the model.

Three questions, each answered with a name: are the files whole and their tensors those of the architecture; are they what they
were when they were exported or last verified; does our network compute on them what diffusers computes.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ditkit.bundle import Opened, backbone_config
from ditkit.core.config import Config, read_data
from ditkit.core.errors import WeightsError
from ditkit.core.files import TensorFile, fingerprint, write_json
from ditkit.core.lazy import require
from ditkit.diffusion import noise
from ditkit.loading import load_model

from .checkpoints import read_checkpoint
from .convert import open_any
from .families import FAMILIES, family
from .hints import Hints
from .layouts import open_weights
from .tables import Renamed

RECORD = "ditkit-verified.json"
_SEEDS = [0, 1, 2, 3]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class Record(Config):
    """Content of the file that a successful ``verify`` leaves beside the weights: so that a later one can name what changed."""

    date: str
    tensors: dict[str, str] = Field(description="name in the file -> SHA-256 of dtype, shape and bytes")


@dataclass(frozen=True)
class Verified:
    """What ``verify`` found.

    Attributes:
        errors: relative L2 error against diffusers, by dtype; empty where diffusers has no such model.
        tensors: how many were checked.
        compared: what they were compared with: "export", "record of DATE", "reference", or nothing.
        line: all of it in one line, for the documentation.
    """

    errors: dict[str, float]
    tensors: int
    compared: tuple[str, ...]
    line: str


def verify(
    source: str | Path, hints: Hints | None = None, reference: str | Path | None = None, device: str = "cpu", record: bool = True
) -> Verified:
    """Check a bundle, a diffusers folder or a released checkpoint.

    Args:
        reference: another copy in any layout, which must hold the same numbers.
        record: leave ``ditkit-verified.json`` beside weights that we did not export ourselves, where the place can be written.

    Raises:
        WeightsError: naming the tensor that is missing, misshapen, not finite, or changed; or the figure that is too large.
    """
    compared = _against_export(Path(source))  # first: it can name a tensor where a manifest could only name the file
    opened = open_any(source, hints)
    weights = {name: opened.tensors.read(name) for name in opened.tensors.shapes}
    compared += _against_record(opened)
    if reference is not None:
        other = open_any(reference, hints).tensors
        want = {name: fingerprint(other.read(name)) for name in other.shapes}
        _same(opened.folder, want, {name: fingerprint(value) for name, value in weights.items()}, f"in {reference}")
        compared.append("reference")
    errors = {kind: against_diffusers(opened, weights, getattr(torch, kind), device) for kind in TOLERANCE} if has_live(opened) else {}
    for kind, error in errors.items():
        if not error <= TOLERANCE[kind]:
            raise WeightsError(f"{source}: {kind} differs from diffusers by {error:.2e}", allowed=f"at most {TOLERANCE[kind]:.0e}")
    if record and "export" not in compared:
        _write_record(opened)
    return Verified(errors, len(weights), tuple(compared), _line(opened, errors, len(weights), compared, device))


def has_live(opened: Opened) -> bool:
    """Whether diffusers has a model for these weights."""
    backbone = opened.config.backbone
    return backbone.name in FAMILIES and family(backbone.name).has_live(backbone.config)


@torch.no_grad()
def against_diffusers(opened: Opened, weights: Mapping[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> float:
    """Relative L2 error of our network's output against diffusers', on the same weights and inputs drawn from seed 0.

    A diffusers folder is read for diffusers by its own names, past our tables.
    """
    ours, _ = load_model(_with(opened, weights), dtype, torch.device(device))
    cfg: Any = ours.config
    theirs = nn.Module.to(live_model(opened, weights), device, dtype)
    x = noise.normal(_SEEDS, 0, "verify", (cfg.in_channels, *cfg.input_size)).to(device, dtype)
    tables: Any = family(ours.name)
    t = torch.tensor(getattr(tables, "LIVE_TIMES", (1, 250, 500, 999)), device=device)
    draw = partial(noise.normal, _SEEDS, 0)
    cond, call = (_on(values, device, dtype) for values in tables.live_inputs(cfg, len(x), draw))
    a, b = ours(x, t, **cond).double(), getattr(tables, "live_call", _call)(theirs, x, t, call).double()
    return float((a - b).norm() / b.norm())


def _call(theirs: Any, x: Tensor, t: Tensor, call: dict[str, Any]) -> Tensor:
    return theirs(x, timestep=t, **call).sample


def _on(values: Any, device: str, dtype: torch.dtype) -> Any:
    """Tensors in nested dicts, moved; floats cast."""
    if isinstance(values, dict):
        return {name: _on(value, device, dtype) for name, value in values.items()}
    if isinstance(values, Tensor):
        return values.to(device, dtype if values.is_floating_point() else values.dtype)
    return values


def live_model(opened: Opened, weights: Mapping[str, Tensor]) -> Any:
    """diffusers' model with these weights; its time code has the frequencies that the weights were trained with."""
    tables = family(opened.config.backbone.name)
    with quiet_imports():
        cls = getattr(require("diffusers", "dev"), tables.CLASS)
    cfg: Any = backbone_config(opened.config.backbone)[1]
    model: nn.Module = cls(**{k: v for k, v in tables.config_to_diffusers(cfg).items() if not k.startswith("_")})
    shift: Any = getattr(cfg, "time_freq_shift", 0)
    for module in model.modules():
        if hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = shift
    model.load_state_dict(_their_weights(opened) or tables.diffusers_table(cfg).export(weights))
    return model.eval()


@contextmanager
def quiet_imports() -> Iterator[None]:
    """diffusers' imports warn about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


def _transformer(opened: Opened) -> Path | None:
    """The folder of a diffusers transformer, if that is what was opened."""
    if not isinstance(opened.tensors, Renamed) or not opened.folder.is_dir():
        return None
    inner = opened.folder / "transformer"
    return inner if inner.is_dir() else opened.folder


def _their_weights(opened: Opened) -> dict[str, Tensor] | None:
    folder = _transformer(opened)
    if folder is None:
        return None
    files = open_weights(folder, pickled=True)
    return {name: files.read(name) for name in files.shapes}


class _InMemory:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(value.shape) for name, value in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _with(opened: Opened, weights: Mapping[str, Tensor]) -> Opened:
    return Opened(opened.folder, opened.config.model_copy(update={"methods": ()}), _InMemory(weights), opened.hash)


def _against_export(source: Path) -> list[str]:
    """Compare each tensor with the SHA-256 that our export left in the file's metadata."""
    found: list[str] = []
    folder = source / "transformer" if (source / "transformer").is_dir() else source
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else [source]:
        if path.suffix != ".safetensors" or not path.is_file():
            continue
        with TensorFile(path) as file:
            text = file.metadata.get("sha256")
            if text is None:
                continue
            try:
                want = json.loads(text)
            except json.JSONDecodeError:
                raise WeightsError(f"{path} has damaged metadata", hint="export the file again") from None
            _same(path, want, {name: fingerprint(file.read(name)) for name in file.entries}, "when the file was written")
            found = ["export"]
    return found


def _record_path(opened: Opened) -> Path:
    folder = opened.folder if opened.folder.is_dir() else opened.folder.parent
    return folder / (RECORD if opened.folder.is_dir() else f"{opened.folder.name}.{RECORD}")


def _file_prints(opened: Opened) -> dict[str, str]:
    """Fingerprints by the names that the file has."""
    tensors = _their_weights(opened)
    if tensors is None and isinstance(opened.tensors, Renamed):
        tensors = read_checkpoint(opened.folder)
    if tensors is None:
        tensors = {name: opened.tensors.read(name) for name in opened.tensors.shapes}
    return {name: fingerprint(value) for name, value in tensors.items()}


def _against_record(opened: Opened) -> list[str]:
    path = _record_path(opened)
    if not path.is_file():
        return []
    record = Record.parse(read_data(path), str(path))
    hint = f"use an intact copy, or delete {path.name} if it was changed on purpose"
    _same(opened.folder, record.tensors, _file_prints(opened), f"when it was verified on {record.date}", hint)
    return [f"record of {record.date}"]


def _write_record(opened: Opened) -> None:
    record = Record(date=date.today().isoformat(), tensors=_file_prints(opened))
    try:
        write_json(_record_path(opened), record.to_dict())
    except OSError:
        pass  # a read-only place is no fault of the weights


def _same(where: Path, want: Mapping[str, str], got: Mapping[str, str], when: str, hint: str = "use an intact copy") -> None:
    changed = [name for name in want if got.get(name) != want[name]]
    if not changed:
        return
    first = changed[0]
    twin = next((name for name in want if name != first and want[name] == got.get(first)), None)
    swapped = f": it now holds what {twin!r} held" if twin else ""
    more = f" and {len(changed) - 1} more ({', '.join(changed[1:4])})" if len(changed) > 1 else ""
    raise WeightsError(f"{where}: {first!r}{more} is not what it was {when}{swapped}", hint=hint)


def _line(opened: Opened, errors: Mapping[str, float], tensors: int, compared: list[str], device: str) -> str:
    parts = [opened.folder.name, f"{tensors} tensors", f"sha256 {opened.hash[:12]}"]
    parts += [f"{kind} {error:.1e}" for kind, error in errors.items()] or ["no live reference"]
    if errors:
        parts.append(f"against diffusers {require('diffusers', 'dev').__version__}")
    return " | ".join([*parts, *(f"equal to its {what}" for what in compared), f"torch {torch.__version__}, {device}"])
