"""A session of a run: signals that end it in good order, and the files that an earlier one left."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditkit.bundle import CODEC, CONFIG, METHODS, MODEL
from ditkit.core.files import MANIFEST, remove_temporary

from .checkpoint import RECIPE
from .logs import BOARD, LOG

CHECKPOINTS, SAMPLES = "checkpoints", "samples"
_OURS = (CHECKPOINTS, SAMPLES, BOARD, LOG, RECIPE, CONFIG, MODEL, METHODS, MANIFEST, CODEC)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets: the run writes a checkpoint after the current step and ends. A second one kills."""
    stop = threading.Event()
    old: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, old[number])

    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def set_aside(folder: Path) -> None:
    """Move what an earlier run left in ``folder`` to ``earlier-N``: nothing is lost by starting anew."""
    left = [folder / name for name in _OURS if (folder / name).exists()]
    if not left:
        return
    number = next(n for n in range(1, 1 << 30) if not (folder / f"earlier-{n}").exists())
    (folder / f"earlier-{number}").mkdir()
    for path in left:
        os.replace(path, folder / f"earlier-{number}" / path.name)


def clear_half_bundle(folder: Path) -> None:
    """Remove a bundle whose writing was cut off: without a manifest its files belong to nobody."""
    remove_temporary(folder)
    if not (folder / MANIFEST).is_file():
        for name in (CONFIG, MODEL):
            (folder / name).unlink(missing_ok=True)
        for name in (METHODS, CODEC):
            shutil.rmtree(folder / name, ignore_errors=True)
