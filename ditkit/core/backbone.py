"""The backbone: embed -> blocks -> head -> unembed, a pure function of token streams around which methods are layers.

What is compiled is ``run_blocks``: pure, without a step or block number. The loop here takes what a block is given from the
run's slots, and stores what it hands out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .config import Config
from .errors import DitkitError
from .masks import Mask, MaskFn, padding, render
from .method import Method, order
from .run import At, Run, gather, scatter
from .seams import Seam, Site, onion
from .streams import Streams


class Prepared(NamedTuple):
    """What does not depend on time, made once a run by ``prepare``.

    ``shared`` is the backbone's own (label embeddings, text tokens, tables); ``blocks`` holds tensors for each block
    (keys and values of cross-attention), or nothing.
    """

    shared: dict[str, Any]
    blocks: tuple[dict[str, Tensor], ...] = ()


class Part(NamedTuple):
    """One block of a segment, with all that goes into its graph."""

    block: nn.Module
    layers: tuple[tuple[Method, Hashable, dict[str, Tensor]], ...]  # method, mode, given
    masks: dict[str, Mask]
    extra: dict[str, Any]  # kv=, prepared=, skip= where the block takes them
    skip: int | None = None  # position in the segment whose output is this block's skip
    saves: bool = False  # its output is wanted after the segment, for a long skip


class Done(NamedTuple):
    """What a segment returns: tokens by stream, what each part hands out, taps, outputs saved for long skips."""

    x: dict[str, Tensor]
    kept: list[list[dict[str, Tensor]]]
    taps: list[dict[str, Tensor]]
    saved: list[dict[str, Tensor] | None]


def run_blocks(parts: tuple[Part, ...], s: Streams) -> Done:
    """Pure, and what is compiled: blocks with their layers over streams."""
    kept: list[list[dict[str, Tensor]]] = []
    taps: list[dict[str, Tensor]] = []
    outputs: list[dict[str, Tensor]] = []
    for part in parts:
        seam = Seam([(m, Site(mode, given, {})) for m, mode, given in part.layers], part.masks)
        sites = seam.sites
        extra = part.extra if part.skip is None else {**part.extra, "skip": outputs[part.skip]}
        s = part.block(s, seam, **extra)
        kept.append([site.out for site in sites])
        taps.append(seam.taps)
        outputs.append({name: st.x for name, st in s.items()})
    return Done(outputs[-1], kept, taps, [out if part.saves else None for part, out in zip(parts, outputs)])


class Backbone(nn.Module):
    """A subclass gives ``embed``, ``head``, ``unembed``, ``blocks`` and what it declares here.

    A block is an ``nn.Module`` with ``branches`` (its residual sub-layers), ``calls(streams)`` (its attention calls: name ->
    query streams, key streams), ``projections()`` (what the seam ``linear`` is called with: name -> module) and
    ``forward(streams, seam, **extra)``; it may have ``masks`` of its own (windows in every second block; a dict by call where calls
    differ), and ``keys(call, layouts)``, the key layouts of a call whose keys are not the tokens of their stream (fewer: compression).
    """

    name: ClassVar[str] = ""
    config_class: ClassVar[type[Config]] = Config
    sizes: ClassVar[dict[str, dict[str, Any]]] = {}  # the paper's table: published name -> config values
    traits: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()  # traits that its blocks rely on: methods that break them are refused
    masks: ClassVar[tuple[MaskFn, ...]] = (padding,)
    main: ClassVar[str] = "img"  # the stream that the head reads
    config: Any
    blocks: nn.ModuleList

    def __init__(self) -> None:
        super().__init__()
        self.methods = nn.ModuleDict()
        self.encoder: Any = None  # a module learned with the network that turns ``tokens`` into what ``prepare`` takes (text)
        self.skips: tuple[tuple[int, int], ...] = ()  # long skips: block ``to`` gets the output of block ``from``
        self.grain: str = "block"  # "block": each block is a graph; "step": consecutive blocks are one
        self._call: Callable[[tuple[Part, ...], Streams], Done] = run_blocks

    @property
    def attached(self) -> list[Method]:
        """The methods, outermost first."""
        return order(list(self.methods.values()))  # type: ignore[arg-type]

    @property
    def inputs(self) -> frozenset[str]:
        """Names of what the attached methods take from a run, besides the backbone's conditioning."""
        return frozenset(name for m in self.methods.values() for name in m.inputs)  # type: ignore[union-attr]

    @classmethod
    def tiny(cls) -> Backbone:
        """A small instance for the contract tests, with every parameter drawn (no zero-initialised branch is silent)."""
        raise NotImplementedError

    @classmethod
    def tinies(cls) -> dict[str, Backbone]:
        """``tiny()`` under the name "", and one small instance for each other kind of network that the config can choose."""
        return {"": cls.tiny()}

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """An input of the tiny instance: x, network time, conditioning by name."""
        raise NotImplementedError

    def prepare(self, **cond: Any) -> Prepared:
        """Once a run: what does not depend on time. Checks the conditioning."""
        raise NotImplementedError

    def ahead(self) -> bool:
        """Whether ``prepare`` may compute what belongs to a block, such as keys and values of a text: not where a method acts on
        projections, nor in training, where all of it would be kept for the backward pass, nor where a block gathers its weights when
        it is called (FSDP)."""
        acted_on = any(hasattr(m, "linear") for m in self.attached)
        sharded = any(type(p).__name__ == "DTensor" for p in self.blocks.parameters())
        return not (acted_on or sharded or torch.is_grad_enabled())

    def told(self, cond: dict[str, Any]) -> dict[str, Any]:
        """Conditioning as ``prepare`` takes it: where it holds ``tokens``, the encoder is asked what they say."""
        return self.encoder.conditioning(self, **cond) if self.encoder is not None and "tokens" in cond else cond

    def shorter(self, keep: Sequence[int]) -> dict[str, Any]:
        """The values of the configuration that change when only the blocks ``keep`` (ascending) stay."""
        return {"depth": len(keep)}

    def embed(self, x: Tensor, t: Tensor, prepared: Prepared) -> Streams:
        """x (B, C, ...), network time t (B,) or (B, N) -> streams."""
        raise NotImplementedError

    def conditioning(self, t: Tensor, prepared: Prepared) -> dict[str, Tensor]:
        """What modulates each stream at network times t (B, K): name -> (B, K, E), the ``c`` that ``embed`` gives it at each of these.

        Blocks call their projections named ``NAME.ada`` with SiLU of it; a name may also be that of weights that several streams share.
        {}, the default: it is not known without x, or there is none.
        """
        return {}

    def head(self, s: Streams) -> Tensor:
        """Streams -> (B, N, P) output tokens of the main stream."""
        raise NotImplementedError

    def unembed(self, tokens: Tensor, x: Tensor) -> Tensor:
        """(B, N, P) -> (B, C_out, ...) on the grid of x."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, t: Tensor, prepared: Prepared | None = None, *, run: Run | None = None, guidance_pass: Hashable = "", **cond: Any
    ) -> Tensor:
        """One evaluation of the network.

        Args:
            x: (B, C, ...) noised data.
            t: (B,) or (B, N) network time, as the process gives it.
            prepared: from ``prepare``; without it ``cond`` is prepared here.
            run: the trajectory this belongs to; without it the call is the only step of a run of its own, and ``cond`` may hold the
                inputs of methods too.
            guidance_pass: which of several forwards of a step this is; each has slots of its own.
        """
        if run is None:
            run = Run(self, inputs={name: cond.pop(name) for name in self.inputs & cond.keys()})
        if run.model is not self:
            raise DitkitError("this run was started for another view of the model", hint="use Run(view, num_steps)")
        if prepared is None:
            prepared = self.prepare(**self.told(cond))
        elif cond:
            raise DitkitError(f"prepared and {sorted(cond)} are both given", allowed="one of them")
        run.begin(guidance_pass)
        run.t, run.prepared = t, prepared
        layers = [(m, run) for m in run.methods]
        trunk = onion(lambda s: self.head(self._trunk(s, run, prepared)), layers, "trunk")
        return onion(lambda x: self.unembed(trunk(self._enter(x, t, prepared, run)), x), layers, "predict")(x)

    def _enter(self, x: Tensor, t: Tensor, prepared: Prepared, run: Run) -> Streams:
        s = self.embed(x, t, prepared)
        run.check_shapes(s)
        return s

    def _trunk(self, s: Streams, run: Run, prepared: Prepared) -> Streams:
        run.old_masks, run.masks = run.masks, {}
        saved: dict[int, dict[str, Tensor]] = {}
        for ids in self.segments(run):
            row = run.plan()[ids[0]]
            compute = _Segment(self, ids, run, prepared, saved)
            s = onion(compute, row.layers if row.outside else (), "block")(s)
        return s

    def masks_of(
        self, block: nn.Module, s: Streams, run: Run, layers: tuple[tuple[Method, At], ...] = (), kv: Streams | None = None
    ) -> dict[str, Mask]:
        """The masks of the block's attention calls over streams: the backbone's, its own and those of the layers; rendered once a run.

        ``kv``: streams that give keys and values instead of those of ``s``.
        """
        added: list[MaskFn] = [m.mask for m, _ in layers if hasattr(m, "mask")]  # type: ignore[misc]
        masks = {}
        for call, (q_names, k_names) in block.calls(s).items():  # type: ignore[operator]
            q = {n: s[n].layout for n in q_names}
            k = {n: (kv or s).get(n, s[n]).layout for n in k_names}
            k = block.keys(call, k) if hasattr(block, "keys") else k  # type: ignore[operator]
            for m, at in layers:
                k = m.keys(call, k, at)
            functions = [*self.masks, *block_masks(block, call), *added]
            key = (tuple(functions), tuple((n, id(u)) for n, u in q.items()), tuple((n, id(u)) for n, u in k.items()))
            if key not in run.masks:  # the layouts are kept with the mask, so that an id stands for one of them
                run.masks[key] = run.old_masks.get(key) or (render(functions, q, k), q, k)
            if run.masks[key][0] is not None:
                masks[call] = run.masks[key][0]
        return masks

    def segments(self, run: Run) -> Iterator[list[int]]:
        """The blocks of this step, grouped into graphs. A block with layers outside stands alone."""
        group: list[int] = []
        for i, row in enumerate(run.plan()):
            if group and (self.grain == "block" or row.outside or run.plan()[group[-1]].outside):
                yield group
                group = []
            group.append(i)
        yield group

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        from .view import refuse_if_shared

        refuse_if_shared(self)
        return super()._apply(fn, recurse)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch's; ``assign=True`` is refused where parameters are shared between a base and its views."""
        if assign:
            from .view import refuse_if_shared

            refuse_if_shared(self)
        return super().load_state_dict(state_dict, strict, assign)


