"""A process that trains bases for ``training.py``: tasks on its input, answers on its output, a line of JSON each.

When its input ends, because who asked is done or dead, it saves what it trains in a checkpoint and ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from typing import Any

import torch

from .bases import Base, BaseStore, Stopped
from .protocol import Protocol
from .training import train_base


def main() -> None:
    """Answer task after task."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what else is printed is no answer
    tasks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    while (line := tasks.get()) is not None:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


def _listen(tasks: queue.SimpleQueue[str | None]) -> None:
    for line in sys.stdin:
        tasks.put(line)
    tasks.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(task["threads"])
    try:
        found = {(name, seed): Base(folder, hash, 0.0, reused=True) for name, seed, folder, hash in task["found"]}
        base = train_base(Protocol.parse(task["protocol"]), task["name"], task["seed"], found, BaseStore(task["store"]), progress=False)
    except Stopped:
        return {"stopped": True}
    except Exception as error:  # the caller tries it itself, and says what is wrong
        return {"error": f"{type(error).__name__}: {error}"}
    return {"folder": str(base.folder), "hash": base.hash, "seconds": base.seconds, "reused": base.reused, "threads": base.threads}


if __name__ == "__main__":
    main()
