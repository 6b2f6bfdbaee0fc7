"""The released layout of FlexDiT (SparseDiT, arXiv 2412.06028): a DiT whose blocks are named for what they do, and have what they use.

Ours is a plain DiT with the method ``flexdit``. A released poolingformer block has values alone, so its queries and keys, which nobody
reads, are zeros here, and are lost on the way back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ditkit.backbones.dit import DiTConfig
from ditkit.core.backbone import Backbone
from ditkit.core.errors import DitkitError
from ditkit.methods.efficiency.flexdit import FlexDiTConfig, Place, find

from .dit import official_table
from .tables import Pieces, Renamed, Row, Rule, Shape, Table, load_all

_LISTS = {
    "generation": "token_merge_blocks",
    "sparse": "semantic_blocks",
    "recovery": "token_recover_blocks",
    "dense": "normal_blocks",
}


class Values(Rule):
    """Their values are the last third of our queries, keys and values."""

    def shapes(self, ours: Shape, count: int) -> list[Shape]:
        return [(ours[0] // 3, *ours[1:])]

    def load(self, theirs: Sequence[Tensor], ours: Shape) -> Tensor:
        return torch.cat([theirs[0].new_zeros(2 * len(theirs[0]), *ours[1:]), theirs[0]])

    def export(self, ours: Tensor, count: int) -> list[Tensor]:
        return [ours[2 * len(ours) // 3 :]]


def released_modules(config: FlexDiTConfig, depth: int) -> list[str]:
    """The released name of each block, in order."""
    names, seen = [], Counter[str]()
    places = config.places()
    size = max(1, (len(places) - config.pooling) // max(1, config.modules))
    for i in range(depth):
        if i < config.pooling:
            home = "poolingformer_blocks"
        elif i < len(places):
            home = f"dumbbell_blocks.{(i - config.pooling) // size}.{_LISTS[places[i].role]}"
        else:
            home = "normal_blocks"
        names.append(f"{home}.{seen[home]}")
        seen[home] += 1
    return names


def released_table(dit: DiTConfig, config: FlexDiTConfig, label: str = "flexdit") -> Table:
    """Names of a view's state, under ours and under the released ones."""
    table, places = official_table(dit), config.places()
    rows = [row for row in table.rows if "{i}" not in row.ours]
    for i, home in enumerate(released_modules(config, dit.depth)):
        place = places[i] if i < len(places) else Place("dense")
        for row in table.rows:
            if "{i}" in row.ours:
                rows.append(_in_place(row, i, home, place, dit.dim))
        if place.role == "recovery":
            ours = f"methods.{label}.merges.{place.merge}"
            rows += [Row(f"{ours}.sparse", f"{home}.merged_layer1"), Row(f"{ours}.dense", f"{home}.merged_layer2")]
    return Table(rows, 1, table.derived)


def _in_place(row: Row, i: int, home: str, place: Place, dim: int) -> Row:
    """A row of DiT's table for block ``i``, which is called ``home`` there."""
    ours, theirs = row.ours.replace("{i}", str(i)), str(row.theirs).replace("blocks.{i}", home)
    if row.ours.endswith(".qkv"):
        stem = theirs.removesuffix(".qkv")
        if place.role == "pooling":
            return replace(row, ours=ours, theirs=f"{stem}.v", rule=Values())
        if place.role in ("generation", "recovery"):
            return replace(row, ours=ours, theirs=(f"{stem}.q", f"{stem}.kv"), rule=Pieces(dim, 2 * dim))
    return replace(row, ours=ours, theirs=theirs)


def load_released(view: Backbone, tensors: Mapping[str, Tensor], where: str = "the file") -> None:
    """Give a DiT with ``flexdit`` attached the weights of a released file; its configuration must say what the file has.

    Raises:
        DitkitError: no flexdit is attached, or other methods are.
        WeightsError: a tensor is missing, extra or misshapen.
    """
    expect = {name: tuple(value.shape) for name, value in view.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    view.load_state_dict(load_all(Renamed(where, shapes, tensors.__getitem__, _table_of(view), expect)))


def to_released(view: Backbone) -> dict[str, Tensor]:
    """The weights of a DiT with ``flexdit`` attached, in the released layout. Raises as ``load_released``."""
    return _table_of(view).export(view.state_dict())


def _table_of(view: Backbone) -> Table:
    method = find(view)
    if len(view.methods) > 1 or not isinstance(view.config, DiTConfig):
        raise DitkitError(f"{view.name} with {', '.join(view.methods)}", allowed="a dit with flexdit alone: others have no released layout")
    return released_table(view.config, method.config, method.label)
