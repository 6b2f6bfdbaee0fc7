"""The seams: the nested places at which a method may put a layer. This file holds the inner four, which run inside compiled blocks.

    predict > trunk > block > update > branch > (attend, linear)

A block is written with three calls and knows no method: ``seam.residual``, ``seam.attend``, ``seam.linear``. A method
defines functions named after the seams it wants, ``(self, nxt, value, site)``, that call ``nxt`` never, once or twice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DitkitError
from .sparse import Blocks, Gathered, flex, gathered, joined
from .streams import Layout, Streams

if TYPE_CHECKING:
    from .masks import Mask
    from .method import Method


class Attn(NamedTuple):
    """One attention call. Keys of the dicts are segments: the streams, plus what a method adds (cached keys)."""

    name: str  # "attn", "cross", ...
    q: dict[str, Tensor]  # (B, H, Nq, d), after q/k norm and position code
    k: dict[str, Tensor]  # (B, H, Nk, d)
    v: dict[str, Tensor]
    q_layout: dict[str, Layout]
    k_layout: dict[str, Layout]
    mask: Mask | None = None  # over all segments, rendered outside the block; None: all visible


def sdpa(a: Attn) -> dict[str, Tensor]:
    """softmax(q k' / sqrt d) v over all segments jointly; one output (B, H, Nq, d) per query segment."""
    heads = next(iter(a.q.values())).shape[1]
    a = a._replace(k={n: _for_heads(u, heads) for n, u in a.k.items()}, v={n: _for_heads(u, heads) for n, u in a.v.items()})
    if isinstance(a.mask, Gathered):
        return gathered(a, a.mask)
    q, k, v = (joined(d) for d in (a.q, a.k, a.v))
    out = flex(q, k, v, a.mask) if isinstance(a.mask, Blocks) else F.scaled_dot_product_attention(q, k, v, a.mask)
    return dict(zip(a.q, out.split([u.shape[2] for u in a.q.values()], 2)))


def _for_heads(u: Tensor, heads: int) -> Tensor:
    """Grouped queries: keys or values of fewer heads, repeated."""
    return u if u.shape[1] == heads else u.repeat_interleave(heads // u.shape[1], 1)


class Site(NamedTuple):
    """What a layer may know inside a compiled block: no step, no block number, only its mode and its tensors."""

    mode: Hashable  # what ``plan`` decided: a constant of the graph
    given: dict[str, Tensor]  # tensors from this run's slots and from ``feed``
    out: dict[str, Tensor]  # what is handed out, to be kept
    branch: str = ""  # at branch and update: "attn", "mlp", ...; at linear: "img.qkv", ...; at attend: the call's name
    streams: Streams = {}
    taps: dict[str, Tensor] = {}  # the block's, see ``tap``

    def keep(self, name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hand out one (B, N, D) per stream for later steps, stored by the rows of that stream; returns them."""
        self.out.update({f"{self.branch}.{name}@{stream}": u for stream, u in values.items()})
        return values

    def kept(self, name: str) -> dict[str, Tensor]:
        """What was kept under ``name`` at this branch, for the tokens at hand."""
        prefix = f"{self.branch}.{name}@"
        found = {key.removeprefix(prefix): u for key, u in self.given.items() if key.startswith(prefix)}
        if not found:
            raise DitkitError(f"nothing was kept as {name!r} at {self.branch!r}", hint="a plan must compute a branch before it reuses it")
        return found

    def tap(self, name: str, value: Tensor) -> None:
        """Let ``value`` leave the block, with its gradient; ``run.taps`` has it after the forward."""
        self.taps[name] = value


Layer = tuple["Method", Any]  # a method and what it may know: Site inside, At or Run outside


def onion(core: Callable[..., Any], layers: Sequence[Layer], seam: str) -> Callable[..., Any]:
    """``core``, wrapped by the layers that define ``seam``; the first is outermost."""

    def over(function: Callable[..., Any], nxt: Callable[..., Any], where: Any) -> Callable[..., Any]:
        return lambda value, **kw: function(nxt, value, where, **kw)

    for method, where in reversed(layers):
        if hasattr(method, seam):
            core = over(getattr(method, seam), core, where)
    return core


class Seam:
    """Handed to ``block.forward``: the inner seams, and a tap for values that leave sideways (auxiliary losses, statistics)."""

    def __init__(self, layers: Sequence[tuple[Method, Site]] = (), masks: Mapping[str, Mask] | None = None) -> None:
        self.masks = masks or {}
        self.taps: dict[str, Tensor] = {}
        layers = [(m, site._replace(taps=self.taps)) for m, site in layers]
        self.sites = [site for _, site in layers]
        at = {name: [layer for layer in layers if hasattr(layer[0], name)] for name in ("branch", "update", "attend", "linear")}
        self._branch, self._update, self._attend, self._linear = at["branch"], at["update"], at["attend"], at["linear"]

    @property
    def adapts(self) -> bool:
        """Whether a layer acts on projections here: what was projected ahead, without it, would not be right."""
        return bool(self._linear)

    def residual(self, name: str, f: Callable[..., Any], h: dict[str, Tensor], gate: dict[str, Any], s: Streams) -> Streams:
        """x_k += gate_k f(h)_k for the streams k that f returns. ``branch`` is around f, ``update`` around gate * f."""
        y = onion(f, _sites(self._branch, name, s), "branch")(h)
        u = {k: y[k] if gate.get(k) is None else gate[k] * y[k] for k in y}
        u = onion(lambda value: value, _sites(self._update, name, s), "update")(u)
        return {**s, **{k: s[k]._replace(x=s[k].x + u[k]) for k in u}}

    def attend(self, a: Attn, s: Streams) -> dict[str, Tensor]:
        """Joint attention over the segments of ``a``."""
        a = a._replace(mask=self.masks.get(a.name))
        return onion(sdpa, _sites(self._attend, a.name, s), "attend")(a)

    def linear(self, name: str, module: nn.Module, x: Tensor, part: slice | None = None) -> Tensor:
        """``module(x)``; ``name`` is "stream.projection".

        A token that stands N times in a row (an expanded tensor) is computed once. ``part``: only these of the outputs are wanted.
        """
        if x.dim() == 3 and x.shape[1] > 1 and x.stride(1) == 0:
            return self.linear(name, module, x[:, :1], part).expand(-1, x.shape[1], -1)
        if self._linear:
            y = onion(module, [(m, site._replace(branch=name)) for m, site in self._linear], "linear")(x)
        elif part is not None and type(module) is nn.Linear:
            return F.linear(x, module.weight[part], None if module.bias is None else module.bias[part])
        else:
            y = module(x)
        return y if part is None else y[..., part]

    def pieces(self, name: str, module: nn.Module, x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
        """``linear``, its outputs in pieces of these widths.

        Sampling on a CPU computes each by itself: one wide output is slower there, as its memory is given back and faulted in each time.
        """
        if self._linear or type(module) is not nn.Linear or x.device.type != "cpu" or torch.is_grad_enabled():
            return self.linear(name, module, x).split(widths, -1)
        return tuple(self.linear(name, module, x, slice(end - width, end)) for width, end in zip(widths, accumulate(widths)))

    def tap(self, name: str, value: Tensor) -> None:
        """Let ``value`` leave the block; it is returned with the forward, never stored on a module."""
        self.taps[name] = value


def _sites(layers: Sequence[tuple[Method, Site]], branch: str, s: Streams) -> list[Layer]:
    return [(m, site._replace(branch=branch, streams=s)) for m, site in layers]
