"""Child processes that start in milliseconds: forked from a server that has imported torch and the trainer."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

_PRELOAD = ["torch", "torch._dynamo", "torch.optim", "torch.utils.tensorboard", "ditkit.train.loop", "ditkit.data.digits"]


def start(target: Callable[..., Any], *args: Any, env: dict[str, str] | None = None) -> Any:
    """A running child that calls ``target`` (a function of an importable module) with one thread for torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    child = context.Process(target=_call, args=(target, args, env or {}))
    child.start()
    return child


def run(target: Callable[..., Any], *args: Any, timeout: float = 50.0) -> int:
    """Call ``target`` in a child; returns its exit code (-9: killed)."""
    child = start(target, *args)
    child.join(timeout)
    if child.exitcode is None:
        child.kill()
        raise TimeoutError(f"{target.__name__} took longer than {timeout} s")
    return int(child.exitcode)


def world(size: int, target: Callable[..., Any], *args: Any) -> list[Any]:
    """``size`` running children that find each other as the processes of ``torchrun`` do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [start(target, *args, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)]


def _call(target: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str]) -> None:
    os.environ.update(env)
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore of the system, which a killed child would leave behind
    target(*args)
