"""From an opened bundle to a model in memory, tensor by tensor.

The model is built without memory, each tensor is read, cast and moved in turn, and a method that drops a projection's weight
(int8, codebooks) replaces it as soon as it is there: the peak is the result and one layer, not the base and the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ditkit.bundle import METHODS, Opened, Part, Validity, read_card
from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.errors import Conflict, DitkitError, WeightsError
from ditkit.core.files import Source, check_kind, check_shapes, read_tensors
from ditkit.core.method import Method, check_conflicts, order
from ditkit.core.view import projections, with_methods

if TYPE_CHECKING:
    from ditkit.core.config import Config


def load_model(
    opened: Opened, dtype: torch.dtype, device: torch.device, extra: Sequence[Method] = ()
) -> tuple[Backbone, dict[str, Validity]]:
    """The model with the methods of its bundle and ``extra`` attached, and what the methods' states were made for, by label."""
    parts = opened.config.methods
    listed = [make_method(p) for p in parts]
    replacing = [m for m in (*listed, *extra) if type(m).replace is not Method.replace]
    model = fill(empty_model(opened.config.backbone, str(opened.folder)), opened.tensors, dtype, device, replacing, str(opened.folder))
    view = with_methods(model, *(m for m in (*listed, *extra) if m not in replacing))
    valid_for = {}
    for part, method in zip(parts, listed):
        read_state(opened, part.label, method)
        if (card := read_card(opened.folder, part)) is not None:
            card.check_model(part.label, opened.config)
            valid_for[part.label] = card
    view.methods.to(device)
    return view.eval(), valid_for


def make_method(part: Part) -> Method:
    """A method from its name and plain configuration."""
    cls: Any = registry.get("methods", part.name)
    method: Method = cls(cls.config_class.parse(part.config, f"method {part.name}"))
    return method


def read_state(opened: Opened, label: str, method: Method) -> None:
    """Read what a method learned, strictly."""
    path = opened.folder / METHODS / f"{label}.safetensors"
    if method.label != label:
        raise WeightsError(f"{opened.folder}: method {method.label!r} is listed as {label!r}", hint="correct its label in config.json")
    state = method.state_dict()
    if path.is_file() or state:
        method.load_state_dict(read_tensors(path, state))


def backbone_config(part: Part, where: str = "") -> tuple[type[Backbone], Config]:
    """The registered class and its strict configuration."""
    cls: Any = registry.get("backbones", part.name)
    return cls, cls.config_class.parse(part.config, f"{where}: backbone {part.name}".lstrip(": "))


def empty_model(part: Part, where: str = "") -> Backbone:
    """The backbone on the meta device: shapes without memory."""
    cls, config = backbone_config(part, where)
    with torch.device("meta"), _NoInitialisation():
        return cls(config)  # type: ignore[call-arg]


class _NoInitialisation(TorchFunctionMode):
    """Drawing numbers for tensors without memory is useless, and makes torch import its compiler (two seconds)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init" or getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def shapes_of(part: Part) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a backbone with this configuration."""
    return {name: tuple(value.shape) for name, value in empty_model(part).state_dict().items()}


@torch.no_grad()
def fill(
    model: Backbone, source: Source, dtype: torch.dtype, device: torch.device, replacing: Sequence[Method] = (), where: str = ""
) -> Backbone:
    """Give a model on the meta device its tensors; methods that replace projections are attached on the way.

    Raises:
        WeightsError: a tensor is missing, extra, misshapen, not finite, or of integers where the model has numbers.
        Conflict: a method does not fit, or matches no projection.
    """
    check_shapes(where, {name: tuple(value.shape) for name, value in model.state_dict().items()}, source.shapes)
    check_conflicts(order(list(replacing)), model.traits, model.name)
    for method in replacing:
        method.install(model)
    matched: set[str] = set()
    share = _shared(model)
    targets = {path: (parent, name) for path, parent, name in projections(model)}
    for path in [path for path, _ in model.named_modules()]:  # paths: a list of modules would keep what is replaced
        module = model.get_submodule(path)
        for name, empty in module._parameters.items():
            if empty is not None:
                value = _read(source, f"{path}.{name}".lstrip("."), empty, dtype, device, where)
                module._parameters[name] = share(empty, nn.Parameter(value, requires_grad=empty.requires_grad))
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = _read(source, f"{path}.{name}".lstrip("."), buffer, dtype, device, where)
        if path in targets:
            matched |= _replace(*targets[path], path, replacing)
    for method in replacing:
        if method.label not in matched:
            raise Conflict(f"{method.label} matches no projection of {model.name}", hint="see its config: which projections it takes")
    _computed_buffers(model, device)
    model.methods = nn.ModuleDict({m.label: m for m in replacing})
    return model


def _shared(model: nn.Module) -> Callable[[nn.Parameter, nn.Parameter], nn.Parameter]:
    """``share(empty, full)``: ``full``, or what was made before of the same empty parameter. Only parameters that occur twice are held."""
    empties = [p for _, p in model.named_parameters(remove_duplicate=False)]  # held, so that their identities stay theirs
    times, made = Counter(map(id, empties)), dict[int, nn.Parameter]()

    def share(empty: nn.Parameter, full: nn.Parameter) -> nn.Parameter:
        return made.setdefault(id(empty), full) if empties and times[id(empty)] > 1 else full

    return share


def _read(source: Source, name: str, empty: Tensor, dtype: torch.dtype, device: torch.device, where: str) -> Tensor:
    value = source.read(name)
    check_kind(where, name, value.dtype, empty.dtype)
    return value.to(device, dtype if value.is_floating_point() else empty.dtype)


def _replace(parent: nn.Module, name: str, path: str, replacing: Sequence[Method]) -> set[str]:
    """Swap one projection for the substitute of the first method that has one; returns that method's label."""
    for method in replacing:
        if (new := method.replace(path, getattr(parent, name))) is not None:
            setattr(parent, name, new)
            return {method.label}
    return set()


def _computed_buffers(model: Backbone, device: torch.device) -> None:
    """Buffers that are computed, not stored (tables), from a model that was built in memory."""
    if not any(b.is_meta for b in model.buffers()):
        return
    real = dict(type(model)(model.config).named_buffers())  # type: ignore[call-arg]
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = real[f"{path}.{name}".lstrip(".")].to(device)


def choose(dtype: str | torch.dtype, device: str | torch.device) -> tuple[torch.dtype, torch.device]:
    """ "auto": the GPU where there is one; fp32 on the CPU, bf16 on a GPU that computes in it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError:
        raise DitkitError(f"device is {device!r}", allowed="'auto', 'cpu', 'cuda', 'cuda:1', ...") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise DitkitError(f"device is {str(where)!r}, and torch sees no GPU", allowed="'auto' or 'cpu'")
    if dtype == "auto":
        return (torch.bfloat16 if where.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32), where
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    chosen = dtype if isinstance(dtype, torch.dtype) else kinds.get(dtype)
    if chosen is None or chosen not in kinds.values():
        raise DitkitError(f"dtype is {dtype!r}", allowed=f"'auto', {', '.join(kinds)}")
    return chosen, where
