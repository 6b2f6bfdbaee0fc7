"""Name tables: how the tensors of another layout become ours, as data, in both directions, strict and bit-exact.

A table is a list of rows, one for each module: our name, theirs, and the rule between them. ``{i}`` stands for the block
number; ``{*}`` in their name stands for all blocks, each of which keeps a copy of the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ditkit.core.errors import WeightsError
from ditkit.core.files import Source, check_names, check_shapes

Shape = tuple[int, ...]
Read = Callable[[str], Tensor]


class Rule:
    """Between one tensor of ours and one or more of theirs. The base class is "the same tensor"."""

    def shapes(self, ours: Shape, count: int) -> list[Shape]:
        """Their shapes, from ours."""
        return [ours] * count

    def load(self, theirs: Sequence[Tensor], ours: Shape) -> Tensor:
        """Theirs -> ours."""
        return theirs[0]

    def export(self, ours: Tensor, count: int) -> list[Tensor]:
        """Ours -> theirs."""
        return [ours]


class Convolution(Rule):
    """Their strided convolution (D, C, p, p), or with more axes, is our linear layer (D, C p p)."""

    def __init__(self, *kernel: int) -> None:
        self.kernel = kernel

    def shapes(self, ours: Shape, count: int) -> list[Shape]:
        return [ours if len(ours) == 1 else (ours[0], ours[1] // prod(self.kernel), *self.kernel)]

    def load(self, theirs: Sequence[Tensor], ours: Shape) -> Tensor:
        return theirs[0].reshape(ours)

    def export(self, ours: Tensor, count: int) -> list[Tensor]:
        return [ours.reshape(self.shapes(tuple(ours.shape), 1)[0])]


class Join(Rule):
    """Their n tensors, one after the other along the output axis, are ours (q, k, v -> qkv)."""

    def shapes(self, ours: Shape, count: int) -> list[Shape]:
        return [(ours[0] // count, *ours[1:])] * count

    def load(self, theirs: Sequence[Tensor], ours: Shape) -> Tensor:
        return torch.cat(list(theirs))

    def export(self, ours: Tensor, count: int) -> list[Tensor]:
        return list(ours.chunk(count))


class Pieces(Join):
    """As ``Join``, of unequal parts: how many rows each has (q, k, v, hidden units -> one projection)."""

    def __init__(self, *rows: int) -> None:
        self.rows = rows

    def shapes(self, ours: Shape, count: int) -> list[Shape]:
        return [(n, *ours[1:]) for n in self.rows]

    def export(self, ours: Tensor, count: int) -> list[Tensor]:
        return list(ours.split(self.rows))


class SwapHalves(Rule):
    """The halves of the output axis change places: (scale, shift) of diffusers' AdaLayerNormContinuous is our (shift, scale).

    Of a LoRA only B (out, r) is swapped: swap(B A) = swap(B) A.
    """

    def load(self, theirs: Sequence[Tensor], ours: Shape) -> Tensor:
        return torch.cat(theirs[0].chunk(2)[::-1])

    def export(self, ours: Tensor, count: int) -> list[Tensor]:
        return [torch.cat(ours.chunk(2)[::-1])]


class Copies(Rule):
    """Their n equal copies are one tensor of ours; ``Renamed.read`` refuses copies that differ."""

    def export(self, ours: Tensor, count: int) -> list[Tensor]:
        return [ours] * count


SAME, JOIN, SWAP, COPIES = Rule(), Join(), SwapHalves(), Copies()


@dataclass(frozen=True)
class Row:
    """One module: our name, theirs, the rule, and which tensors it has; "" stands for a tensor that is no part of a module."""

    ours: str
    theirs: str | tuple[str, ...]
    rule: Rule = SAME
    tensors: tuple[str, ...] = ("weight", "bias")


@dataclass(frozen=True)
class Derived:
    """A tensor that their layout stores and we compute."""

    compute: Callable[[], Tensor]
    tolerance: float  # largest difference that rounding explains, for a file in fp32
    optional: bool = False  # not every file stores it


@dataclass(frozen=True)
class Link:
    """A row for one tensor, with block numbers filled in."""

    theirs: tuple[str, ...]
    rule: Rule


@dataclass(frozen=True)
class Table:
    """A layout: rows, the number of blocks that fills in ``{i}`` and ``{*}``, what it stores besides, and what of ours it cannot hold."""

    rows: Sequence[Row]
    depth: int
    derived: Mapping[str, Derived]
    dropped: frozenset[str] = frozenset()

    def links(self) -> dict[str, Link]:
        """Our tensor name -> their names and the rule."""
        found = {}
        for row in self.rows:
            theirs = (row.theirs,) if isinstance(row.theirs, str) else row.theirs
            for i in range(self.depth) if "{i}" in row.ours else [0]:
                for tensor in row.tensors:
                    names = [
                        n.replace("{i}", str(i)).replace("{*}", str(j)) for n in theirs for j in (range(self.depth) if "{*}" in n else [0])
                    ]
                    end = f".{tensor}" if tensor else ""
                    found[row.ours.replace("{i}", str(i)) + end] = Link(tuple(n + end for n in names), row.rule)
        return found

    def export(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under their names, with what they store besides. Raises WeightsError for missing or extra names of ours."""
        links = self.links()
        check_names("the model", links, {name: value for name, value in ours.items() if name not in self.dropped})
        theirs: dict[str, Tensor] = {}
        for name, link in links.items():
            theirs.update(zip(link.theirs, link.rule.export(ours[name], len(link.theirs))))
        dtype = next(iter(ours.values())).dtype
        theirs.update({name: d.compute().to(dtype) for name, d in self.derived.items()})
        return theirs


