"""Training the bases of a protocol: on a CPU those that do not build on each other side by side, each in a process of its own.

Networks as small as an experiment's leave a second thread idle for much of an update: two trainings of one thread each, at the same time,
end sooner than one after the other on two threads. How many threads a base is given follows from the protocol and the machine, never from
what ends first, so the same command gives the same weights.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ditkit.train.session import stop_signals

from .bases import Base, BaseStore, Stopped, bundle_base
from .cuts import origin
from .protocol import Protocol, name_of
from .started import start_folder

log = logging.getLogger("ditkit")
Key = tuple[str, int]  # a base's name, and the seed that it is trained with
POLL = 1.0  # seconds between two looks at whether a signal came


def train_bases(protocol: Protocol, store: BaseStore, progress: bool) -> tuple[dict[Key, Base], float]:
    """All bases that are needed, and what arms start from them, for every seed; and the seconds it took.

    Raises:
        Stopped: a signal ended a training, after a checkpoint of each that was under way.
    """
    start = time.perf_counter()
    needed = protocol.needed()
    todo = [(name, seed) for seed in protocol.seeds for name in needed if protocol.seed_of(name, seed) == seed]
    threads = shares(protocol, torch.get_num_threads())
    if torch.cuda.is_available() or all(n == torch.get_num_threads() for n in threads.values()):
        found = _in_turn(protocol, todo, store, progress)
    else:
        found = _side_by_side(protocol, todo, threads, store, progress)
    found = {(name, seed): found[name, protocol.seed_of(name, seed)] for seed in protocol.seeds for name in needed}
    for arm in protocol.arms.values():
        for seed in protocol.seeds if arm.start and arm.base in needed else ():
            base = found[arm.base, seed]
            folder = start_folder(base.folder, store.home(base), arm.start, protocol.starts[arm.start], seed)
            found[arm.stands_on, seed] = bundle_base(folder, base.seconds, base.threads)
    return found, time.perf_counter() - start


def train_base(protocol: Protocol, name: str, seed: int, found: Mapping[Key, Base], store: BaseStore, progress: bool) -> Base:
    """One base, trained now unless it is there. ``found``: at least the bases that it builds on."""
    if bundle := protocol.bundle_of(name):
        return bundle_base(bundle)
    folders = {}
    for text in protocol.builds_on(name):
        on = found[name_of(text), protocol.seed_of(name_of(text), seed)]
        how = text.partition(":")[2]
        if how in protocol.starts:
            folders[text] = start_folder(on.folder, store.home(on), how, protocol.starts[how], seed)
        else:
            folders[text] = origin(text, on.folder, store.home(on), protocol.data, seed, protocol.data_config)
    return store.get(protocol.recipe_of(name, seed, folders), progress)


def levels(protocol: Protocol) -> dict[str, int]:
    """How many trainings must come before each base; bundles, trained already, are left out."""
    found: dict[str, int] = {}
    for name in protocol.needed():
        if protocol.bundle_of(name) is None:
            found[name] = max((found.get(name_of(text), -1) + 1 for text in protocol.builds_on(name)), default=0)
    return found


def shares(protocol: Protocol, threads: int) -> dict[str, int]:
    """Threads of each base's training: those of the machine, divided equally among the trainings of one level."""
    at = levels(protocol)
    beside = {name: sum(1 if other in protocol.shared else len(protocol.seeds) for other in at if at[other] == at[name]) for name in at}
    return {name: max(1, threads // beside[name]) for name in at}


def _in_turn(protocol: Protocol, todo: list[Key], store: BaseStore, progress: bool) -> dict[Key, Base]:
    found: dict[Key, Base] = {}
    for i, (name, seed) in enumerate(todo):
        log.info("base %d of %d: %s, seed %d", i + 1, len(todo), name, seed)
        found[name, seed] = train_base(protocol, name, seed, found, store, progress)
    return found


def _side_by_side(protocol: Protocol, todo: list[Key], threads: Mapping[str, int], store: BaseStore, progress: bool) -> dict[Key, Base]:
    """A base begins as soon as those that it builds on are there and enough threads are free; those of lower levels go first."""
    found = {key: train_base(protocol, *key, {}, store, False) for key in todo if protocol.bundle_of(key[0])}
    level, running = levels(protocol), {}  # type: dict[str, int], dict[Future[Base], Key]
    waiting = sorted((key for key in todo if key not in found), key=lambda key: level[key[0]])
    limit = torch.get_num_threads()
    with Workers(limit) as workers, stop_signals() as stop, tqdm(total=len(waiting), unit="base", disable=not progress) as bar:
        while waiting or running:
            for name, seed in list(waiting):
                on = [(n, protocol.seed_of(n, seed)) for n in map(name_of, protocol.builds_on(name))]
                if all(key in found for key in on) and threads[name] + sum(threads[n] for n, _ in running.values()) <= limit:
                    task = {"protocol": protocol.to_dict(), "name": name, "seed": seed, "threads": threads[name], "store": str(store.root)}
                    running[workers.train(task, {key: found[key] for key in on})] = name, seed
                    waiting.remove((name, seed))
            bar.set_postfix_str(", ".join(f"{name} {seed}" for name, seed in running.values()))
            for future in wait(running, timeout=POLL, return_when=FIRST_COMPLETED).done:
                name, seed = running.pop(future)
                failed = future.exception()
                if not isinstance(failed, WorkerFailed):
                    found[name, seed] = future.result()
                elif not stop.is_set():
                    log.warning("%s, seed %d: %s; once more, in this process", name, seed, failed)
                    found[name, seed] = train_base(protocol, name, seed, found, store, progress)
                bar.update()
            if stop.is_set():
                raise Stopped
    return found


class WorkerFailed(Exception):
    """A process did not train what it was asked to; the same in this process shows why, with its traceback."""


class Workers:
    """Up to ``most`` processes that train bases. Leaving the context ends them; what they train is saved in a checkpoint first.

    They are no children that share memory, nor ``multiprocessing``'s, which would run the caller's script once more: a process is
    ``ditkit.reproduce.worker``, told its tasks on its input, answering on its output, a line of JSON each.
    """

    def __init__(self, most: int) -> None:
        self._threads = ThreadPoolExecutor(most)  # one waits for each process
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self._all: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.terminate()
        self._threads.shutdown()
        for process in self._all:
            with process:  # closes its pipes, waits for its end
                pass

    def train(self, task: dict[str, Any], on: Mapping[Key, Base]) -> Future[Base]:
        """Train a base in the next idle process, beside others. ``on``: the bases that it builds on."""
        return self._threads.submit(self._ask, {**task, "found": [[*key, str(base.folder), base.hash] for key, base in on.items()]})

    def _ask(self, task: dict[str, Any]) -> Base:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._begin()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline() or "{}")
        except OSError:
            answer = {}
        if not answer:
            raise WorkerFailed(f"the process that trained it ended ({process.wait()})")
        self._idle.put(process)
        if answer.get("stopped"):
            raise Stopped
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return Base(**{**answer, "folder": Path(answer["folder"])})

    def _begin(self) -> subprocess.Popen[str]:
        """In a session of its own, so that Ctrl-C reaches this process alone, which then ends the others in good order."""
        command = [sys.executable, "-P", "-m", "ditkit.reproduce.worker"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}  # it imports what this process imports
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
        except OSError as error:
            raise WorkerFailed(f"no process could be started ({error})") from None
        self._all.append(process)
        return process
