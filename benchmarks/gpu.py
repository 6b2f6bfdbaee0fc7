"""The GPU suite: parity, speed and one training step of DiT-XL/2 on one data-centre GPU, in under eight minutes, to JSON and a table.

    python benchmarks/gpu.py                     # one H100 or H200; writes benchmarks/gpu_{machine}_{date}.json and .txt
    python benchmarks/gpu.py --only parity train # some sections
    python benchmarks/gpu.py --tiny --out /tmp   # the same code on a CPU in seconds; its figures mean nothing

Each section has a share of the time and is guarded: what fails or is out of time is written down as such, and the next one goes on.
The files are written anew after every section.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before torch is imported: the cold start counts it

import argparse  # noqa: E402
import datetime  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from ditkit.core.errors import DitkitError  # noqa: E402
from ditkit.core.files import atomic_file, write_json  # noqa: E402
from ditkit.eval.bench import commit, plain  # noqa: E402
from ditkit.eval.roof import machine, synchronise  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_parity  # noqa: E402
import gpu_speed  # noqa: E402
import gpu_text  # noqa: E402
from gpu_speed import FULL, TINY, Size  # noqa: E402


class TimeUp(Exception):
    """A section used up its share of the time."""


def cold_start(size: Size, seconds: float) -> dict[str, Any]:
    """From starting Python to the first evaluation, in a process of its own; compiled rows have their own first calls."""
    command = [sys.executable, str(Path(__file__).resolve()), "--cold-start", *(["--tiny"] if size.tiny else [])]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise DitkitError(f"the new process failed: {done.stderr.strip().splitlines()[-1:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": time.perf_counter() - start}


def print_cold_start(size: Size) -> None:
    """What the process of ``cold_start`` does."""
    marks = {"import_seconds": time.perf_counter() - STARTED}
    call = gpu_speed.evaluation(gpu_speed.drawn(size), size, size.batches[0], batched=True)
    synchronise(size.device)
    marks["model_seconds"] = time.perf_counter() - STARTED - marks["import_seconds"]
    call()
    synchronise(size.device)
    marks["first_evaluation_seconds"] = time.perf_counter() - STARTED - sum(marks.values())
    print(json.dumps(marks))


def sections(size: Size) -> dict[str, tuple[float, Callable[[float], dict[str, Any]]]]:
    """Name -> most seconds, and the function that gets the seconds it has. In order of importance."""
    found: dict[str, tuple[float, Callable[[float], dict[str, Any]]]] = {
        "parity": (60, lambda seconds: gpu_parity.check(size.device)),
        "cold start": (30, lambda seconds: cold_start(size, seconds)),
        "train": (90, lambda seconds: gpu_speed.train_step(size, seconds)),
    }
    for batch in size.batches:
        found[f"batch {batch}"] = (70, lambda seconds, batch=batch: gpu_speed.evaluations(size, batch, seconds))  # type: ignore[misc]
    found["fora"] = (60, lambda seconds: gpu_speed.fora(size, seconds))
    return found


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the block after that long, where the system has an alarm."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise TimeUp(f"{seconds:.0f} s are over")

    handler = signal.signal(signal.SIGALRM, ring)
    earlier = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *earlier)
        signal.signal(signal.SIGALRM, handler)


def guarded(run: Callable[[float], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The section's result with how it ended: done, failed (with the error) or out of time."""
    start = time.perf_counter()
    try:
        with limit(seconds):
            found = {"status": "done", **run(0.8 * seconds)}
    except (TimeUp, subprocess.TimeoutExpired) as error:
        found = {"status": "out of time", "error": f"{type(error).__name__}: {str(error)[:200]}"}
    except Exception as error:  # whatever it is belongs into the file, and the next section goes on
        found = {"status": "failed", "error": f"{type(error).__name__}: {str(error)[:1000]}"}
    found["section_seconds"] = time.perf_counter() - start
    _clean()
    return found


def _clean() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def suite(size: Size, deadline: float, only: list[str], write: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Run the sections within ``deadline`` seconds; ``write`` gets all that is known after each of them."""
    end = time.perf_counter() + deadline
    todo = sections(size)
    if unknown := [name for name in only if name not in todo]:
        raise DitkitError(f"there is no section {unknown[0]!r}", allowed=", ".join(todo))
    data = head(size, deadline)
    for name, (most, run) in todo.items():
        left = end - time.perf_counter()
        if only and name not in only:
            continue
        if left < min(10.0, most / 2):
            data["sections"][name] = {"status": "skipped", "error": f"{max(0, left):.0f} s were left of {deadline:.0f}"}
        else:
            print(f"{name} (at most {min(most, left):.0f} s)", file=sys.stderr, flush=True)
            data["sections"][name] = guarded(run, min(most, left))
        write(data)
    data["seconds"] = deadline - (end - time.perf_counter())
    write(data)
    return data


def head(size: Size, deadline: float) -> dict[str, Any]:
    """Where and how."""
    gpu = {}
    if size.device == "cuda":
        p = torch.cuda.get_device_properties(0)
        gpu = {"memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
    return {
        "suite": "gpu-tiny" if size.tiny else "gpu",
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/gpu.py" + (" --tiny" if size.tiny else ""),
        "commit": commit(),
        "machine": asdict(machine()),
        "gpu": {**gpu, "cuda": torch.version.cuda},
        "model": {"name": size.name, "dtype": str(size.dtype).removeprefix("torch."), **size.config},
        "deadline_seconds": deadline,
        "sections": {},
    }


def failures(data: Mapping[str, Any]) -> list[str]:
    """Sections that did not end well, and parity figures above their limits."""
    found = [f"{name}: {s['status']}: {s['error']}" for name, s in data["sections"].items() if s["status"] != "done"]
    checks = data["sections"].get("parity", {}).get("checks", [])
    return found + [f"parity of {c['name']}: {c['error']} > {c['limit']}" for c in checks if not c["passed"]]


def main(argv: list[str] | None = None) -> int:
    """0: every section ended and every parity figure is within its limit; 1: see the file; 2: no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, metavar="FOLDER", help="default: benchmarks/")
    parser.add_argument("--deadline", type=float, default=460.0, metavar="SECONDS", help="for everything (default 460)")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="parity, 'cold start', train, 'batch 8', fora, ...")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: shows that the code runs")
    parser.add_argument("--cold-start", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    size = TINY if options.tiny else FULL
    if size.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU; --tiny runs the same code on the CPU", file=sys.stderr)
        return 2
    if options.cold_start:
        print_cold_start(size)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{'gpu-tiny' if size.tiny else 'gpu'}_{machine().slug}_{datetime.date.today().isoformat()}.json"

    def write(data: Mapping[str, Any]) -> None:
        write_json(path, plain(data))
        with atomic_file(path.with_suffix(".txt")) as file:
            file.write(gpu_text.table(data).encode())

    with _fresh_compiler_cache():
        data = suite(size, options.deadline, options.only, write)
    print(gpu_text.table(data))
    print(f"written to {path.name} and {path.with_suffix('.txt').name}")
    return 1 if failures(data) else 0


@contextmanager
def _fresh_compiler_cache() -> Iterator[None]:
    """Nothing compiled earlier is found again: first calls are what a new user has."""
    earlier = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if earlier is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = earlier


if __name__ == "__main__":
    sys.exit(main())
