"""The released ControlNets of PixArt (``ControlPixArtHalf``, ``ControlPixArtMSHalf``) as states of our method, by a strict table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .pixart import OFFICIAL
from .tables import Renamed, Row, Table, load_all

if TYPE_CHECKING:
    from torch import Tensor

    from ditkit.backbones.pixart import PixArt
    from ditkit.methods.control.controlnet import ControlNet

PREFIX, BASE = "controlnet.", "base_model."  # of their names: the copies, and the base where the file holds it


def controlnet_table(copies: int) -> Table:
    """Our names of the method's state, theirs of the file."""
    blocks = [r for r in OFFICIAL if r.ours.startswith("blocks.")]
    rows = [
        Row(r.ours.replace("blocks.", "copies."), str(r.theirs).replace("blocks.{i}", "controlnet.{i}.copied_block"), r.rule, r.tensors)
        for r in blocks
    ]
    rows += [Row("after.{i}", "controlnet.{i}.after_proj"), Row("before", "controlnet.0.before_proj")]
    return Table(tuple(rows), copies, {})


def controlnet_from_official(tensors: Mapping[str, Tensor], base: PixArt, where: str = "the file") -> ControlNet:
    """The ControlNet that a released file holds, made for ``base``: attach it with ``with_methods``.

    Args:
        tensors: by their names; those of the base (``base_model.``) are left alone.

    Raises:
        WeightsError: a tensor is missing, extra or misshapen.
    """
    from ditkit.core.view import with_methods
    from ditkit.methods.control.controlnet import ControlNet

    found = {name: value for name, value in tensors.items() if not name.startswith(BASE)}
    count = len({name.split(".")[1] for name in found if name.startswith(PREFIX)})
    method = ControlNet(blocks=max(1, count))
    with_methods(base, method)
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    expect = {name: tuple(value.shape) for name, value in method.state_dict().items()}
    method.load_state_dict(load_all(Renamed(where, shapes, found.__getitem__, controlnet_table(max(1, count)), expect)))
    return method
