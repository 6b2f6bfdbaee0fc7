"""ControlNet for transformers (PixArt-delta, arXiv 2401.05252, section 4): copies of the first blocks see a picture and say what to add.

With F_j the frozen blocks, G_j trained copies of the first n, E the frozen embedding of patches and positions, k the control:

    x_1 = F_0(x_0),   c_0 = G_0(x_1 + B E(k)),   c_j = G_j(c_{j-1}),   x_{j+2} = F_{j+1}(x_{j+1} + s A_j c_j),   j = 0 .. n - 1

B and A_j are linear and start at zero, so that a fresh ControlNet is the base bit for bit. The copies get the same time and text.

Differs from the paper: any backbone; streams that a block writes besides the picture's (text in MM-DiT) go on in the copies' own row. The
appendix of PixArt-alpha (2310.00426) describes another, with copies of all blocks; this one was released (``ControlPixArtHalf``).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Hashable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.config import Config
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.seams import Seam
from ditkit.core.streams import Streams, rows

log = logging.getLogger(__name__)
CONTROL = "control"


class ControlNetConfig(Config):
    """How much of the network is copied, and how strongly the copies count."""

    blocks: int | None = Field(None, ge=1, description="n, the blocks that are copied; None: one less than half, 13 of PixArt's 28")
    strength: float = Field(1.0, description="multiplies what is added; 0 is the base")
    label: str = Field("", pattern=r"^[A-Za-z0-9_-]*$", description="name under which it is attached")


@registry.register("methods", "controlnet")
class ControlNet(Method):
    """Its input is ``control`` (B or 1, C, H, W), like x; a run without it is the base's. The copies run outside compiled code."""

    config_class = ControlNetConfig
    stage = "adaptation"
    owns = frozenset({"control"})
    needs = frozenset({"static tokens"})  # a copy's tokens attend to those that its own row has
    inputs = (CONTROL,)
    copies: nn.ModuleList
    before: nn.Linear
    after: nn.ModuleList

    def install(self, view: Backbone) -> None:
        """Make the copies, of the base's weights as they are now.

        Raises:
            Conflict: the network has too few blocks, or a copied one would need a long skip; or the copies were made for another.
        """
        depth = len(view.blocks)
        n = self.config.blocks or max(1, depth // 2 - 1)
        if n >= depth:
            raise Conflict(
                f"{self.label} copies {n} blocks of {depth}", allowed=f"1 to {depth - 1}: a copy adds to the block after its own"
            )
        if any(to < n for _, to in view.skips):
            raise Conflict(f"a block that {self.label} copies takes a long skip", allowed="fewer blocks: those before the first skip ends")
        like = next(p for p in view.parameters() if p.is_floating_point() and p.element_size() > 1)
        fresh = [_trainable_copy(view.blocks[j], like) for j in range(n)]
        if hasattr(self, "copies"):
            shapes = [{k: v.shape for k, v in nn.ModuleList(blocks).state_dict().items()} for blocks in (self.copies, fresh)]
            if shapes[0] != shapes[1]:
                raise Conflict(f"{self.label} was made for a model of other sizes", hint="make another for this one")
            return
        dim, self.copies = view.config.dim, nn.ModuleList(fresh)
        self.before, self.after = _zeros(dim, like), nn.ModuleList(_zeros(dim, like) for _ in range(n))
        self.train(view.training)

    def plan(self, at: At) -> Hashable:
        return () if 1 <= at.block <= len(self.copies) and self.config.strength else None

    def predict(self, nxt: Any, x: Tensor, run: Run) -> Tensor:
        """Embed the control as x is."""
        memory, control = run.memory[self.label], run.input(CONTROL, len(x))
        memory.pop("tokens", None)
        if control is not None and self.config.strength:
            if control.shape != x.shape:
                raise DitkitError(f"control is {tuple(control.shape)}", allowed=f"{tuple(x.shape)} or (1, ...), as x is", hint="resize it")
            with torch.no_grad():
                memory["tokens"] = run.model.embed(control.to(x), run.t, run.prepared)[run.model.main].x  # type: ignore[arg-type]
        return nxt(x)

    def block(self, nxt: Any, s: Streams, at: At, **extra: Any) -> Streams:
        if "tokens" not in at.memory:
            return nxt(s, **extra)
        j, main, model = at.block - 1, at.run.model.main, at.run.model
        x, idx = s[main].x, s[main].layout.idx
        if j == 0:
            tokens = at.memory["tokens"] if idx is None else rows(at.memory["tokens"], idx)
            at.memory["row"] = {**s, main: s[main]._replace(x=x + self.before(tokens))}
        row, block = at.memory["row"], self.copies[j]
        row = block(row, Seam(masks=model.masks_of(block, row, at.run)))
        at.memory["row"] = row if j + 1 < len(self.copies) else None
        return nxt({**s, main: s[main]._replace(x=x + self.config.strength * self.after[j](row[main].x))}, **extra)

    def finish(self, run: Run) -> dict[str, Any]:
        return {"controlled": CONTROL in run.inputs and bool(self.config.strength)}

    @classmethod
    def example(cls, x: Tensor) -> dict[str, Tensor]:
        return {CONTROL: x.flip(-1)}

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(blocks=1)]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls(blocks=1), cls(blocks=1, strength=0.0)]


def _zeros(dim: int, like: Tensor) -> nn.Linear:
    layer = nn.Linear(dim, dim, device=like.device, dtype=like.dtype)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _trainable_copy(block: nn.Module, like: Tensor) -> nn.Module:
    """A copy with parameters of its own. Where a projection was replaced (int8) it is a plain one again, of zeros until it is loaded."""
    new = copy.deepcopy(block)
    child: Any
    for parent in list(new.modules()):
        for name, child in parent.named_children():
            if hasattr(child, "in_features") and not isinstance(child, nn.Linear):
                log.warning("%s is replaced in the base: its copy starts at zero, load its state", name)
                plain = nn.Linear(child.in_features, child.out_features, getattr(child, "bias", None) is not None)
                nn.init.zeros_(plain.weight)
                setattr(parent, name, plain.to(like.device, like.dtype))
    for p in new.parameters():
        p.requires_grad_(True)
    return new
