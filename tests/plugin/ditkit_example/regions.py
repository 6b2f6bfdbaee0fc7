"""Only some image tokens pass through the trunk at some steps; the keys and values of the others stay visible (RAS in miniature).

Its selection is fixed (every second token), so that what is tested is the seams: rows of slots, widened key layouts, fresh branches.
"""

from typing import Any

import torch
from torch import Tensor

from ditkit.core import registry
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.seams import Attn, Site
from ditkit.core.streams import Layout, Streams


@registry.register("methods", "regions")
class Regions(Method):
    """Steps 0 and 1 are dense, then sparse; mode: "fill" keeps keys and values, "sparse" uses them."""

    owns, needs, breaks = frozenset({"tokens", "kv.img"}), frozenset({"grid"}), frozenset({"grid"})
    scheduled, exact = True, True

    def sparse(self, step: int) -> bool:
        return step >= 2

    def start(self, run: Run) -> None:
        run.memory[self.label]["last"] = None

    def fresh(self, at: At) -> frozenset[str]:
        return frozenset({"attn"}) if at.first or at.step == 1 else frozenset()

    def plan(self, at: At) -> str:
        return "sparse" if self.sparse(at.step) and not at.first else "fill"

    def reads(self, mode: Any, slot: str) -> bool:
        return mode == "sparse"

    def rows(self, s: Streams) -> Tensor:
        n = s["img"].x.shape[1]
        return torch.arange(0, n, 2, device=s["img"].x.device).expand(len(s["img"].x), -1)

    def trunk(self, nxt: Any, s: Streams, run: Run) -> Tensor:
        memory, key = run.memory[self.label], run.guidance_pass
        if run.first or not self.sparse(run.step):
            memory[key] = nxt(s)
            return memory[key]
        img = s["img"].take(self.rows(s))
        memory[key] = img.put(memory[key], nxt({**s, "img": img}))
        return memory[key]

    def keys(self, call: str, layouts: dict[str, Layout], at: At) -> dict[str, Layout]:
        img = layouts.get("img")
        if img is None or img.idx is None:
            return layouts
        return {**layouts, "img": at.run.memory[self.label].setdefault("layout", whole_like(img))}

    def attend(self, nxt: Any, a: Attn, site: Site) -> dict[str, Tensor]:
        if "img" not in a.k:
            return nxt(a)
        if site.mode == "fill":
            site.out.update({f"{a.name}.k": a.k["img"], f"{a.name}.v": a.v["img"]})
            return nxt(a)
        at = site.streams["img"].layout.idx[:, None, :, None].expand_as(a.k["img"])
        k = site.given[f"{a.name}.k"].scatter(2, at, a.k["img"])
        v = site.given[f"{a.name}.v"].scatter(2, at, a.v["img"])
        site.out.update({f"{a.name}.k": k, f"{a.name}.v": v})
        return nxt(a._replace(k={**a.k, "img": k}, v={**a.v, "img": v}))


def whole_like(part: Layout) -> Layout:
    """The layout of all tokens of an image whose every second token is given: the tiny grids here are 8 wide or 6 wide."""
    from ditkit.core.streams import grid_layout

    width = {16: (4, 4), 24: (4, 6)}[part.total]
    return grid_layout(width)
