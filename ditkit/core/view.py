"""Views: ``with_methods(model, ...)`` is a second model over the same parameters.

Whatever a view swaps leaves the base alone, so off is the base, detaching is dropping the view, and base and fast, teacher
and student coexist.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .backbone import Backbone, count_graphs, run_blocks
from .errors import Conflict, DitkitError
from .grains import ENGINES, GRAINS
from .method import Method, check_conflicts, order

_views: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()


def shallow(model: Backbone) -> Backbone:
    """Same parameters and buffers, new modules: what is swapped in the copy leaves the original alone."""
    seen: dict[int, nn.Module] = {}

    def one(m: nn.Module) -> nn.Module:
        if id(m) not in seen:
            new = seen[id(m)] = copy.copy(m)
            new.__dict__.update(_parameters=dict(m._parameters), _buffers=dict(m._buffers), _modules={})
            new._modules.update({k: None if c is None else one(c) for k, c in m._modules.items()})
        return seen[id(m)]

    view = one(model)
    assert isinstance(view, Backbone)
    root = view.__dict__["_root"] = model.__dict__.get("_root", model)
    _views.setdefault(root, weakref.WeakSet()).add(view)
    return view


def refuse_if_shared(model: Backbone) -> None:
    """Converting or reassigning parameters would break the sharing between a base and its views, silently."""
    if "_root" in model.__dict__:
        raise DitkitError(
            "a view shares its parameters with its base", hint="convert (.to, .double, assign=True) the base, then attach again"
        )
    if _views.get(model):
        raise DitkitError("views of this model share its parameters", hint="drop them, convert, then attach again")


def with_methods(model: Backbone, *methods: Method) -> Backbone:
    """A view of ``model`` with these methods and those it already has.

    Raises:
        Conflict: two methods, or a method and the backbone, cannot meet; or a method matches nothing.
    """
    if any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise DitkitError("the model is sharded already", hint="attach first, then shard the view that is trained (blocks, then the view)")
    todo = order([*model.attached, *methods])
    check_conflicts(todo, model.traits, model.name or type(model).__name__, model.needs)
    view = shallow(model)
    for m in order(list(methods)):
        m.install(view)
        replace_projections(view, m)
    del view.methods  # so that they come last: a model's first parameter is the backbone's, and tells its dtype and device
    view.methods = nn.ModuleDict({m.label: m for m in todo})
    return view


def replace_projections(view: Backbone, method: Method) -> int:
    """Swap the projections of the view for which the method has a substitute."""
    if type(method).replace is Method.replace:
        return 0
    count = 0
    for path, parent, name in projections(view):
        if (new := method.replace(path, getattr(parent, name))) is not None:
            setattr(parent, name, new)
            count += 1
    if not count:
        raise Conflict(f"{method.label} matches no projection of {view.name}", hint="see its config: which projections it takes")
    return count


def projections(model: Backbone) -> list[tuple[str, nn.Module, str]]:
    """What ``Method.replace`` may swap: every linear layer of the backbone, but its encoder's, as (path, parent, name in the parent)."""
    found = []
    for path, parent in model.named_modules():
        for name, child in parent.named_children():
            if getattr(child, "in_features", None) is not None and not path.startswith(("methods", "encoder")):
                found.append((f"{path}.{name}".lstrip("."), parent, name))
    return found


def keep_blocks(model: Backbone, keep: Sequence[int]) -> Backbone:
    """The model with only these blocks, in order, over the same parameters; long skips are renumbered.

    Raises:
        Conflict: methods are attached, or a long skip would lose one of its ends.
    """
    keep = sorted(set(keep))
    if model.methods:
        raise Conflict(f"{', '.join(model.methods)} is attached", hint="keep blocks first, attach then")
    if not keep or keep[0] < 0 or keep[-1] >= len(model.blocks):
        raise DitkitError(f"blocks {keep}", allowed=f"some of 0 to {len(model.blocks) - 1}")
    for a, b in model.skips:
        if (a in keep) != (b in keep):
            raise Conflict(f"block {b} needs the output of block {a} (a long skip)", hint="keep both or neither")
    view = shallow(model)
    view.blocks = nn.ModuleList(view.blocks[i] for i in keep)
    view.skips = tuple((keep.index(a), keep.index(b)) for a, b in model.skips if a in keep)
    return view


def compile_view(
    model: Backbone, grain: str = "block", *, engine: str = "inductor", num_steps: int | None = None, backend: Any = None, **options: Any
) -> Backbone:
    """A view whose blocks are compiled, full graph.

    Args:
        grain: "block": one graph per block kind and mode, seconds to start, any number of patterns; "step": the trunk as
            one graph for each distinct step pattern, faster per step.
        engine: what the graphs become: "inductor", torch's own, or "openvino" (CPU, fp32, sampling only; an extra).
        num_steps: if given, the number of graphs is computed from the schedule and dynamo's limit raised to it.
        backend: one of dynamo's backends instead of an engine.
        options: for ``torch.compile``.

    Raises:
        DitkitError: no such grain or engine. MissingDependency: the engine is not installed.
    """
    if grain not in GRAINS:
        raise DitkitError(f"grain is {grain!r}", allowed=" or ".join(map(repr, GRAINS)))
    backend = _backend(engine) if backend is None else backend
    view = shallow(model)
    view.grain = grain
    # a code object of its own: its graphs are counted apart and freed with it
    own = types.FunctionType(run_blocks.__code__.replace(), run_blocks.__globals__, "run_blocks")
    if backend == "inductor" and "mode" not in options:
        from .inductor import settings

        options["options"] = {**settings(), **options.get("options", {})}
    view._call = torch.compile(own, fullgraph=True, dynamic=False, backend=backend, **options)
    if num_steps is not None:
        allow_graphs(2 * count_graphs(view, num_steps))
    return view


def _backend(engine: str) -> Any:
    if engine not in ENGINES:
        raise DitkitError(f"engine is {engine!r}", allowed=" or ".join(map(repr, ENGINES)))
    if engine == "inductor":
        return engine
    from . import openvino

    openvino.load()
    return openvino.backend


def allow_graphs(count: int) -> None:
    """Raise dynamo's limit on graphs per function to ``count`` (its default is 8); it is never lowered."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, count)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, count)
