"""CLEAR (arXiv 2412.16112): an image token sees the image within a circle around it, and all of the text; text sees everything.

Softmax, projections and position codes stay, so that pre-trained weights load as they are; what attends and to whom is a mask, rendered
by ``core/windows``. Its second resolution (released variants "(8, 4)", "(16, 4)") sees the whole picture once more, averaged over cells of
d x d tokens with weights of its own; text does not see these. Fine-tuning: ``ditkit/train/clear.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.config import Config
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At
from ditkit.core.seams import Attn, Site
from ditkit.core.sparse import Blocks, Gathered
from ditkit.core.streams import Layout
from ditkit.core.windows import Ball, How, Window

POOLED = "pooled"  # the segment of averaged keys


class CLEARConfig(Config):
    """How far an image token sees, and how that is computed."""

    radius: float | None = Field(8.0, gt=0, description="in tokens; strictly nearer ones are seen. Paper: 8, 16, 32. None: all are")
    down: int | None = Field(
        None, ge=1, description="d: the picture averaged over cells of d x d tokens is seen as well. Paper: 4. None: not"
    )
    proportional: int | None = Field(
        None, ge=2, description="above the trained resolution: scores times sqrt(log of all tokens to this base). FLUX: 4608. None: not"
    )
    how: How = Field("auto", description="dense, gathered tiles, or FlexAttention's blocks; auto chooses by size and device")


@registry.register("methods", "clear")
class CLEAR(Method):
    """A window for every attention of the main stream to itself; with ``down``, keys of a second resolution beside it."""

    config_class, stage = CLEARConfig, "attention"
    owns = frozenset({"window"})

    def __init__(self, config: CLEARConfig | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        self.stream = "img"
        self.weights: nn.ParameterList | None = None  # of the cells, (d, d) for each block
        if self.config.down:
            self.needs = frozenset({"grid"})  # type: ignore[misc]
            self.owns = self.owns | {"kv.img"}  # type: ignore[misc]

    @property
    def label(self) -> str:
        """Not ``clear``: a module that holds others by name has a function of that name."""
        return "clear_windows"

    def install(self, view: Backbone) -> None:
        if "grid" not in view.traits:
            raise Conflict(f"the tokens of {view.name} are no grid", hint="a window needs rows and columns")
        self.stream = view.main
        if (d := self.config.down) is None:
            return
        if self.weights is None:
            like = next(p for p in view.parameters() if p.is_floating_point())
            self.weights = nn.ParameterList(like.new_full((d, d), 1 / d**2) for _ in view.blocks)
        elif len(self.weights) != len(view.blocks):
            raise Conflict(f"{self.label} was made for {len(self.weights)} blocks, {view.name} has {len(view.blocks)}", hint="make another")

    def mask(self, q: Layout, k: Layout, q_name: str, k_name: str) -> Window | None:
        if self.config.radius is None or not q_name == k_name == self.stream:
            return None
        return Ball(radius=self.config.radius, how=self.config.how)

    def keys(self, call: str, layouts: dict[str, Layout], at: At) -> dict[str, Layout]:
        if self.config.down is None or self.stream not in layouts:
            return layouts
        return {**layouts, POOLED: pooled_layout(layouts[self.stream], self.config.down)}

    def feed(self, at: At) -> dict[str, Tensor]:
        return {} if self.weights is None else {"weight": self.weights[at.block]}

    def attend(self, nxt: Any, a: Attn, site: Site) -> dict[str, Tensor]:
        if self.stream not in a.k:
            return nxt(a)
        if self.config.proportional:
            times = sharpness(sum(u.shape[2] for u in a.k.values()), self.config)
            a = a._replace(q={n: u * times for n, u in a.q.items()})
        return self._two_resolutions(nxt, a, site.given["weight"]) if self.config.down else nxt(a)

    def _two_resolutions(self, nxt: Any, a: Attn, weight: Tensor) -> dict[str, Tensor]:
        """The main stream also sees the averaged keys; the others are computed apart, without them."""
        grid, main = a.k_layout[self.stream].grid, self.stream
        assert grid is not None
        k, v = ({**u, POOLED: pooled(u[main], weight, grid)} for u in (a.k, a.v))
        near = a._replace(k=k, v=v)
        out = {}
        if main in a.q:
            out = nxt(near if isinstance(a.mask, Blocks) else some_queries(near, [main]))
        if others := [n for n in a.q if n != main]:
            out = {**out, **nxt(some_queries(a, others))}
        return {n: out[n] for n in a.q}

    @classmethod
    def tiny(cls) -> list[Method]:
        return [cls(radius=2.0)]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls(radius=None)]


def some_queries(a: Attn, names: Sequence[str]) -> Attn:
    """The call for some query segments. Its mask is cut; tiles and blocks hide nothing from other segments than theirs."""
    mask: Any = a.mask
    if isinstance(mask, Tensor):
        rows = zip(a.q, mask.split([u.shape[2] for u in a.q.values()], 2))
        mask = torch.cat([m for n, m in rows if n in names], 2)[..., : sum(u.shape[2] for u in a.k.values())]
    elif isinstance(mask, Gathered):
        seen = mask.of(a.k)
        mask = mask if mask.segment in names else None if seen is None else seen[:, None, None]
    elif isinstance(mask, Blocks):
        mask = None
    return a._replace(q={n: a.q[n] for n in names}, q_layout={n: u for n, u in a.q_layout.items() if n in names}, mask=mask)


def pooled(u: Tensor, weight: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Weighted sums over cells: u (B, H, N, c) on ``grid`` (..., h, w), weight (d, d) -> (B, H, N / d^2, c)."""
    d, (h, w) = len(weight), grid[-2:]
    cells = u.unflatten(2, (-1, h // d, d, w // d, d))
    return (cells * weight[:, None, :, None].to(u.dtype)).sum((4, 6)).flatten(2, 4)


def pooled_layout(layout: Layout, d: int) -> Layout:
    """Where the averaged keys stand: in the middle of their cells. Raises DitkitError where cells do not fit the grid."""
    if layout.grid is None or layout.idx is not None or len(layout.grid) < 2:
        raise DitkitError("the tokens are no full grid of two or more axes", hint="down=None")
    if any(n % d for n in layout.grid[-2:]):
        raise DitkitError(f"a grid of {layout.grid[-2:]} tokens", allowed=f"multiples of down={d}", hint="another size, or another down")
    return _pooled_layout(layout.grid, d, layout.coords.device)


@lru_cache(maxsize=64)
def _pooled_layout(grid: tuple[int, ...], d: int, device: torch.device) -> Layout:
    """Cached: equal grids share one object, and so their masks."""
    small = (*grid[:-2], grid[-2] // d, grid[-1] // d)
    with torch.inference_mode(False):
        axes = [torch.arange(n, dtype=torch.float32, device=device) for n in small]
        axes[-2:] = [u * d + (d - 1) / 2 for u in axes[-2:]]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, len(small))
        return Layout(coords, coords.shape[1], small)


def sharpness(tokens: int, config: CLEARConfig) -> float:
    """What scores are multiplied by: sqrt(log_base(L)), L the tokens of all keys; 10 L with ``down`` (released code)."""
    if config.proportional is None:
        return 1.0
    return math.sqrt(math.log((10 if config.down else 1) * tokens, config.proportional))


def visible_pairs(grid: tuple[int, ...], text: int = 0, radius: float | None = None, down: int | None = None) -> int:
    """How many (query, key) pairs are seen: 4 x pairs x dim is the paper's FLOPs of an attention layer."""
    n = math.prod(grid)
    near = n * n if radius is None else _near_pairs(grid, radius)
    return near + 2 * text * n + text * text + (n * (n // down**2) if down else 0)


def _near_pairs(grid: tuple[int, ...], radius: float) -> int:
    """Each offset within the radius, times the places where it stays on the grid."""
    reach = math.ceil(radius) - 1
    offsets = product(*(range(-min(reach, n - 1), min(reach, n - 1) + 1) for n in grid))
    near = (offset for offset in offsets if sum(u * u for u in offset) < radius**2)
    return sum(math.prod(n - abs(u) for n, u in zip(grid, offset)) for offset in near)