class _Segment:
    """Computes some consecutive blocks: gathers what they are given, calls the graph, stores what they hand out."""

    def __init__(
        self,
        model: Backbone,
        ids: list[int],
        run: Run,
        prepared: Prepared,
        saved: dict[int, dict[str, Tensor]],
    ) -> None:
        self.model, self.ids, self.run, self.prepared, self.saved = model, ids, run, prepared, saved

    def __call__(self, s: Streams, **extra: Any) -> Streams:
        parts = tuple(self._part(i, s, extra) for i in self.ids)
        if self.run.plan()[self.ids[0]].outside:  # a layer may hold what it passed in; a block may write into what it got
            s = {n: st._replace(x=st.x.clone()) for n, st in s.items()}
        done = self.model._call(parts, s)
        for i, part, kept, taps, saved in zip(self.ids, parts, done.kept, done.taps, done.saved):
            for (method, _, _), values in zip(part.layers, kept):
                if values:
                    scatter(self.run.slots_of(method, i), values, s)
            self.run.taps.extend((i, name, value) for name, value in taps.items())
            if saved is not None:
                self.saved[i] = saved
        return {name: st._replace(x=done.x[name]) for name, st in s.items()}

    def _part(self, i: int, s: Streams, extra: dict[str, Any]) -> Part:
        run, model = self.run, self.model
        layers = []
        for m, at in run.plan()[i].layers:
            given = gather(run.slots_of(m, i), at.mode, m, s)
            layers.append((m, at.mode, {**given, **m.feed(at)}))
        extra = dict(extra)
        if self.prepared.blocks and self.prepared.blocks[i]:
            extra["prepared"] = self.prepared.blocks[i]
        source = dict((to, start) for start, to in model.skips).get(i)
        skip = self.ids.index(source) if source in self.ids else None
        if source is not None and skip is None:
            extra["skip"] = {n: u.view_as(u) for n, u in self.saved[source].items()}  # not the same object as the block's input
        masks = model.masks_of(model.blocks[i], s, run, run.plan()[i].layers, extra.get("kv"))
        last = self.ids[-1]
        return Part(model.blocks[i], tuple(layers), masks, extra, skip, any(a == i and b > last for a, b in model.skips))


