"""Fewer blocks: the plain network of some blocks of another, and the usual ways to choose them, against which TinyFusion is compared.

keep = least_needed(block_similarity(model, x, t, y=y), remove=4)
small = prune_pipeline(pipe, keep)          # small.save_pretrained(folder): a bundle like any other
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.bundle import BundleConfig, Part
from ditkit.core.backbone import Backbone, block_kind
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.streams import Streams
from ditkit.core.view import keep_blocks, with_methods
from ditkit.loading import empty_model, fill

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline

#: The 14 of 28 blocks of BK-SDM's pattern, the "oracle" of TinyFusion's table 1.
EVERY_SECOND_OF_28 = (0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27)

Loss = Callable[[Backbone], float]


class BlockOutputs(Method):
    """Watches blocks: after a forward ``run.memory["block_outputs"][i]`` is (input, output) of block i's main stream, each (B, N, D).

    Args:
        blocks: which are watched; None: all.
    """

    name, stage, exact = "block_outputs", "structure", True

    def __init__(self, blocks: Sequence[int] | None = None) -> None:
        super().__init__()
        self.blocks = None if blocks is None else frozenset(blocks)

    def plan(self, at: At) -> tuple[()] | None:
        return () if self.blocks is None or at.block in self.blocks else None

    def block(self, nxt: Any, s: Streams, at: At, **kw: Any) -> Streams:
        out: Streams = nxt(s, **kw)
        main = at.run.model.main
        at.memory[at.block] = (s[main].x, out[main].x)
        return out


# ---- the shallower network ----


def base_of(view: Backbone) -> Backbone:
    """The model that a view was made of, or the model itself. Raises Conflict where a method replaced weights or gave blocks roles."""
    if roles := [m.label for m in view.attached if m.stage == "structure" and "tokens" in m.owns]:
        raise Conflict(f"{', '.join(roles)} gave each block a role, and weights for it", hint="prune first, attach and fine-tune then")
    if replaced := [m.label for m in view.attached if type(m).replace is not Method.replace]:
        raise Conflict(f"{', '.join(replaced)} replaced weights that pruning copies", hint="prune first, then quantise the result")
    base: Backbone = view.__dict__.get("_root", view)
    return base


class _Copies:
    """Tensors of a model, each read as a copy."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].detach().clone()


def shorten(model: Backbone, keep: Sequence[int]) -> Backbone:
    """A network of its own with the blocks ``keep`` of ``model``, in order: copied weights, and a configuration that says its depth.

    Raises:
        DitkitError: a block that does not exist, or none.
        Conflict: methods are attached, a long skip would lose an end, or a block cannot stand in its new place (MM-DiT's last is special).
    """
    kept = keep_blocks(model, keep)
    changes = model.shorter(sorted(set(keep)))
    config = type(model.config)(**{**model.config.to_dict(), **changes})
    encoder = None if model.encoder is None else Part.parse({k: v for k, v in model.encoder.card().items() if k in Part.model_fields})
    new = empty_model(Part(name=model.name, config=config.to_dict()), "pruned", encoder)
    if new.skips != kept.skips:
        raise Conflict(f"{model.name} would have other long skips at depth {len(new.blocks)}", hint="a backbone without them")
    for place, (old, empty) in enumerate(zip(kept.blocks, new.blocks)):
        if _kind(old) != _kind(empty):
            number = sorted(set(keep))[place]
            raise Conflict(
                f"block {number} of {model.name} cannot be block {place} of {len(new.blocks)}: blocks there are built otherwise",
                hint="keep the first and the last block, or another choice in each group",
            )
    like = next(p for p in model.parameters() if p.is_floating_point())
    return fill(new, _Copies(kept.state_dict()), like.dtype, like.device, where="pruned").train(model.training)


