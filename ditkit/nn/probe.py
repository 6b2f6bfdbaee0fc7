"""Which 8-bit product this machine computes rightly, and which is fastest: tried once, in milliseconds, and remembered.

Machines differ by more than any table can say: on a CPU with AVX-512 VNNI ``torch._int_mm`` is 4 times faster than fp32, on one with
AVX2 alone 12 to 60 times slower, and there products of 8 and 8 bits saturate in oneDNN's 16-bit sums.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.cache import cache_dir
from ditkit.core.files import write_json

from .int8 import KERNELS, Kernel, quantise_weight

SMALL = (32, 256, 256)  # tokens, in, out
LARGE = {"cpu": (256, 384, 1536), "cuda": (4096, 1152, 4608)}  # an MLP layer of DiT-S, of DiT-XL
WORTH = 1.25  # a product must be this much faster to pay for rounding the activations
_FORMAT = 2  # of the remembered file


@dataclass(frozen=True)
class Choice:
    """The kernel to use here; ``speedup`` is that of the product alone over fp32 (bf16 on a GPU), ``tried`` that of each that is right."""

    kernel: str
    saturates: bool
    speedup: float
    tried: dict[str, float]

    @property
    def pays(self) -> bool:
        """Faster than without."""
        return self.kernel != "dequantise"

    def __str__(self) -> str:
        tried = ", ".join(f"{name} {speed:.2g}x" for name, speed in self.tried.items()) or "none is right here"
        return f"8-bit products over fp32: {tried}; using {self.kernel}"


@lru_cache
def int8_kernel(device: str = "cpu") -> Choice:
    """The choice for a device; from this process, else from the user's cache folder, else tried now.

    What is remembered holds for one processor and one torch; delete ``probe`` in the cache folder to try again.
    """
    where = torch.device(device)
    key = {"format": _FORMAT, "processor": _processor(where), "torch": torch.__version__}
    path = cache_dir("probe") / f"int8-{where.type}.json"
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry.pop("key") == key:
            return Choice(**entry)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # never tried, or not readable
    choice = try_kernels(where)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, **asdict(choice)})
    except OSError:
        pass  # no cache folder: tried again in the next process
    return choice


def try_kernels(device: torch.device, rounds: int = 5) -> Choice:
    """Time every kernel that is right on ``device`` against the model's usual product, in turn, best of ``rounds``.

    First at a small shape, so that one that is 60 times slower costs no more than a moment; with one thread, so that other jobs
    disturb little.
    """
    speed: dict[str, float] = {}
    with torch.inference_mode(False), torch.no_grad(), _one_thread():
        right = [name for name, kernel in KERNELS.items() if rightness(kernel, device)]
        for shape in (SMALL, LARGE.get(device.type, SMALL)):
            best = _best(_calls([n for n in right if speed.get(n, 1.0) > 0.1], device, shape), rounds, device)
            speed.update({name: best["plain"] / seconds for name, seconds in best.items() if name != "plain"})
    name = max(speed, key=lambda n: speed[n], default="")
    if not name or speed[name] < WORTH:
        return Choice("dequantise", False, speed.get(name, 0.0), speed)
    return Choice(name, rightness(KERNELS[name], device) == "saturates", speed[name], speed)


@lru_cache
def rightness(kernel: Kernel, device: torch.device) -> Literal["exact", "saturates", ""]:
    """Whether products of 8 and 8 bits are exact at extreme values; saturate, but are exact where ``Int8Linear`` stays; or neither."""
    if device.type not in kernel.devices:
        return ""
    pairs = [[127, 127], [-127, -127], [127, -127], [-127, 127], [127, 0], [127, 1], [-64, -64], [1, -127]]
    weight = torch.tensor(pairs, dtype=torch.int8).repeat(1, 128)
    try:
        if _is_exact(kernel, weight, 255, device):
            return "exact"
        if _is_exact(kernel, weight, 127, device) and _is_exact(kernel, weight[4:], 255, device):
            return "saturates"
    except (RuntimeError, AttributeError):
        pass  # this torch or device lacks it
    return ""


def _is_exact(kernel: Kernel, weight: Tensor, levels: int, device: torch.device) -> bool:
    rows = [[levels] * 256, [0, levels] * 128, [levels, levels, 0, 0] * 64, [0] * 256]
    q = torch.tensor(rows).repeat(8, 1) - kernel.shift
    got = kernel.product(q.to(device, kernel.dtype), weight.to(device), torch.ones(len(weight), device=device))
    return torch.equal(got.cpu(), q.float() @ weight.float().t())


def _calls(names: list[str], device: torch.device, shape: tuple[int, int, int]) -> dict[str, Callable[[], Tensor]]:
    m, k, n = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, whole = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    weight, scale = quantise_weight(whole)
    calls: dict[str, Callable[[], Tensor]] = {"plain": lambda: F.linear(x, whole)}
    for name in names:
        q = torch.randint(0, 127, (m, k), device=device).to(KERNELS[name].dtype)
        calls[name] = lambda q=q, product=KERNELS[name].product: product(q, weight, scale)  # type: ignore[misc]
    return calls


def _best(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Best seconds of each call after one to warm up."""
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """What the processor calls itself, with what torch makes of it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"
