"""Runs calls that cannot be interrupted and gives up those that take too much of a CPU."""

import threading
import time
from collections.abc import Callable
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
                self._worker, worker.left = None, True
                self._left.append(worker)
                return None
        if worker.failure:
            raise worker.failure
        return found[0]


class _Worker(threading.Thread):
    """Makes the calls that it is given, the last of them when it is `left`."""

    def __init__(self) -> None:
        super().__init__(name="watched", daemon=True)
        self.left = False
        self.failure: Exception | None = None
        self.done, self._given = threading.Lock(), threading.Lock()
        self.done.acquire()
        self._given.acquire()
        self._work: Callable[[], None] | None = None
        self.start()
        assert self.ident
        self._clock = time.pthread_getcpuclockid(self.ident)

    def spent(self) -> float:
        """Seconds of a CPU that it has had."""
        return time.clock_gettime(self._clock)

    def begin(self, work: Callable[[], None]) -> float:
        """Let it work; what it had spent before."""
        spent, self._work = self.spent(), work
        self._given.release()
        return spent

    def run(self) -> None:
        """Work until it is left."""
        while not self.left:
            self._given.acquire()
            assert self._work
            self.failure = None
            try:
                self._work()
            except Exception as error:  # noqa: BLE001  # it is raised where it is waited for
                self.failure = error
            self.done.release()