def _kind(block: torch.nn.Module) -> Any:
    """What must be the same: modules, shapes, masks; not where and in which dtype the weights are."""
    kind: Any = block_kind(block)
    modules, tensors, masks = kind
    return modules, tuple((name, shape) for name, shape, _ in tensors), masks


def prune_pipeline(pipe: Pipeline, keep: Sequence[int]) -> Pipeline:
    """The pipeline of the shallower model, without methods: ``save_pretrained`` writes a bundle that needs nothing of this.

    Args:
        keep: the blocks; of a learned choice ``tinyfusion.find(pipe.model).decide().keep``.

    Raises:
        DitkitError, Conflict: as ``shorten``.
    """
    model = shorten(base_of(pipe.eager), keep)
    backbone = {"name": model.name, "config": model.config.to_dict()}
    config = BundleConfig.parse({**pipe.config.to_dict(), "backbone": backbone, "methods": []})
    return type(pipe)(model, config, codec=pipe.codec, encoder=model.encoder or pipe.encoder)


# ---- choosing blocks without learning ----


@torch.no_grad()
def block_similarity(model: Backbone, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """(depth,) cosine of each block's input and output, mean over tokens and batch: how little it changes (ShortGPT, 2403.03853).

    x (B, C, ...) noised data, t (B,) network time.
    """
    view = with_methods(model, BlockOutputs())
    run = Run(view)
    view(x, t, run=run, **cond)
    seen = run.memory["block_outputs"]
    return torch.stack([_cosine(*seen[i]) for i in range(len(model.blocks))])


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.float(), b.float(), dim=-1).mean()


def least_needed(similarity: Tensor, remove: int) -> tuple[int, ...]:
    """The blocks that stay when the ``remove`` most similar go; the last block always stays (as released)."""
    _check_count(len(similarity) - remove, len(similarity))
    gone = set(similarity[:-1].topk(remove).indices.tolist())
    return tuple(i for i in range(len(similarity)) if i not in gone)


@torch.no_grad()
def sensitivity(model: Backbone, loss: Loss) -> Tensor:
    """(depth,) by how much ``loss`` grows when a block alone is left out: the error criterion."""
    depth = len(model.blocks)
    whole = loss(model)
    without = [loss(keep_blocks(model, [j for j in range(depth) if j != i])) for i in range(depth)]
    return torch.tensor(without, dtype=torch.float64) - whole


def most_sensitive(scores: Tensor, keep: int) -> tuple[int, ...]:
    """The ``keep`` blocks without which the loss grows most."""
    _check_count(keep, len(scores))
    return tuple(sorted(scores.topk(keep).indices.tolist()))


def random_blocks(depth: int, keep: int, seed: int) -> tuple[int, ...]:
    """``keep`` of ``depth`` blocks, drawn by ``seed``."""
    _check_count(keep, depth)
    order = torch.randperm(depth, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order[:keep].tolist()))


@dataclass(frozen=True)
class Candidate:
    """A choice of blocks, and the loss right after pruning."""

    keep: tuple[int, ...]
    loss: float


@torch.no_grad()
def by_loss(model: Backbone, keep: int, loss: Loss, candidates: int = 1000, seed: int = 0) -> list[Candidate]:
    """Choices of ``keep`` blocks by their loss right after pruning, smallest first: all of them, or so many drawn at random.

    The first is what calibration would take; TinyFusion's claim is that it recovers worse than others (section 3.1).
    """
    depth = len(model.blocks)
    _check_count(keep, depth)
    if comb(depth, keep) <= candidates:
        choices = list(combinations(range(depth), keep))
    else:
        choices = sorted({random_blocks(depth, keep, seed + k) for k in range(candidates)})
    return sorted((Candidate(c, float(loss(keep_blocks(model, c)))) for c in choices), key=lambda found: found.loss)


def _check_count(keep: int, depth: int) -> None:
    if not 1 <= keep <= depth:
        raise DitkitError(f"{keep} blocks of {depth}", allowed=f"1 to {depth}")
