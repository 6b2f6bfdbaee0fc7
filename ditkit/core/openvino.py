"""OpenVINO as the engine of the compiled graphs, on CPUs: ``compile_view(model, "step", engine="openvino")``.

What dynamo captured is exported, converted and compiled by OpenVINO at its first call, with the weights as constants of it. Graphs,
guards and their count are those of any other engine. fp32 and sampling only: it computes no gradients.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DitkitError
from .lazy import require

FP32 = "for fp32 on a CPU"


def backend(graph: torch.fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """For ``torch.compile(backend=...)``. Raises MissingDependency without OpenVINO."""
    load()
    return Converted(graph)


def load() -> Any:
    """The library, imported such that it does not report its use to its makers."""
    with _environment("CI", "true"):
        return require("openvino", "openvino")


class Converted:
    """One captured graph: a network of OpenVINO's for each set of weights it is called with (blocks of one kind share a graph)."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self.graph = graph
        self._networks: dict[tuple[int, ...], _Network] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            raise DitkitError("engine openvino computes no gradients", hint="sample under torch.no_grad(), or use engine inductor to train")
        weights = [u for u in inputs if isinstance(u, nn.Parameter)]
        key = tuple(map(id, weights))
        network = self._networks.get(key)
        if network is None or network.stale():
            network = self._networks[key] = _Network(self.graph, inputs, weights)
        return network(*(u for u in inputs if not isinstance(u, nn.Parameter)))


class _Network:
    """The graph with these weights as constants."""

    def __init__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self.weights, self.versions = weights, [u._version for u in weights]
        _check(inputs)
        constants = {i: u.detach() for i, u in enumerate(inputs) if isinstance(u, nn.Parameter)}
        free = tuple(u.detach() for u in inputs if not isinstance(u, nn.Parameter))
        model = _convert(_Frozen(graph, constants, len(inputs)), free)
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.compiled = load().Core().compile_model(model, "CPU", settings)

    def stale(self) -> bool:
        """Whether a weight was written to since."""
        return any(u._version != v for u, v in zip(self.weights, self.versions))

    def __call__(self, *free: Tensor) -> tuple[Tensor, ...]:
        out = self.compiled([u.detach().contiguous().numpy() for u in free])
        return tuple(torch.from_numpy(out[i]) for i in range(len(self.compiled.outputs)))


class _Frozen(nn.Module):
    """The graph as a module whose inputs are the free ones."""

    def __init__(self, graph: torch.fx.GraphModule, constants: dict[int, Tensor], count: int) -> None:
        super().__init__()
        self.graph, self.count, self.places = graph, count, tuple(constants)
        for i, u in constants.items():
            self.register_buffer(f"weight{i}", u)

    def forward(self, *free: Tensor) -> Any:
        rest = iter(free)
        return self.graph(*(getattr(self, f"weight{i}") if i in self.places else next(rest) for i in range(self.count)))


def _convert(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    openvino = load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of what it copies
        program = torch.export.export(module, inputs)
        try:
            return openvino.convert_model(program)
        except Exception as error:  # its exceptions have no base class of their own
            reason = str(error).strip().splitlines()[-1].lstrip("- ")
            raise DitkitError(f"OpenVINO cannot convert this graph: {reason}", hint="leave int8 out, or use engine inductor") from error


def _check(inputs: Sequence[Tensor]) -> None:
    for u in inputs:
        if u.is_floating_point() and (u.dtype != torch.float32 or u.device.type != "cpu"):
            raise DitkitError(f"engine openvino is {FP32}, and this model is {u.dtype} on {u.device.type}", hint="use engine inductor")


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if old is not None:
            os.environ[name] = old
