"""From an opened bundle to a model in memory, tensor by tensor.

The model is built without memory, each tensor is read, cast and moved in turn, and a method that drops a projection's weight
(int8, codebooks) replaces it as soon as it is there: the peak is the result and one layer, not the base and the result
(``tests/unit/test_loading_memory.py`` counts it).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from ditkit.bundle import METHODS, MethodCard, Opened, Part, Validity, backbone_config, read_card
from ditkit.conditioning import TextEncoder, encoder_from
from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.errors import ConfigError, Conflict, DitkitError, WeightsError
from ditkit.core.files import Source, TensorFile, check_kind, check_shapes
from ditkit.core.method import Method, check_conflicts, order
from ditkit.core.view import projections, with_methods

REPLACED = "replaced."  # in a method's file: a projection as the method keeps it


def load_model(
    opened: Opened, dtype: torch.dtype, device: torch.device, extra: Sequence[Method] = ()
) -> tuple[Backbone, dict[str, Validity]]:
    """The model with the methods of its bundle and ``extra`` attached, and what the methods' states were made for, by label."""
    listed = {p.label: make_method(p) for p in opened.config.methods}
    files = {label: _state_file(opened, label) for label in listed}
    methods = [*listed.values(), *extra]
    replacing = [m for m in methods if replaces(m)]
    kept = {label: file for label, file in files.items() if file is not None and listed[label] in replacing}
    model = fill(
        empty_model(opened.config.backbone, str(opened.folder), opened.config.encoder),
        opened.tensors,
        dtype,
        device,
        replacing,
        kept,
        str(opened.folder),
    )
    view = with_methods(model, *(m for m in methods if m not in replacing))
    valid_for = {}
    for part in opened.config.methods:
        read_state(listed[part.label], part.label, files[part.label], str(opened.folder / METHODS / f"{part.label}.safetensors"))
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


def read_method(path: str | Path) -> tuple[Method, MethodCard, TensorFile | None]:
    """A method that stands alone: ``LABEL.json`` as in a bundle's ``methods/``, with its state ``LABEL.safetensors`` beside it."""
    path = Path(path)
    card = MethodCard.load(path if path.suffix == ".json" else path.with_name(f"{path.name}.json"))
    state = path.with_name(f"{card.method.label}.safetensors")
    return make_method(card.method), card, TensorFile(state) if state.is_file() else None


def attach(view: Backbone, method: Method, card: MethodCard, file: TensorFile | None) -> Backbone:
    """A view with a method that was read, its state in it."""
    if replaces(method):
        raise DitkitError(f"{card.method.label} keeps projections of its own model", hint="load the bundle that it belongs to")
    view = with_methods(view, method)
    read_state(method, card.method.label, file, str(file.path if file else card.method.label))
    return view


def replaces(method: Method) -> bool:
    """Whether it swaps projections."""
    return type(method).replace is not Method.replace


def _state_file(opened: Opened, label: str) -> TensorFile | None:
    path = opened.folder / METHODS / f"{label}.safetensors"
    return TensorFile(path) if path.is_file() else None


def read_state(method: Method, label: str, file: TensorFile | None, where: str) -> None:
    """Read what a method learned, strictly."""
    if method.label != label:
        raise WeightsError(f"{where}: method {method.label!r} is listed as {label!r}", hint="correct its label")
    state = method.state_dict()
    found = {} if file is None else {name: shape for name, shape in file.shapes.items() if not name.startswith(REPLACED)}
    check_shapes(where, {name: tuple(value.shape) for name, value in state.items()}, found)
    if file is not None and state:
        for name, value in state.items():
            check_kind(where, name, file.entries[name].dtype, value.dtype)
        method.load_state_dict({name: file.read(name) for name in found})


def empty_model(part: Part, where: str = "", encoder: Part | None = None) -> Backbone:
    """The backbone on the meta device, with the encoder that was learned with it: shapes without memory."""
    cls, config = backbone_config(part, where)
    try:
        with torch.device("meta"), _NoInitialisation():
            model = cls(config)  # type: ignore[call-arg]
            model.encoder = learned_encoder(encoder)
            return model
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes whose product, or which themselves, are no 64-bit number
        raise ConfigError(f"{where}: a {part.name} of this size cannot be built: {str(error).splitlines()[0][:120]}".lstrip(": ")) from None


def learned_encoder(part: Part | None) -> TextEncoder | None:
    """A new text encoder, if it is of a kind that is learned with the network; None for those that are read from elsewhere."""
    if part is None:
        return None
    cls: Any = registry.get("encoders", part.name)
    return encoder_from(part.name, part.config) if cls.learned else None


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
    model: Backbone,
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    replacing: Sequence[Method] = (),
    kept: Mapping[str, TensorFile] | None = None,
    where: str = "",
) -> Backbone:
    """Give a model on the meta device its tensors; methods that replace projections are attached on the way.

    Args:
        replacing: these methods.
        kept: where a method's file (by label) holds a projection as the method keeps it, ``source`` need not hold it.

    Raises:
        WeightsError: a tensor is missing, extra, misshapen, not finite, or of integers where the model has numbers.
        Conflict: a method does not fit, or matches no projection.
    """
    swap = _Swap(model, replacing, kept or {}, device, where)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items() if name.rpartition(".")[0] not in swap.kept}
    check_shapes(where, wanted, source.shapes)
    check_conflicts(order(list(replacing)), model.traits, model.name, model.needs)
    for method in replacing:
        method.install(model)
    share = _shared(model)
    for path in [path for path, _ in model.named_modules()]:  # paths: a list of modules would keep what is replaced
        if path in swap.kept:
            swap.restore(path)
            continue
        module = model.get_submodule(path)
        for name, empty in module._parameters.items():
            if empty is not None:
                value = _read(source, f"{path}.{name}".lstrip("."), empty, dtype, device, where)
                module._parameters[name] = share(empty, nn.Parameter(value, requires_grad=empty.requires_grad))
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = _read(source, f"{path}.{name}".lstrip("."), buffer, dtype, device, where)
        swap(path)
    swap.check()
    _computed_buffers(model, device)
    model.methods = nn.ModuleDict({m.label: m for m in replacing})
    return model


