"""FlexDiT (arXiv 2412.06028): the lowest blocks average, those in the middle run on few tokens, the fewer the more noise there is.

Attention of a trained DiT looks at everything alike in its lowest blocks, and in turn far and near above. Its second version is SparseDiT.

    poolingformer      x += g1 Proj(mean_n V(x_n))                                   then the MLP as ever
    module (SDTM)      S = pool(X);  S <- block(S, keys of X);  S <- blocks(S);
                       Y = W1 up(S) + W2 X;  Y <- block(Y, keys of S);  Y <- blocks(Y)
    side of S at t     M(t) = M_data for t < T/4, then linear to M_noise at t = T (section 5; M = side^2)

Each block keeps its weights; W1 = 0 and W2 = 1 at first. Then everything is fine-tuned: ``ditkit/train/flexdit.py``.

Differs from the released code, which has no schedule and does not run: any backbone whose blocks take keys from other tokens, any grid;
means, and tokens to be up-sampled, are projected once (the same numbers); pooled tokens have the rotary positions of their middles.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.config import Config
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.seams import Attn, Site
from ditkit.core.streams import Layout, Stream, Streams
from ditkit.nn.kv_down import KVDown
from ditkit.nn.positions import sincos_at

Role = Literal["pooling", "generation", "sparse", "recovery"]
Rounding = Literal["nearest", "up", "down"]
ATTENTIONS = ("attn", "attn2")  # branches that are one attention of the stream to itself (with others), where qkv is one projection


class FlexDiTConfig(Config):
    """Which blocks do what, from the first on, and how many tokens there are when. Defaults: DiT-XL/2 at 256 pixels."""

    pooling: int = Field(2, ge=0, description="poolingformer blocks; without one, training diverges in the paper")
    modules: int = Field(4, ge=0, description="sparse-dense token modules after them; all blocks that are left stay as they are")
    generation: int = Field(1, ge=1, description="blocks of a module in which sparse tokens ask the dense ones")
    sparse: int = Field(3, ge=0, description="blocks of a module on sparse tokens alone")
    recovery: int = Field(1, ge=1, description="blocks of a module in which dense tokens ask the sparse ones")
    dense: int = Field(1, ge=0, description="blocks at the end of a module on all tokens")
    side_noise: int = Field(
        6, ge=1, description="rows and columns of sparse tokens in pure noise; on other shapes than squares as many tokens in proportion"
    )
    side_data: int = Field(10, ge=1, description="the same near the data; both alike: no schedule")
    hold: float = Field(0.25, ge=0, lt=1, description="share of the time, from the data on, with most tokens")
    rounding: Rounding = Field("nearest", description="of the side between the two; the paper does not say")
    positions: bool = Field(
        False, description="sparse and recovered tokens get a sine-cosine position code again (in the paper, not in its code)"
    )

    @model_validator(mode="after")
    def _grows(self) -> FlexDiTConfig:
        if self.side_noise > self.side_data:
            raise ValueError(f"side_noise {self.side_noise} is above side_data {self.side_data}: noise needs the fewer tokens")
        return self

    def side(self, t: float) -> int:
        """Rows and columns of sparse tokens at public time t in [0, 1]: the number of tokens is linear in t above ``hold``."""
        w = min(max((t - self.hold) / (1 - self.hold), 0.0), 1.0)
        return _rounded(math.sqrt((1 - w) * self.side_data**2 + w * self.side_noise**2), self.rounding)

    def places(self) -> list[Place]:
        """What each block is for, from the first on; the blocks after these stay as they are."""
        found = [Place("pooling")] * self.pooling
        for module in range(self.modules):
            found += [Place("generation", i) for i in range(self.generation)] + [Place("sparse")] * self.sparse
            found += [Place("recovery", i, module * self.recovery + i) for i in range(self.recovery)] + [Place("dense")] * self.dense
        return found


class Place(NamedTuple):
    """The role of a block; its number among its like in its module, and which pair (W1, W2) it has."""

    role: Role | Literal["dense"]
    number: int = 0
    merge: int = 0


class Mode(NamedTuple):
    """What ``plan`` decides. ``side``: how many sparse tokens; ``apart``: the branch is one attention, so its input can be averaged."""

    role: Role
    side: int = 0
    apart: bool = False


class Merge(nn.Module):
    """Y = W1 up(S) + W2 X: sparse and dense tokens become one map, at first the dense one bit for bit."""

    def __init__(self, dim: int, like: Tensor) -> None:
        super().__init__()
        self.sparse, self.dense = (nn.Linear(dim, dim, device=like.device, dtype=like.dtype) for _ in range(2))
        for p in (self.sparse.weight, self.sparse.bias, self.dense.bias):
            nn.init.zeros_(p)
        nn.init.eye_(self.dense.weight)

    def forward(self, sparse: Stream, dense: Stream) -> Stream:
        """Up-sampling copies tokens, so W1 comes before it."""
        assert dense.layout.grid is not None
        small = Stream(self.sparse(sparse.x), sparse.layout)
        return dense._replace(x=small.resize(dense.layout.grid, "nearest").x + self.dense(dense.x))


@registry.register("methods", "flexdit")
class FlexDiT(Method):
    """Parameters ``merges.i.{sparse, dense}``, one pair for each recovery block; between its first and last block a module keeps the dense
    tokens in the run's memory."""

    config_class = FlexDiTConfig
    stage = "structure"
    owns = frozenset({"tokens", "depth", "kv.img"})
    needs = frozenset({"grid"})

    def __init__(self, config: FlexDiTConfig | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        if self.config.side_noise < self.config.side_data:
            self.scheduled, self.breaks = True, frozenset({"static tokens"})  # type: ignore[misc]
        self.stream = "img"
        self.places: list[Place] = self.config.places()
        self.apart: frozenset[int] = frozenset()

    def install(self, view: Backbone) -> None:
        check_fits(view, self.places)
        self.stream = view.main
        self.apart = frozenset(i for i, b in enumerate(view.blocks) if f"{view.main}.qkv" in b.projections())  # type: ignore[operator]
        like = next(p for p in view.parameters() if p.is_floating_point())
        count, dim = sum(p.role == "recovery" for p in self.places), view.config.dim
        if not hasattr(self, "merges"):
            self.merges = nn.ModuleList(Merge(dim, like) for _ in range(count))
        if other := {p.shape[0] for p in self.merges.parameters()} - {dim}:
            raise Conflict(f"{self.label} was made for tokens of width {min(other)}, not {dim}", hint="make another one")

    # when there are how many tokens

    def side(self, at: At, step: int | None = None) -> int:
        """Rows and columns of sparse tokens at a step. Where nobody says its time, steps are equally long."""
        step, times = at.step if step is None else step, at.run.public_times
        return self.config.side(1 - step / at.num_steps if times is None else float(times[step]))

    def plan(self, at: At) -> Mode | None:
        place = self.places[at.block] if at.block < len(self.places) else Place("dense")
        if place.role == "dense":
            return None
        if place.role == "pooling":
            return Mode("pooling", apart=at.block in self.apart)
        return Mode(place.role, self.side(at))

    def fresh(self, at: At) -> frozenset[str]:
        """What was kept of sparse tokens is of no use when their number changes."""
        sparse = at.block < len(self.places) and self.places[at.block].role in ("generation", "sparse")
        return frozenset(at.branches) if sparse and at.step and self.side(at) != self.side(at, at.step - 1) else frozenset()

    # a module

    def block(self, nxt: Any, s: Streams, at: At, **kw: Any) -> Streams:
        place, x, mode = self.places[at.block], s[self.stream], at.mode
        assert isinstance(mode, Mode)
        check_grid(x.layout)
        if place.role == "generation":
            if place.number == 0:
                at.memory["dense"], x = x, self.coded(sparse_stream(x, mode.side))
            return nxt({**s, self.stream: x}, kv={self.stream: at.memory["dense"]}, **kw)
        if place.role == "recovery":
            if place.number == 0:
                at.memory["sparse"], x = x, at.memory.pop("dense")
            y = self.coded(self.merges[place.merge](at.memory["sparse"], x))
            return nxt({**s, self.stream: y}, kv={self.stream: at.memory["sparse"]}, **kw)
        return nxt(s, **kw)

    def coded(self, x: Stream) -> Stream:
        """With the position code, where the configuration asks for it."""
        if not self.config.positions:
            return x
        dim, axes = x.x.shape[-1], x.layout.coords.shape[-1]
        if dim % (2 * axes):
            raise DitkitError(f"tokens of width {dim} on {axes} axes", allowed=f"multiples of {2 * axes}", hint="positions=False")
        return x._replace(x=x.x + sincos_at(x.layout.coords, (dim // axes,) * axes).to(x.x.dtype))

    # a poolingformer block

    def branch(self, nxt: Any, h: dict[str, Tensor], site: Site) -> dict[str, Tensor]:
        """The mean of linear values is the value of the mean: one token is projected, not all."""
        mode: Any = site.mode
        if mode.role != "pooling" or not mode.apart or site.branch not in ATTENTIONS:
            return nxt(h)
        return nxt({**h, self.stream: h[self.stream].mean(1, keepdim=True).expand_as(h[self.stream])})

    def attend(self, nxt: Any, a: Attn, site: Site) -> dict[str, Tensor]:
        mode: Any = site.mode
        if mode.role != "pooling" or self.stream not in a.q or self.stream not in a.k:
            return nxt(a)
        mean = mean_value(a)
        return {n: mean.repeat_interleave(u.shape[1] // mean.shape[1], 1).expand(-1, -1, u.shape[2], -1) for n, u in a.q.items()}

    def finish(self, run: Run) -> dict[str, Any]:
        sides = [self.side(At(run, 0, False), step) for step in range(run.num_steps)]
        return {"sides": {str(side): sides.count(side) for side in sorted(set(sides))}}

    @classmethod
    def tiny(cls) -> list[Method]:
        small: dict[str, Any] = dict(modules=1, dense=0, side_noise=2, side_data=3)
        return [cls(pooling=0, sparse=0, **small), cls(pooling=1, sparse=0, positions=True, **small)]

    @classmethod
    def off(cls) -> list[Method]:
        return [cls(pooling=0, modules=0)]


# ---- what fits ----


def check_fits(view: Backbone, places: Sequence[Place]) -> None:
    """Raise Conflict where the backbone cannot have these roles, with the reason."""
    if len(places) > len(view.blocks):
        raise Conflict(
            f"pooling blocks and modules are {len(places)} blocks, {view.name} has {len(view.blocks)}",
            hint="fewer modules, or smaller ones",
        )
    if view.skips and any(p.role != "dense" for p in places):
        raise Conflict(f"{view.name} has long skips, whose ends would have different tokens", hint="a backbone without them")
    for i, (place, block) in enumerate(zip(places, view.blocks)):
        if place.role in ("generation", "recovery") and "kv" not in inspect.signature(block.forward).parameters:
            raise Conflict(f"block {i} of {view.name} takes no keys and values from other tokens", hint="a backbone whose blocks have kv=")
        if place.role == "pooling" and any(isinstance(m, KVDown) for m in block.modules()):
            raise Conflict(f"block {i} of {view.name} compresses its keys: their mean is not that of the tokens", hint="pooling=0")


def check_grid(layout: Layout) -> None:
    """Raise DitkitError where the tokens are no full grid of two or three axes without padding."""
    if layout.grid is None or layout.idx is not None or len(layout.grid) not in (2, 3):
        raise DitkitError("the tokens are no full grid of two or three axes", hint="all tokens of pictures or clips, in order")
    if layout.valid is not None:
        raise DitkitError("some tokens are padding, which would be pooled with the others", hint="pictures of one size in a batch")


# ---- sparse tokens ----


def side_of(rate: float, tokens: int, rounding: Rounding = "nearest") -> int:
    """The side of the square that is left of ``tokens`` at a pruning rate in [0, 1): sqrt((1 - r) N), at least 1 (section 5)."""
    if not 0 <= rate < 1 or tokens < 1:
        raise DitkitError(f"pruning rate {rate} of {tokens} tokens", allowed="a rate of 0 or more, below 1, of 1 or more tokens")
    return _rounded(math.sqrt((1 - rate) * tokens), rounding)


def sparse_grid(grid: tuple[int, ...], side: int) -> tuple[int, ...]:
    """The sparse tokens of a grid (..., H, W): about side^2 in its proportions; frames stay. Raises DitkitError for more than there are."""
    *frames, h, w = grid
    rows, columns = (_rounded(side * math.sqrt(ratio)) for ratio in (h / w, w / h))
    if rows > h or columns > w:
        raise DitkitError(
            f"{rows} x {columns} sparse tokens (side {side}) of {h} x {w}", allowed="at most all", hint="smaller side_noise and side_data"
        )
    return (*frames, rows, columns)


def sparse_stream(dense: Stream, side: int) -> Stream:
    """The dense tokens, pooled; windows overlap where sides do not divide."""
    assert dense.layout.grid is not None
    return dense.resize(sparse_grid(dense.layout.grid, side), "mean")


def mean_value(a: Attn) -> Tensor:
    """(B, K, 1, d): the mean of all values that anybody may see."""
    total, count = 0.0, 0.0
    for n, v in a.v.items():
        seen = a.k_layout[n].valid
        if seen is None:
            total, count = total + v.sum(2, keepdim=True), count + v.shape[2]  # type: ignore[assignment]
        else:
            w = seen[:, None, :, None].to(v.dtype)
            total, count = total + (v * w).sum(2, keepdim=True), count + w.sum(2, keepdim=True)  # type: ignore[assignment]
    return total / count  # type: ignore[return-value]


def _rounded(value: float, how: Rounding = "nearest") -> int:
    """At least 1; halves go up. What is whole but for its rounding stays."""
    exact = round(value, 9)
    return max(1, {"nearest": math.floor(exact + 0.5), "up": math.ceil(exact), "down": math.floor(exact)}[how])


def find(view: Backbone) -> FlexDiT:
    """The FlexDiT of a view. Raises DitkitError where there is none."""
    found = [m for m in view.attached if isinstance(m, FlexDiT)]
    if not found:
        raise DitkitError("no flexdit is attached", allowed=f"attached: {sorted(view.methods)}", hint="with_methods(model, FlexDiT())")
    return found[0]


__all__ = ["FlexDiT", "FlexDiTConfig", "Merge", "check_grid", "find", "mean_value", "side_of", "sparse_grid", "sparse_stream"]
