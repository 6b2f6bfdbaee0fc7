"""Linear layers in 8-bit integers: weights per output channel, activations per token, one rounding of each.

    x ~ low + step q,  q in 0 .. 255 (each token has its own low and step)      W ~ scale w,  w in -127 .. 127
    W x + b ~ step (W q) + low (W 1) + b

So a row of the result depends on that row alone, bit for bit. ``W q`` is an integer product, exact up to its last rounding to
fp32. Everything else is plain elementwise torch: compiled, quantisation is fused into the modulation or GELU before the product
and the rest into what follows it.

CPUs without VNNI add two neighbouring products in 16 bits, which saturate. There the sizes of two neighbouring weights add up to
128 at most, 255 x 128 < 2^15, which costs half a bit of some weights; 7 bits for the activations would cost a whole one of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Kernel:
    """One way to compute the integer product.

    ``product(q, weight, scale)``: q (..., K) integers, weight (O, K) int8, scale (O,) -> scale * (q w') (..., O) fp32.
    ``shift`` is what is taken off q so that it fits ``dtype``; ``devices`` are those it runs on.
    """

    name: str
    product: Callable[[Tensor, Tensor, Tensor], Tensor]
    dtype: torch.dtype
    shift: int
    devices: tuple[str, ...]


def quantise_weight(weight: Tensor, saturates: bool = False) -> tuple[Tensor, Tensor]:
    """weight (O, K) -> w int8 in -127 .. 127, scale (O,) fp32; a row of zeros has scale 1.

    Args:
        saturates: neighbours w_2k and w_2k+1 are kept to a sum of sizes of 128.
    """
    whole = weight.detach().float()
    size = neighbours(whole) if saturates else whole.abs()
    scale = size.amax(-1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (whole / scale[:, None]).round_().to(torch.int8), scale


def neighbours(weight: Tensor) -> Tensor:
    """weight (O, K) -> |w_2k| + |w_2k+1| (O, K / 2)."""
    return F.pad(weight.abs(), (0, weight.shape[1] % 2)).unflatten(1, (-1, 2)).sum(-1)


def quantise_tokens(x: Tensor, levels: int, shift: int = 0, dtype: torch.dtype = torch.uint8) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., K) -> q - shift (integers), low and step (..., 1) with x = low + step q up to step / 2."""
    x = x.float()
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    step = ((high - low) / levels).clamp_min(1e-30)
    q = (x - low).mul_(1 / step).round_()
    return (q.sub_(shift) if shift else q).to(dtype), low, step


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8: (..., K) -> (..., O) in the dtype of x.

    With gradients the weight is dequantised and the activations are not rounded, so that what surrounds it can be trained.

    Args:
        linear: what it replaces; nothing of its weight is kept. On the meta device the shapes alone.
        kernel: of ``KERNELS``, or "dequantise": weights are stored in 8 bits and multiplied in the dtype of x.
        saturates: two neighbouring products of 8 and 8 bits leave the 16 bits in which they are added.
    """

    weight: Tensor  # (O, K) int8
    scale: Tensor  # (O,)
    total: Tensor  # (O,) scale * (sum of a row of weight)
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, kernel: str, saturates: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kernel, self.saturates = kernel, saturates
        weight, scale = quantise_weight(linear.weight, saturates)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("total", torch.zeros_like(scale), persistent=False)
        self.bias = linear.bias
        self._derive()

    def _derive(self) -> None:
        """What follows from the weight: its total, and how many levels the activations have. Weights of a file from a CPU with VNNI
        leave them 7 bits where sums saturate."""
        self.total = self.scale * self.weight.sum(-1, dtype=torch.int32)
        fits = not self.saturates or self.weight.is_meta or int(neighbours(self.weight.short()).max()) <= 128
        self.levels = 255 if fits else 127

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._derive()

    def dequantised(self) -> Tensor:
        """scale w (O, K), fp32."""
        return self.weight * self.scale[:, None]

    @property
    def kind(self) -> tuple[str, int]:
        """Layers of one kind share their graphs."""
        return self.kernel, self.levels

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == "dequantise" or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.dequantised().to(x.dtype), self.bias)
        kernel = KERNELS[self.kernel]
        q, low, step = quantise_tokens(x, self.levels, kernel.shift, kernel.dtype)
        if kernel.shift:
            low = low + kernel.shift * step
        y = kernel.product(q, self.weight, self.scale).mul_(step).addcmul_(low, self.total)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kernel={self.kernel}, levels={self.levels}"


def _int_mm(q: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """By ``torch._int_mm``; a GPU wants more than 16 rows and widths in multiples of 8, which are filled with zeros."""
    rows, (o, k) = q.flatten(0, -2), weight.shape
    if q.is_cuda:
        m = len(rows)
        rows = F.pad(rows, (0, -k % 8, 0, max(0, 17 - m)))
        product = torch._int_mm(rows, F.pad(weight, (0, -k % 8, 0, -o % 8)).t())[:m, :o]
    else:
        product = torch._int_mm(rows, weight.t())
    return product.unflatten(0, q.shape[:-1]) * scale


# oneDNN wants weights in a layout of its own, in tensors that cannot enter a graph. So graphs call the operator below with the plain
# weight, and what it is packed into is looked up by the weight's identity, outside the graph.
_packed = WeakIdKeyDictionary()  # weight -> its version, packed, zero points


def _pack(weight: Tensor, rows: int) -> tuple[int, Tensor, Tensor]:
    """What a weight is packed into, made at first use and when the weight was written to since."""
    entry = _packed.get(weight)
    version = 0 if weight.is_inference() else weight._version
    if entry is None or entry[0] != version:
        packed = torch.ops.onednn.qlinear_prepack(weight, [rows, weight.shape[1]])
        entry = _packed[weight] = (version, packed, torch.zeros(len(weight), dtype=torch.int32))
    return entry


_library = torch.library.Library("ditkit", "FRAGMENT")
_library.define("qlinear(Tensor q, Tensor weight, Tensor scale) -> Tensor")


@torch.library.impl(_library, "qlinear", "CPU")
def _(q: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """scale * (q w'), q (..., K) uint8, weight (O, K) int8 -> (..., O) fp32, by oneDNN."""
    _, packed, zeros = _pack(weight, q.numel() // q.shape[-1])
    rest: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise.default(q.contiguous(), 1.0, 0, packed, scale, zeros, *rest)


@torch.library.register_fake("ditkit::qlinear")
def _(q: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(*q.shape[:-1], len(weight))


KERNELS = {
    "onednn": Kernel("onednn", torch.ops.ditkit.qlinear.default, torch.uint8, 0, ("cpu",)),
    "int_mm": Kernel("int_mm", _int_mm, torch.int8, 128, ("cpu", "cuda")),
}


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN's quantised linear."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
