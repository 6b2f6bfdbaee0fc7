"""What this machine can do at best, measured in the same run as the times that are compared with it.

    t_floor = max(FLOP_linear / P_linear + FLOP_attention / P_attention, bytes / B)

P is the best rate of matrix products and of attention over the model's own shapes, B that of a copy.
"""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.nn.int8 import KERNELS, Kernel, quantise_weight
from ditkit.nn.probe import int8_kernel

from .counters import Cost

COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}  # larger than caches


@dataclass(frozen=True)
class Machine:
    """Where a figure was measured."""

    cpu: str
    capability: str  # what torch makes of the CPU: "AVX2", "AVX512", ...
    cores: int
    threads: int
    gpu: str  # "" without one
    system: str
    python: str
    torch: str
    ditkit: str
    libraries: dict[str, str]

    @property
    def slug(self) -> str:
        """For file names: ``amd-epyc-2c``."""
        words = (self.gpu or self.cpu).lower().replace("(r)", "").replace("(tm)", "").split()
        text = "-".join("".join(c for c in w if c.isalnum()) for w in words[:4] if w != "processor")
        return text if self.gpu else f"{text}-{self.cores}c"


def machine() -> Machine:
    """This one."""
    import importlib.metadata as metadata

    from ditkit import __version__

    libraries = {}
    for name in ("numpy", "diffusers", "torchao", "scikit-learn", "openvino"):
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return Machine(
        _cpu_name(),
        torch.backends.cpu.get_cpu_capability(),
        os.cpu_count() or 1,
        torch.get_num_threads(),
        gpu,
        f"{platform.system()} {platform.machine()}",
        platform.python_version(),
        torch.__version__,
        __version__,
        libraries,
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def other_work(seconds: float = 0.2) -> float | None:
    """Cores that are busy while this process sleeps for ``seconds``: with other jobs, or other machines on the same host.

    (The load average would count what this process itself did a moment ago.) None where the system does not say.
    """
    before = _busy_seconds()
    time.sleep(seconds)
    after = _busy_seconds()
    return None if before is None or after is None else (after - before) / seconds


def _busy_seconds() -> float | None:
    """Seconds that all cores together were not idle, since the start."""
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # idle, and waiting for a disk


@dataclass(frozen=True)
class Roof:
    """Best rates, in operations or bytes a second. ``gemm`` by arithmetic (``plain``, the model's own, such as "fp32", and "int8"),
    and by shape (M, K, N); ``kernels`` says what was called. "int8" is absent where no integer product is faster (``nn/probe.py``)."""

    gemm: dict[str, float]
    attention: float
    copy: float
    gemm_by_shape: dict[str, dict[tuple[int, int, int], float]]
    kernels: dict[str, str]
    device: str
    plain: str = "fp32"
    attention_by_shape: dict[tuple[int, int, int, int, int], float] = field(default_factory=dict)

    def best(self, other: Roof) -> Roof:
        """The higher of each rate: of two measurements of the same machine."""
        by_shape = {a: _higher(v, other.gemm_by_shape.get(a, {})) for a, v in self.gemm_by_shape.items()}
        attention = _higher(self.attention_by_shape, other.attention_by_shape)
        return replace(
            self,
            gemm=_higher(self.gemm, other.gemm),
            attention=max(self.attention, other.attention),
            copy=max(self.copy, other.copy),
            gemm_by_shape=by_shape,
            attention_by_shape=attention,
        )

    def floor(self, cost: Cost) -> float:
        """Seconds below which ``cost`` cannot be done here: each arithmetic at its best rate, or the bytes at a copy's."""
        integer, attention = 2 * cost.integer_macs, 2 * cost.attention_macs
        rest = 2 * cost.linear_macs - integer
        parts = (
            rest / self.gemm[self.plain] if rest else 0,
            integer / self.gemm.get("int8", self.gemm[self.plain]) if integer else 0,
            attention / self.attention if attention else 0,
        )
        return max(sum(parts), (cost.weight_bytes + cost.io_bytes) / self.copy)

    def by_shape(self, cost: Cost) -> float:
        """Seconds if each product and each attention ran at the best rate of its own shape (the best overall where not measured)."""
        seconds = 0.0
        for arithmetic, shapes in ((self.plain, cost.linears), ("int8", cost.integers)):
            rates, best = self.gemm_by_shape.get(arithmetic, {}), self.gemm.get(arithmetic, self.gemm[self.plain])
            seconds += sum(2 * m * k * n * calls / rates.get((m, k, n), best) for (m, k, n), calls in shapes.items())
        for (b, h, q, k, d), calls in cost.attentions.items():
            seconds += 4 * b * h * q * k * d * calls / self.attention_by_shape.get((b, h, q, k, d), self.attention)
        return seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data, rates in units of 10^9."""
        return {
            "gemm_gflops": {k: v / 1e9 for k, v in self.gemm.items()},
            "attention_gflops": self.attention / 1e9,
            "copy_gb_per_s": self.copy / 1e9,
            "gemm_gflops_by_shape": {k: {"x".join(map(str, s)): r / 1e9 for s, r in v.items()} for k, v in self.gemm_by_shape.items()},
            "kernels": self.kernels,
            "device": self.device,
        }


def _higher(a: Mapping[Any, float], b: Mapping[Any, float]) -> dict[Any, float]:
    return {k: max(a.get(k, 0.0), b.get(k, 0.0)) for k in {**a, **b}}


def measure_roof(cost: Cost, *, device: str = "cpu", dtype: torch.dtype = torch.float32, rounds: int = 5, max_shapes: int = 6) -> Roof:
    """The roof for ``cost``: its largest product and attention shapes, interleaved, best of ``rounds`` each (about a second on a CPU)."""
    products = Counter(cost.linears) + Counter(cost.integers)
    shapes = sorted(products, key=lambda s: -s[0] * s[1] * s[2] * products[s])[:max_shapes] or [(512, 512, 512)]
    heads = sorted(cost.attentions, key=lambda s: -s[0] * s[1] * s[2] * s[3] * s[4] * cost.attentions[s])[:2] or [(1, 8, 256, 256, 64)]
    plain = str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
    probes: dict[Any, tuple[Callable[[], Any], float]] = {}
    kernels = {plain: "torch.nn.functional.linear"}
    for m, k, n in shapes:
        probes[plain, m, k, n] = _linear(m, k, n, device, dtype), 2.0 * m * k * n
    if (choice := int8_kernel(device)).pays:
        kernels["int8"] = choice.kernel
        for m, k, n in shapes:
            probes["int8", m, k, n] = _integers(m, k, n, device, KERNELS[choice.kernel]), 2.0 * m * k * n
    for b, h, q, k, d in heads:
        probes["attention", b, h, q, k, d] = _attention(b, h, q, k, d, device, dtype), 4.0 * b * h * q * k * d
    probes["copy"] = _copy(device), 2.0 * _copy_bytes(device)
    rates = {name: probes[name][1] / seconds for name, seconds in _best_times({n: p[0] for n, p in probes.items()}, rounds, device).items()}
    by_shape: dict[str, dict[tuple[int, int, int], float]] = {a: {s[1:]: r for s, r in rates.items() if s[0] == a} for a in kernels}
    by_shape = {a: v for a, v in by_shape.items() if v}
    attention = {s[1:]: r for s, r in rates.items() if s[0] == "attention"}
    best = {a: max(v.values()) for a, v in by_shape.items()}
    return Roof(best, max(attention.values()), rates["copy"], by_shape, kernels, device, plain, attention)


def products_alone(cost: Cost, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """A call that does every product and attention of ``cost`` once, each with weights of its own, and nothing else.

    Timed interleaved with the network it is the roof at the network's own shapes on a machine whose speed drifts: medians compare
    with medians. The weights are as many as the network's, so what they cost to read is in it.
    """
    calls = [_linear(*shape, device, dtype) for shape, count in cost.linears.items() for _ in range(count)]
    calls += [_attention(*shape, device, dtype) for shape, count in cost.attentions.items() for _ in range(count)]

    def call() -> None:
        with torch.inference_mode():
            for product in calls:
                product()

    return call


def _linear(m: int, k: int, n: int, device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    x, w, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype), None
    return lambda: F.linear(x, w, b)


def _attention(b: int, h: int, q: int, k: int, d: int, device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    x, y = (torch.randn(b, h, n, d, device=device, dtype=dtype) for n in (q, k))
    return lambda: F.scaled_dot_product_attention(x, y, y)


def _copy_bytes(device: str) -> int:
    return COPY_BYTES[device.split(":")[0]]


def _copy(device: str) -> Callable[[], Tensor]:
    source = torch.ones(_copy_bytes(device) // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _integers(m: int, k: int, n: int, device: str, kernel: Kernel) -> Callable[[], Tensor]:
    q = torch.randint(0, 128, (m, k), device=device).to(kernel.dtype)
    weight, scale = quantise_weight(torch.randn(n, k, device=device))
    return lambda: kernel.product(q, weight, scale)


def _best_times(calls: Mapping[Any, Callable[[], Any]], rounds: int, device: str, least: float = 2e-3) -> dict[Any, float]:
    """Best seconds of each call, in turn, ``rounds`` times; short calls are repeated within a round until ``least`` seconds."""
    best: dict[Any, float] = {}
    repeats: dict[Any, int] = {}
    with torch.inference_mode():
        for name, call in calls.items():
            seconds = _time(call, 2, device)  # warm
            repeats[name] = max(1, min(50, int(least / max(seconds, 1e-7))))
        for _ in range(rounds):
            for name, call in calls.items():
                best[name] = min(best.get(name, float("inf")), _time(call, repeats[name], device))
    return best


def _time(call: Callable[[], Any], repeats: int, device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def synchronise(device: str) -> None:
    """Wait until the device is idle."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
