"""What a network costs, counted while it runs: multiply-adds, FLOPs, parameters, bytes. On the meta device nothing is computed.

MACs are the multiply-adds of matrix products, convolutions and attention; FLOPs are twice that. Papers' "Gflops" are often
MACs (DiT's are). Elementwise work is not counted, as in all published figures.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ditkit.core import registry
from ditkit.core.backbone import Backbone, run_blocks
from ditkit.core.errors import DitkitError
from ditkit.core.run import Run
from ditkit.core.view import shallow


@dataclass(frozen=True)
class Cost:
    """One call, for the whole batch.

    ``weight_bytes`` are the distinct parameters and buffers that the call read; ``activation_bytes`` the most that was alive
    at once of what it made, in eager mode. ``linears`` and ``attentions`` say which shapes were called how often. ``uncounted``
    names operators of other libraries for which there is no formula: the count is then too low.
    """

    macs: int
    linear_macs: int
    attention_macs: int
    weight_bytes: int
    activation_bytes: int
    io_bytes: int = 0  # input and output
    linears: dict[tuple[int, int, int], int] = field(default_factory=dict)  # (M, K, N) -> calls
    integers: dict[tuple[int, int, int], int] = field(default_factory=dict)  # those in 8-bit integers, among ``linear_macs`` too
    attentions: dict[tuple[int, int, int, int, int], int] = field(default_factory=dict)  # (B, H, Nq, Nk, d) -> calls
    uncounted: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Two for each multiply-add."""
        return 2 * self.macs

    @property
    def integer_macs(self) -> int:
        """Those of ``linear_macs`` that are done in 8-bit integers."""
        return sum(m * k * n * calls for (m, k, n), calls in self.integers.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, shapes left out."""
        plain = {k: v for k, v in asdict(self).items() if k not in _SHAPES}
        return {"flops": self.flops, "integer_macs": self.integer_macs, **plain, "uncounted": list(self.uncounted)}


_SHAPES = ("linears", "integers", "attentions")


@dataclass(frozen=True)
class RunCost:
    """A whole trajectory: one ``Cost`` a step (all its guidance passes together)."""

    steps: tuple[Cost, ...]
    parameters: int
    weight_bytes: int  # of the whole model

    @property
    def macs(self) -> int:
        return sum(c.macs for c in self.steps)

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def total(self) -> Cost:
        """All steps together. Activations are the most of any step; weights are read anew in each."""
        costs = self.steps
        shapes: dict[str, Any] = {k: dict(sum((Counter(getattr(c, k)) for c in costs), Counter())) for k in _SHAPES}
        sums = {k: sum(getattr(c, k) for c in costs) for k in ("macs", "linear_macs", "attention_macs", "weight_bytes", "io_bytes")}
        uncounted = tuple(sorted({name for c in costs for name in c.uncounted}))
        return Cost(**sums, **shapes, activation_bytes=max(c.activation_bytes for c in costs), uncounted=uncounted)


def count(call: Callable[[], Any], model: nn.Module | None = None) -> Cost:
    """What ``call()`` costs. ``model``: whose tensors are weights."""
    tally = _Tally(weights_of(model) if model is not None else [])
    with torch.no_grad(), _MarkAttention(tally), tally:
        call()
    linear, attention = (tally.flops[kind] // 2 for kind in ("linear", "attention"))
    shapes: dict[str, Any] = {k: dict(getattr(tally, k)) for k in _SHAPES}
    unknown = tuple(sorted(tally.unknown))
    return Cost(linear + attention, linear, attention, sum(tally.read.values()), tally.peak, **shapes, uncounted=unknown)


def count_forward(model: Backbone, batch: int = 1, inputs: tuple[Tensor, Tensor, dict[str, Any]] | None = None) -> Cost:
    """One evaluation of the network, its conditioning included, on the device where the model is.

    Args:
        inputs: x, network time, conditioning; default: the backbone's example of ``batch``.
    """
    view = _eager(model)
    x, t, cond = _inputs(view, batch, inputs)
    held: list[Tensor] = []
    cost = count(lambda: held.append(view(x, t, **cond)), view)
    return _with_io(cost, x, held[0])


def count_run(
    model: Backbone, num_steps: int, batch: int = 1, guided: bool = False, inputs: tuple[Tensor, Tensor, dict[str, Any]] | None = None
) -> RunCost:
    """A trajectory with its methods: caches are filled and reused as in sampling, so each step has its own cost.

    Args:
        num_steps: solver steps, one evaluation each.
        guided: two passes a step, with and without the label (the backbone then needs ``null``).
    """
    view = _eager(model)
    x, t, cond = _inputs(view, batch, inputs)
    conds = {"cond": cond, "null": view.null(**cond)} if guided else {"cond": cond}  # type: ignore[operator]
    prepared = {name: view.prepare(**c) for name, c in conds.items()}
    run = Run(view, num_steps)
    run.times = t.expand(num_steps, *t.shape)
    own_work = any(hasattr(m, "predict") for m in run.methods)  # a step may cost what its modes do not say
    held: list[Tensor] = []
    costs: list[Cost] = []
    seen: dict[Hashable, Cost] = {}

    def step() -> None:
        outputs = [view(x, t, p, run=run, guidance_pass=name) for name, p in prepared.items()]
        held.append(run.close(outputs[0]))

    for i in run.steps():
        key = _pattern(run, first=i == 0)
        if x.is_meta and key in seen and not own_work:
            for name in prepared:
                run.begin(name)
            run.close(held[0])  # a method may decide here for the next step
        else:
            held.clear()
            cost = count(step, view)
            seen[key] = _with_io(cost, x, held[0])
        costs.append(seen[key])
    return RunCost(tuple(costs), parameters(model), weight_bytes(model))


def _pattern(run: Run, first: bool) -> Hashable:
    """What decides the cost of a step: the modes of all blocks, and which values are kept. Without data equal steps cost the same."""
    run.first = first
    modes = tuple(tuple((m.label, at.mode) for m, at in row.layers) for row in run.plan())
    return modes, frozenset((key, name) for key, slots in run.slots.items() for name in slots)


def published(backbone: str, size: str, **changes: Any) -> Backbone:
    """The backbone ``size`` of the paper's table on the meta device: shapes only, nothing is allocated."""
    cls: Any = registry.get("backbones", backbone)
    if size not in cls.sizes:
        raise DitkitError(f"{backbone} has no size {size!r}", allowed=", ".join(cls.sizes))
    with torch.device("meta"):
        return cls(**{**cls.sizes[size], **changes}).eval()


def parameters(model: nn.Module) -> int:
    """Numbers in all parameters, shared ones once; 8-bit weights, which are kept as buffers, are parameters too."""
    return sum(t.numel() for t in weights_of(model) if isinstance(t, nn.Parameter) or t.dtype in (torch.int8, torch.uint8))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum(t.numel() * t.element_size() for t in weights_of(model))


def weights_of(model: nn.Module) -> list[Tensor]:
    """The distinct parameters and buffers."""
    return list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())


