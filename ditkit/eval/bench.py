"""The benchmark runner: candidates in turn, in one process, compared before they are timed.

A, B, C, A, B, C, ...: what slows the machine for a moment slows all of them. Medians, quartiles and the best are kept, with the
load, the machine, and the roof that was measured beside them.
"""

from __future__ import annotations

import datetime
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ditkit.core.errors import DitkitError
from ditkit.core.files import write_json

from .counters import Cost
from .drift import Drift, drift
from .quality import Quality
from .roof import Machine, Roof, machine, measure_roof, other_work, synchronise


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: median, quartiles and best of ``repeats`` after warm-up; ``cold`` is the very first (compilation included)."""

    median: float
    q1: float
    q3: float
    best: float
    repeats: int
    cold: float


@dataclass(frozen=True)
class Candidate:
    """One way of doing the same thing.

    ``call`` is what is timed; its result is compared with that of the first candidate, and refused where the relative error
    exceeds ``tolerance`` (None: lossy, shown only). ``items`` is how many pictures (or evaluations) a call makes.
    """

    name: str
    call: Callable[[], Tensor]
    items: int = 1
    cost: Cost | None = None
    parameters: int | None = None
    weight_bytes: int | None = None
    num_inference_steps: int | None = None
    methods: tuple[str, ...] = ()
    equal_time_to: tuple[str, ...] = ()  # the accelerators beside which this, fewer steps of the base, is the honest choice
    tolerance: float | None = None
    notes: tuple[str, ...] = ()
    drift: Drift | None = None  # measured already, on more samples
    cold: float | None = None  # seconds of its first call, measured already
    quality: Quality | None = None


@dataclass(frozen=True)
class Row:
    """A candidate with all that was measured; costs and times are per item."""

    name: str
    methods: tuple[str, ...]
    num_inference_steps: int | None
    equal_time_to: tuple[str, ...]
    items: int
    seconds: Timing  # ``cold`` is that of the whole first call
    speedup: float  # of the median, over the first row
    macs: float | None
    flops: float | None
    parameters: int | None
    weight_bytes: int | None
    activation_bytes: int | None  # counted: the most that lived at once of what the call made, caches included
    peak_memory_bytes: int | None  # measured: of torch on a GPU, of the whole process on a CPU
    drift: Drift | None
    quality: Quality | None
    floor_seconds: float | None
    ratio_to_floor: float | None  # median over floor
    shapes_seconds: float | None  # each product at the best rate of its own shape
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BenchResult:
    """A suite on one machine on one day."""

    suite: str
    date: str
    machine: Machine
    commit: str
    command: str
    protocol: dict[str, Any]
    others_before: float | None  # cores busy with other work
    others_after: float | None
    roof: Roof | None
    rows: tuple[Row, ...]

    @property
    def busy(self) -> bool:
        """Other jobs disturbed the run: before or after it they kept more than half a core busy.

        (Less may be threads of this process, which wait a moment for more work.)
        """
        return any(u is not None and u > 0.5 for u in (self.others_before, self.others_after))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written."""
        values = {**asdict(replace(self, roof=None)), "roof": self.roof.to_dict() if self.roof else None, "busy": self.busy}
        return plain(values)

    def write(self, folder: str | Path) -> Path:
        """``{suite}_{machine}_{date}.json`` in ``folder``."""
        path = Path(folder) / f"{self.suite}_{self.machine.slug}_{self.date}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict())
        return path


def run_bench(
    candidates: Sequence[Candidate],
    *,
    suite: str,
    repeats: int = 25,
    warmups: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    command: str = "",
    progress: bool = True,
) -> BenchResult:
    """Compare the candidates with the first, then time them interleaved, with the roof measured before and after.

    Raises:
        DitkitError: names are not distinct, or an output is further from the first than its tolerance.
    """
    _check(candidates, repeats, warmups)
    others_before = other_work()
    cold, compared = compare(candidates, device)
    costs = [c.cost for c in candidates if c.cost is not None]
    roofs = [_roof_of(costs, device, dtype)] if costs else []
    timings = interleave(
        {c.name: c.call for c in candidates}, repeats=repeats, warmups=warmups, device=device, progress=progress, cold=cold
    )
    peaks = {c.name: peak_memory(c.call, device) for c in candidates}
    roof = roofs[0].best(_roof_of(costs, device, dtype)) if roofs else None
    first = timings[candidates[0].name].median / candidates[0].items
    rows = tuple(_row(c, timings[c.name], compared[c.name], peaks[c.name], roof, first) for c in candidates)
    protocol = {"repeats": repeats, "warmups": warmups, "order": "interleaved, rotating", "device": device, "dtype": str(dtype)[6:]}
    today = datetime.date.today().isoformat()
    return BenchResult(suite, today, machine(), commit(), command, protocol, others_before, other_work(), roof, rows)


