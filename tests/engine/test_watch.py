"""Calls are made one at a time, and those that take too much of a CPU are given up."""

import threading
from itertools import count

import pytest

from fwd.engine.watch import Watch


def test_a_watch_tells_what_its_call_gives_or_raises():
    watch = Watch(10.0)
    assert [watch(lambda each=each: each) for each in (1, 0, "x")] == [1, 0, "x"]
    with pytest.raises(ZeroDivisionError):
        watch(lambda: 1 // 0)
    assert watch(lambda: 5) == 5


def test_who_waits_for_a_cpu_is_not_given_up():
    """Only what a call has spent counts, and it sleeps."""
    watch, sleep = Watch(0.001), threading.Event()
    assert watch(lambda: sleep.wait(0.05)) is False


def test_a_call_that_ends_just_as_it_is_given_up_leaves_nobody_behind(monkeypatch):
    watch, free, clock = Watch(0.001), threading.Event(), count()

    def ends(worker):
        """What it has spent: nothing, and then too much, at the end of its call."""
        if spent := next(clock):
            free.set()
            with worker.done:
                pass
        return spent

    monkeypatch.setattr("fwd.engine.watch._Worker.spent", ends)
    assert watch(free.wait) is None
    for worker in list(watch._left):
        worker.join(10)
    assert watch.left == 0
