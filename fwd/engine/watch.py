"""Runs calls that cannot be interrupted and gives up those that take too much of a CPU."""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Watch:
    """Calls are made one at a time in a thread, which is left to itself where one takes more than `seconds` of a CPU.

    What is slow because others have the CPU is waited for. A call takes some 10 µs more.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._worker: _Worker | None = None
        self._left: list[_Worker] = []

    @property
    def left(self) -> int:
        """Calls that were given up and still take a CPU."""
        self._left = [worker for worker in self._left if worker.is_alive()]
        return len(self._left)

    def __call__(self, work: Callable[[], T], seconds: float = 0.0) -> T | None:
        """What `work` gives; None if it has taken too long, `seconds` if so said. Raises what it raises."""
        most = seconds or self._seconds
        worker = self._worker = self._worker or _Worker()
        found: list[T] = []
        begun = worker.begin(lambda: found.append(work()))
        while not worker.done.acquire(timeout=most):
            if worker.spent() - begun > most:
                worker.leave()
                self._worker = None
                self._left.append(worker)
                return None
        if worker.failure:
            raise worker.failure
        return found[0]


class _Worker(threading.Thread):
    """Makes the calls that it is given, in their order, until it is left."""

    def __init__(self) -> None:
        super().__init__(name="watched", daemon=True)
        self.failure: Exception | None = None
        self.done = threading.Lock()
        self.done.acquire()
        self._given: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.start()
        assert self.ident
        self._clock = time.pthread_getcpuclockid(self.ident)

    def spent(self) -> float:
        """Seconds of a CPU that it has had."""
        return time.clock_gettime(self._clock)

    def begin(self, work: Callable[[], None]) -> float:
        """Let it work; what it had spent before."""
        spent = self.spent()
        self._given.put(work)
        return spent

    def leave(self) -> None:
        """Let it end after what it was given, which may be at its end already."""
        self._given.put(None)

    def run(self) -> None:
        """Work until it is left."""
        while work := self._given.get():
            self.failure = None
            try:
                work()
            except Exception as error:  # noqa: BLE001  # it is raised where it is waited for
                self.failure = error
            self.done.release()