def _check(candidates: Sequence[Candidate], repeats: int, warmups: int) -> None:
    names = [c.name for c in candidates]
    if not names or len(set(names)) != len(names):
        raise DitkitError(f"candidates {names}", allowed="one or more, with distinct names")
    if repeats < 1 or warmups < 0:
        raise DitkitError(f"repeats is {repeats} and warmups {warmups}", allowed="repeats >= 1, warmups >= 0")


def compare(candidates: Sequence[Candidate], device: str = "cpu") -> tuple[dict[str, float], dict[str, Drift]]:
    """Call each once, unless that was done: how long it took, and how far its output is from the first candidate's."""
    known = [(c.name, c.cold, c.drift) for c in candidates if c.cold is not None and c.drift is not None]
    if len(known) == len(candidates):
        cold, found = {name: cold for name, cold, _ in known}, {name: d for name, _, d in known}
    else:
        cold, outputs = _call_each(candidates, device)
        found = {name: drift(output, outputs[candidates[0].name]) for name, output in outputs.items()}
    for c in candidates:
        if c.tolerance is not None and found[c.name].relative_l2 > c.tolerance:
            raise DitkitError(
                f"{c.name} differs from {candidates[0].name} by {found[c.name].relative_l2:.1e} (relative)",
                allowed=f"at most {c.tolerance:.0e}",
                hint="times of different results are not comparable: mend it first",
            )
    return cold, found


def _call_each(candidates: Sequence[Candidate], device: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    cold, outputs = {}, {}
    for c in candidates:
        synchronise(device)
        start = time.perf_counter()
        outputs[c.name] = c.call()
        synchronise(device)
        cold[c.name] = time.perf_counter() - start
    return cold, outputs


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warmups: int = 3,
    device: str = "cpu",
    progress: bool = True,
    cold: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Time the calls in turn; each round begins with another one, so that no place in the order is favoured."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    first = dict(cold or {})
    with tqdm(total=(warmups + repeats) * len(names), desc="timing", unit="call", disable=not progress, delay=2, leave=False) as bar:
        for turn in range(warmups + repeats):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                seconds[name].append(elapsed(calls[name], device))
                first.setdefault(name, seconds[name][0])
                bar.update()
    return {name: _summary(times[warmups:], first[name]) for name, times in seconds.items()}


def elapsed(call: Callable[[], Any], device: str) -> float:
    """Seconds of a call: by the GPU's own events, or by the clock."""
    synchronise(device)
    if device.startswith("cuda"):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _summary(times: list[float], cold: float) -> Timing:
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(median, q1, q3, min(times), len(times), cold)


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """Most memory in use during ``call``, bytes: of torch on a GPU; of the whole process (resident) on a CPU, where Linux says it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # forget the peak so far
        call()
        line = next(u for u in Path("/proc/self/status").read_text().splitlines() if u.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return None


def _roof_of(costs: Sequence[Cost], device: str, dtype: torch.dtype) -> Roof:
    """The roof at the shapes of all candidates together."""
    whole = costs[0]
    for c in costs[1:]:
        shapes: dict[str, Any] = {k: {**getattr(whole, k), **getattr(c, k)} for k in ("linears", "integers", "attentions")}
        whole = replace(whole, **shapes)
    return measure_roof(whole, device=device, dtype=dtype)


def _row(c: Candidate, timing: Timing, compared: Drift, peak: int | None, roof: Roof | None, first: float) -> Row:
    each = replace(timing, **{k: getattr(timing, k) / c.items for k in ("median", "q1", "q3", "best")})
    floor = roof.floor(c.cost) / c.items if roof and c.cost else None
    notes = c.notes + ((f"too low: no formula for {', '.join(c.cost.uncounted)}",) if c.cost and c.cost.uncounted else ())
    return Row(
        name=c.name,
        methods=c.methods,
        num_inference_steps=c.num_inference_steps,
        equal_time_to=c.equal_time_to,
        items=c.items,
        seconds=each,
        speedup=first / each.median,
        macs=c.cost.macs / c.items if c.cost else None,
        flops=c.cost.flops / c.items if c.cost else None,
        parameters=c.parameters,
        weight_bytes=c.weight_bytes,
        activation_bytes=c.cost.activation_bytes if c.cost else None,
        peak_memory_bytes=peak,
        drift=c.drift or compared,
        quality=c.quality,
        floor_seconds=floor,
        ratio_to_floor=each.median / floor if floor else None,
        shapes_seconds=roof.by_shape(c.cost) / c.items if roof and c.cost else None,
        notes=notes,
    )


def commit() -> str:
    """The revision of this package where it runs from a git checkout, else ""."""
    try:
        here = Path(__file__).parent
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.SubprocessError):
        return ""


def plain(value: Any) -> Any:
    """Data for JSON, which has no infinity: "inf" (a PSNR where nothing differs)."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