class _Swap:
    """Puts substitutes in the place of projections: made from the weight that was just read, or from what the method kept of it."""

    def __init__(
        self, model: Backbone, replacing: Sequence[Method], files: Mapping[str, TensorFile], device: torch.device, where: str
    ) -> None:
        self.model, self.replacing, self.device, self.where = model, replacing, device, where
        self.targets = {path: (parent, name) for path, parent, name in projections(model)}
        self.kept: dict[str, tuple[str, TensorFile]] = {}  # path -> label and file
        for label, file in files.items():
            for name in file.entries:
                path = name.removeprefix(REPLACED).rpartition(".")[0]
                if name.startswith(REPLACED) and path not in self.targets:
                    raise WeightsError(f"{file.path}: {name!r} belongs to no projection of {model.name}", hint="save the bundle again")
                if name.startswith(REPLACED):
                    self.kept[path] = (label, file)
        self.matched = {label for label, _ in self.kept.values()}

    def __call__(self, path: str) -> None:
        """Swap the projection at ``path`` for the substitute of the first method that has one."""
        if path not in self.targets:
            return
        parent, name = self.targets[path]
        for method in self.replacing:
            if (new := method.replace(path, getattr(parent, name))) is not None:
                setattr(parent, name, new)
                self.matched.add(method.label)
                return

    def restore(self, path: str) -> None:
        """A substitute made from zeros, then given the state that the method's file holds of it."""
        label, file = self.kept[path]
        parent, name = self.targets[path]
        method = next(m for m in self.replacing if m.label == label)
        zeros = getattr(parent, name).to_empty(device=self.device)
        for p in zeros.parameters():
            p.zero_()
        new = method.replace(path, zeros)
        if new is None:
            raise WeightsError(
                f"{file.path} holds {path!r}, which {label} leaves alone", hint="its config is another; save the bundle again"
            )
        prefix = f"{REPLACED}{path}."
        state = {key: value for key, value in new.state_dict().items()}
        found = {key.removeprefix(prefix): shape for key, shape in file.shapes.items() if key.startswith(prefix)}
        check_shapes(file.path, {key: tuple(value.shape) for key, value in state.items()}, found)
        for key, value in state.items():
            check_kind(file.path, prefix + key, file.entries[prefix + key].dtype, value.dtype)
        new.load_state_dict({key: file.read(prefix + key) for key in state})
        setattr(parent, name, new)

    def check(self) -> None:
        """Raise Conflict for a method that replaced nothing."""
        for method in self.replacing:
            if method.label not in self.matched:
                raise Conflict(
                    f"{method.label} matches no projection of {self.model.name}", hint="see its config: which projections it takes"
                )


def bundle_tensors(view: Backbone, keep_base: bool) -> dict[str, Tensor]:
    """What ``write_bundle`` takes of a view: the base's weights, and the methods' states under ``methods.LABEL.``.

    Without the base (not wanted, or replaced while loading) projections are written as the method keeps them.
    """
    base: Backbone = view.__dict__.get("_root", view)
    states = {f"methods.{name}": value for name, value in view.methods.state_dict().items()}
    whole = base if keep_base and not swapped(base) else view
    paths, labels = swapped(whole), [m.label for m in view.attached if replaces(m)]
    if paths and len(labels) != 1:
        raise DitkitError(f"{', '.join(labels)} replaced projections", allowed="one such method where the base's weights are not written")
    for name, value in whole.state_dict().items():
        if not name.startswith("methods."):
            path = next((p for p in paths if name.startswith(f"{p}.")), None)
            states[name if path is None else f"methods.{labels[0]}.{REPLACED}{name}"] = value
    return states


def swapped(model: Backbone) -> set[str]:
    """Paths of the projections that are no longer what the backbone was built with."""
    built = empty_model(Part(name=model.name, config=model.config.to_dict()))
    return {path for path, parent, name in projections(built) if type(model.get_submodule(path)) is not type(getattr(parent, name))}


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


def _computed_buffers(model: Backbone, device: torch.device) -> None:
    """Buffers that are computed, not stored (tables), from a model that was built in memory."""
    if not any(b.is_meta for b in model.buffers()):
        return
    with _without_parameters():
        real = dict(type(model)(model.config).named_buffers())  # type: ignore[call-arg]
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = real[f"{path}.{name}".lstrip(".")].to(device)


@contextmanager
def _without_parameters() -> Iterator[None]:
    """Modules that are made keep no parameter in memory, only their buffers."""

    def empty(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]  # what it returns is registered instead
    try:
        with _NoInitialisation():
            yield
    finally:
        hook.remove()


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
