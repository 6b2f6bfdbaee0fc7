"""The mechanism of every feature cache: a branch's output, kept *before* its gate, stands for the branch at later steps.

Gates, shifts and scales follow the current step. A cache says which branches are computed; FORA by the step alone, HarmoniCa and
Learning-to-Cache by a learned table. What nothing was kept of, or what another method declares fresh, is computed.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from ditkit.core.method import Method
from ditkit.core.run import At
from ditkit.core.seams import Site


class FeatureCache(Method):
    """Mode: the branches that are computed and kept; the others are reused."""

    owns = frozenset({"reuse"})
    scheduled = True

    @abstractmethod
    def computes(self, at: At, branch: str) -> bool:
        """Whether the schedule computes this branch of the block at this step."""

    def plan(self, at: At) -> Any:
        return tuple(n for n in at.branches if at.first or n in at.fresh or self.computes(at, n))

    def reads(self, mode: Any, slot: str) -> bool:
        return slot.split(".")[0] not in mode

    def branch(self, nxt: Any, h: dict[str, Tensor], site: Site) -> dict[str, Tensor]:
        if site.branch not in site.mode:  # type: ignore[operator]
            return site.kept("out")
        return site.keep("out", nxt(h))
