"""A soft, trainable gate around every block: x <- x + m (block(x) - x), with m = 1 + theta. A hard schedule would be m in {0, 1}."""

from typing import Any

import torch
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.method import Method
from ditkit.core.run import At
from ditkit.core.streams import Streams


@registry.register("methods", "gates")
class Gates(Method):
    """theta (depth,), zero at first: an identity."""

    stage, owns, exact = "structure", frozenset({"depth"}), True

    def install(self, view: Backbone) -> None:
        if not hasattr(self, "theta"):
            self.theta = nn.Parameter(torch.zeros(len(view.blocks)))

    def block(self, nxt: Any, s: Streams, at: At, **kw: Any) -> Streams:
        y, theta = nxt(s, **kw), self.theta[at.block]
        return {n: y[n]._replace(x=y[n].x + theta * (y[n].x - s[n].x)) for n in y}

    def gate(self, block: int) -> Tensor:
        return self.theta[block]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls()]
