"""One thread does all the work of a page, so that nothing that is timed ever runs beside something else."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Stopped(Exception):
    """The user asked the work to stop."""


class Job:
    """A piece of work under way: what it says reaches the page, and it stops where it looks."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.ended: str | None = None  # the last thing that the page is told of it, once it is over
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def say(self, event: Any) -> None:
        """Hand something to whoever follows the work."""
        self._said.put(event)

    def check(self) -> None:
        """Raises Stopped if the user asked for it."""
        if self.stop.is_set():
            raise Stopped

    def settle(self) -> None:
        """Wait until all that was said has been taken, so that nobody is busy with it. Raises Stopped."""
        taken = threading.Event()
        self.say(taken)
        while not taken.wait(0.05):
            self.check()


class Worker:
    """Runs jobs one after the other, in a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "ditkit-app")

    def follow(self, work: Callable[[Job], Any], job: Job | None = None) -> Iterator[Any]:
        """What the work says while it runs, then what it returns. Closing the iterator stops the work and waits until it has ended.

        Raises:
            Stopped: the job was stopped, also before its turn; or whatever the work raises.
        """
        job = job or Job()
        end = object()
        future: Future[Any] = self._pool.submit(self._run, work, job)
        future.add_done_callback(lambda _: job.say(end))
        try:
            while (event := job._said.get()) is not end:
                if isinstance(event, threading.Event):
                    event.set()
                else:
                    yield event
        except GeneratorExit:
            job.stop.set()
            future.exception()
            raise
        yield future.result()

    @staticmethod
    def _run(work: Callable[[Job], Any], job: Job) -> Any:
        job.check()
        return work(job)

    def close(self) -> None:
        """No further jobs."""
        self._pool.shutdown(cancel_futures=True)