# ---- counting ---------------------------------------------------------------------------------------------------------------


def _attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """q k' and the product with v: 2 x Nq x Nk x (d + d_v) for each head."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _quantised_linear(x: Tensor, out: Tensor) -> int:
    return 2 * out.numel() * x.shape[-1]


#: operators that torch's own table lacks (at torch 2.13 the attention kernel of CPUs is among them: it would count as nothing)
_EXTRA: dict[str, Callable[[tuple[Any, ...], Any], int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda a, out: _attention_flops(a[0].shape, a[1].shape, a[2].shape),
    "aten::_scaled_dot_product_fused_attention_overrideable": lambda a, out: _attention_flops(a[0].shape, a[1].shape, a[2].shape),
    "aten::_int_mm": lambda a, out: _quantised_linear(a[0], out),
    "aten::_weight_int8pack_mm": lambda a, out: _quantised_linear(a[0], out),
    "aten::_addmm_activation": lambda a, out: _quantised_linear(a[1], out),
    "ditkit::qlinear": lambda a, out: _quantised_linear(a[0], out),
    "onednn::qlinear_pointwise": lambda a, out: _quantised_linear(a[0], out),
    "mkldnn::_linear_pointwise": lambda a, out: _quantised_linear(a[0], out),
}
_INTEGER = ("aten::_int_mm", "ditkit::qlinear", "onednn::qlinear_pointwise")
_PLAIN = ("aten", "prim", "prims")


class _Tally(TorchDispatchMode):
    """Adds up every operator that runs below it."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.linears: Counter[tuple[int, int, int]] = Counter()
        self.integers: Counter[tuple[int, int, int]] = Counter()
        self.attentions: Counter[tuple[int, int, int, int, int]] = Counter()
        self.unknown: set[str] = set()
        self.read: dict[int, int] = {}
        self.in_attention = False
        self.alive = self.peak = 0
        self._weights: Counter[int] = Counter()
        for t in weights:  # several may share a storage
            self._weights[_storage(t)] += t.numel() * t.element_size()
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        known = func._overloadpacket in flop_registry or func._schema.name in _EXTRA
        if not known and _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if known:
            self._count(func, args, kwargs, out)
        elif func.namespace not in _PLAIN:
            self.unknown.add(func._schema.name)
        self._bytes(args, kwargs, out)
        return out

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = func._schema.name
        if name in _EXTRA:
            flops = _EXTRA[name](args, out)
        else:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        kind = "attention" if self.in_attention or "attention" in name else "linear"
        self.flops[kind] += int(flops)
        if kind == "linear" and isinstance(out, Tensor) and out.dim() and out.numel():
            width = out.shape[1 if "conv" in name else -1]
            rows = out.numel() // width
            shapes = self.integers if name in _INTEGER else self.linears
            shapes[rows, int(flops) // (2 * rows * width), width] += 1

    def _bytes(self, args: Any, kwargs: Any, out: Any) -> None:
        """Weights that were read, and memory that came to life; storages are followed until they die."""
        inputs = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.read.update({key: self._weights[key] for key in inputs if key in self._weights})
        for t in tree_leaves(out):
            if not isinstance(t, Tensor):
                continue
            key = _storage(t)
            if key in inputs or key in self._seen or key in self._weights or not key:
                continue
            storage = t.untyped_storage()
            size = t.numel() * t.element_size() if t.device.type == "meta" else storage.nbytes()
            self._seen.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is only a name for others (in inference mode these arrive whole)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd)


