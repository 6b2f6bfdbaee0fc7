"""The log of a run: ``log.jsonl`` always, TensorBoard where it is installed, a live line on stderr.

After a resume every line beyond the checkpoint is dropped, so no event stands there twice.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ditkit.core.errors import DitkitError
from ditkit.core.files import atomic_file

LOG, BOARD = "log.jsonl", "tensorboard"


class Log:
    """Writes events; each is one line {"event", "step", ...}.

    Args:
        folder: of the run.
        start: steps done already; later lines of an earlier session are dropped.
        total: steps of the run.
        quiet: no live line.
        silent: nothing is written (all processes but the first).
    """

    def __init__(self, folder: Path, start: int, total: int, quiet: bool = False, silent: bool = False) -> None:
        self.path, self.silent = folder / LOG, silent
        self._board: Any = None
        self._bar = tqdm(total=total, initial=start, unit="step", disable=quiet or silent, dynamic_ncols=True)
        if silent:
            return
        folder.mkdir(parents=True, exist_ok=True)
        cut_log(self.path, start)
        self._file = self.path.open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboard"):
            self._board = _summary_writer(folder / BOARD, start)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if not self.silent:
            self._file.close()
            if self._board is not None:
                self._board.close()

    def event(self, event: str, step: int, **values: Any) -> None:
        """One line, handed to the system at once: what was written survives the death of this process."""
        if self.silent:
            return
        plain = {k: _plain(v) for k, v in values.items()}
        self._file.write(json.dumps({"event": event, "step": step, **plain}) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{event}/{key}", value, step)

    def progress(self) -> None:
        """One step further."""
        self._bar.update()

    def show(self, **values: str) -> None:
        """What stands behind the bar."""
        self._bar.set_postfix(values, refresh=False)

    def sync(self) -> None:
        """Everything so far is on the disk."""
        if not self.silent:
            self._file.flush()
            os.fsync(self._file.fileno())


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become text."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def _summary_writer(folder: Path, start: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of tensorboard's own imports
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder), purge_step=start + 1)


def read_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """The events of a log; a last line that was cut off by the death of its writer is left out."""
    path = Path(path)
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise DitkitError(f"{path}: line {number} is no JSON", hint="repair or remove that line") from None


def cut_log(path: Path, step: int) -> None:
    """Drop the events after ``step``, and the marks of earlier sessions that began there."""
    if not path.is_file():
        return
    events = list(read_log(path))
    kept = [e for e in events if e["step"] < step or (e["step"] == step and e["event"] not in ("start", "resume"))]
    with atomic_file(path) as file:
        file.write("".join(json.dumps(e) + "\n" for e in kept).encode("utf-8"))


class Meter:
    """Means of loss and gradient norm, and speed, between two lines of the log.

    The values that wait for their line are part of the checkpoint, so that a resumed run writes the same lines.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self._start, self._samples = time.perf_counter(), 0

    def add(self, loss: float, norm: float, samples: int) -> None:
        """One accepted step."""
        self.losses.append(loss)
        self.norms.append(norm)
        self._samples += samples

    def line(self) -> tuple[dict[str, float], float]:
        """Means since the last line (absent if no step was accepted) with samples a second, and the seconds; starts anew."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        values = {"images_per_second": self._samples / seconds}
        if self.losses:
            values |= {"loss": sum(self.losses) / len(self.losses), "grad_norm": sum(self.norms) / len(self.norms)}
        self.losses, self.norms = [], []
        self.restart()
        return values, seconds

    def restart(self) -> None:
        """Begin to time here: what came before (a checkpoint, a preview) is not training."""
        self._start, self._samples = time.perf_counter(), 0

    def state(self) -> dict[str, list[float]]:
        """Plain data for the checkpoint."""
        return {"losses": self.losses, "norms": self.norms}

    def restore(self, state: dict[str, list[float]]) -> None:
        """From ``state``."""
        self.losses, self.norms = list(state["losses"]), list(state["norms"])