class Renamed:
    """A ``Source`` over another layout. All names and shapes are checked when it is made.

    Args:
        where: named in errors.
        found: their names and shapes, as the file has them.
        read: reads one of their tensors.
        expect: our names and shapes.

    Raises:
        WeightsError: naming what is missing, extra, misshapen, or differs between copies that should be equal.
    """

    def __init__(self, where: str, found: Mapping[str, Shape], read: Read, table: Table, expect: Mapping[str, Shape]) -> None:
        self.where, self._read, self.table, self.expect = where, read, table, expect
        self.links = table.links()
        check_names("the name table", self.links, expect)
        self.derived = {name: d for name, d in table.derived.items() if name in found or not d.optional}
        shapes: dict[str, Shape] = {name: tuple(d.compute().shape) for name, d in self.derived.items()}
        for name, link in self.links.items():
            shapes.update(zip(link.theirs, link.rule.shapes(tuple(expect[name]), len(link.theirs))))
        check_shapes(where, shapes, found)
        self._check_derived()

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return self.expect

    def read(self, name: str) -> Tensor:
        link = self.links[name]
        values = [self._read(link.theirs[0])]
        for other in link.theirs[1:]:
            value = self._read(other)
            if value.is_floating_point() != values[0].is_floating_point():  # joining them would make numbers of both
                raise WeightsError(f"{self.where}: {other!r} is {value.dtype}", allowed=f"{values[0].dtype}, as {link.theirs[0]!r} is")
            if isinstance(link.rule, Copies):
                self._check_copy(link.theirs[0], values[0], other, value)
            else:
                values.append(value)
        return link.rule.load(values, tuple(self.expect[name]))

    def _check_copy(self, first: str, a: Tensor, other: str, b: Tensor) -> None:
        if not torch.equal(a, b):
            raise WeightsError(
                f"{self.where}: {other!r} differs from {first!r}",
                allowed="equal copies in every block, which become one tensor",
                hint="this model was changed block by block, or the file is damaged; it cannot be converted",
            )

    def _check_derived(self) -> None:
        for name, derived in self.derived.items():
            stored, ours = self._read(name), derived.compute()
            rounding = float(ours.abs().max()) * torch.finfo(stored.dtype).eps if stored.is_floating_point() else 0.0
            error = float((stored.float() - ours).abs().max())
            if error > max(derived.tolerance, rounding):
                raise WeightsError(
                    f"{self.where}: {name!r} differs from the table it should hold by {error:.3g}",
                    allowed=f"at most {max(derived.tolerance, rounding):.1g}",
                    hint="the model was trained with other positions; it cannot be converted",
                )


def load_all(source: Source) -> dict[str, Tensor]:
    """Every tensor of a source."""
    return {name: source.read(name) for name in source.shapes}