class _MarkAttention(TorchFunctionMode):
    """Tells a tally when it is inside ``scaled_dot_product_attention``, which falls apart into plain products on some devices."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k = (args[i] if i < len(args) else kwargs[n] for i, n in enumerate(("query", "key")))
        if q.dim() == 4:
            self.tally.attentions[(*q.shape[:3], k.shape[2], q.shape[3])] += 1
        with self._marked():
            return func(*args, **kwargs)

    @contextmanager
    def _marked(self) -> Iterator[None]:
        self.tally.in_attention = True
        try:
            yield
        finally:
            self.tally.in_attention = False


def _storage(t: Tensor) -> int:
    """A key of the memory behind a tensor; 0 where there is none to speak of (packed weights of oneDNN)."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def _eager(model: Backbone) -> Backbone:
    """The same network outside the compiler, where its operators can be seen."""
    if model._call is run_blocks:
        return model
    view = shallow(model)
    view._call = run_blocks
    return view


def _inputs(model: Backbone, batch: int, inputs: tuple[Tensor, Tensor, dict[str, Any]] | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
    if batch < 1:
        raise DitkitError(f"batch is {batch}", allowed="1 or more")
    x, t, cond = model.example(batch) if inputs is None else inputs
    first = next(model.parameters())
    dtype = first.dtype if first.is_floating_point() else x.dtype
    moved = {k: v.to(first.device) if isinstance(v, Tensor) else v for k, v in cond.items()}
    return x.to(first.device, dtype), t.to(first.device), moved


def _with_io(cost: Cost, x: Tensor, out: Tensor) -> Cost:
    return replace(cost, io_bytes=sum(t.numel() * t.element_size() for t in (x, out)))
