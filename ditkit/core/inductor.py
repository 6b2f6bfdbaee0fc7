"""What torch's Inductor is told on a CPU, where it fuses less than on a GPU.

A linear layer with a bias becomes a product and an addition: the library call would first copy the bias over the whole output, the
addition is fused into what follows. The tanh-approximate GELU is written with a sigmoid, which is the same function,
0.5 x (1 + tanh u) = x sigmoid(2 u), and costs an exponential instead of a tanh. On two AVX2 cores that is 4 + 5 % of a DiT-S/2 step.
"""

from __future__ import annotations

import math
import platform
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b, as two operations."""
    product = torch.matmul(x, weight.t())
    return product if bias is None else _AddBias.apply(product, bias)


class _AddBias(torch.autograd.Function):
    """product (..., O) + bias (O,). The bias's gradient, a sum over rows, is a product with ones: Inductor would sum column by column."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, bias: Tensor) -> Tensor:
        return product + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows = grad.flatten(0, -2)
        return grad, (rows.new_ones(1, len(rows)) @ rows)[0]


def settings() -> dict[str, Any]:
    """Options for ``torch.compile``.

    Inductor's own check of the vector instructions compiles and loads a program for each set, 6 of 15 seconds of a first start; on
    x86 the processor's own answer is enough, as every compiler that builds its kernels knows the instructions.
    """
    found: dict[str, Any] = {"pre_grad_custom_pass": CpuRewrite()}
    if platform.machine() in ("x86_64", "AMD64"):
        found["cpp.vec_isa_ok"] = True
    return found


class CpuRewrite(CustomGraphPass):
    """Runs on the captured graph, before differentiation; other devices are left alone."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if node.op != "call_function" or not _on_cpu(node):
                continue
            if node.target is torch.nn.functional.gelu and node.kwargs.get("approximate") == "tanh":
                node.target, node.kwargs = gelu_tanh, {}
            elif node.target is torch.nn.functional.linear:
                node.target = linear

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _on_cpu(node: torch.fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.device.type == "cpu"