def count_graphs(model: Backbone, num_steps: int, active: Any = None) -> int:
    """The graphs that a run of ``num_steps`` compiles, from the schedule alone: block kinds x combined modes."""
    run, seen = Run(model, num_steps, active), set()
    kinds = [block_kind(b) for b in model.blocks]
    for step in run.steps():
        run.first = step == 0
        for ids in model.segments(run):
            seen.add(tuple((kinds[i], tuple((m.label, at.mode) for m, at in run.plan()[i].layers), _skip_kind(model, i, ids)) for i in ids))
    return len(seen)


def _skip_kind(model: Backbone, i: int, ids: list[int]) -> Hashable:
    source = next((a for a, b in model.skips if b == i), None)
    skip = None if source is None else ids.index(source) if source in ids else "outside"
    return skip, any(a == i and b > ids[-1] for a, b in model.skips)


def block_kind(block: nn.Module) -> Hashable:
    """Blocks of one kind share their graphs: same modules, same shapes."""
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    modules = tuple((n, type(m).__name__, getattr(m, "kind", None)) for n, m in block.named_modules())
    return modules, tuple((n, tuple(p.shape), p.dtype) for n, p in tensors.items()), tuple(all_masks(block).items())


def block_masks(block: nn.Module, call: str) -> tuple[MaskFn, ...]:
    """The mask functions of one block for one of its attention calls."""
    masks = all_masks(block)
    return masks.get("", ()) + masks.get(call, ())


def all_masks(block: nn.Module) -> Mapping[str, tuple[MaskFn, ...]]:
    """The mask functions of one block, by call; "": of all calls."""
    masks = getattr(block, "masks", ())
    return masks if isinstance(masks, Mapping) else {"": masks}


__all__ = ["At", "Backbone", "Done", "Part", "Prepared", "block_kind", "count_graphs", "run_blocks"]
