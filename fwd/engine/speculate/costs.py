"""What steps take by their rows and drafting by its length, learnt from what is run anyway; nothing is run for it."""

from collections import deque
from itertools import accumulate

from fwd.kernels.sizes import MAX_ROWS

WINDOW = 9  # measurements of a size that its median is of
ENOUGH = 3  # of them to believe: the first is of a warm-up
SLOPE = 0.01  # by which a size that was not measured is thought to take longer, for each more
FRESH = 64  # measurements that are recent: a size that has only such takes the others along
FORGET = 1024  # measurements after which an unused size loses one of its own


class Costs:
    """Seconds by size, 1 … `MAX_ROWS`: the rows of a step, or the drafts that are made for it.

    A dense model takes as long for all rows of a bucket, a mixture of experts a little longer for each; both show. A
    size has the median of its latest measurements, so one that was held up changes nothing. Where there are not enough
    it is guessed to cost little, so that it is tried: hardly more than a smaller one, half of what lies between two, or
    in proportion to a greater one; `unknown` where nothing is known. A change of a size that is in use is one of all,
    as when contexts grow. No size takes less than a smaller one.
    """

    def __init__(self, unknown: float = 1e-3) -> None:
        self._unknown = unknown
        self._windows = [Window() for _ in range(MAX_ROWS)]
        self._known = [0.0] * MAX_ROWS  # the median of each
        self._pace = 1.0  # by which all of them are slower than what is in the windows
        self._count = 0
        self._curve: list[float] | None = None  # through what is known, drawn when it is asked for

    @property
    def curve(self) -> list[float]:
        """Seconds by size, 0 … `MAX_ROWS`; none take nothing."""
        if self._curve is None:
            self._curve = self._fitted()
        return self._curve

    def seconds(self, size: int) -> float:
        """What `size` rows, or drafts, take."""
        return self.curve[size]

    def knows(self, size: int) -> bool:
        """It was measured often enough to be believed."""
        return self._known[size - 1] > 0

    def measured(self, size: int, seconds: float) -> None:
        """Learn from one."""
        self._count += 1
        place = size - 1
        window, before = self._windows[place], self._known[place]
        steady = window.full and window.oldest > self._count - FRESH
        self._known[place] = window.add(max(seconds, 1e-9) / self._pace, self._count) * self._pace
        if self._known[place] != before:
            self._curve = None
            if steady:
                self._take_along(place, self._known[place] / before)
        if self._count % FORGET == 0:
            self._known = [each.forgotten(self._count - FORGET) * self._pace for each in self._windows]
            self._curve = None

    def _take_along(self, place: int, change: float) -> None:
        """All others change as that one did."""
        own = self._known[place]
        self._pace *= change
        self._windows[place].scale(1 / change)
        self._known = [seconds * change for seconds in self._known]
        self._known[place] = own

    def _fitted(self) -> list[float]:
        curve, last, at = [0.0], 0.0, 0
        for size, seconds in enumerate(self._known, 1):
            if seconds:
                curve += _between(last, seconds, size - at)
                last, at = seconds, size
        last, at = (last, at) if at else (self._unknown, 0)
        curve += [last * (1 + SLOPE * more) for more in range(1, MAX_ROWS - at + 1)]
        return list(accumulate(reversed(curve), min))[::-1]


def _between(low: float, high: float, steps: int) -> list[float]:
    """What sizes take after one that takes `low` up to one that takes `high`: half of what a straight line says.

    Without one below it is all of that.
    """
    return [
        (low + (high - low) * at / steps + (low * (1 + SLOPE * at) if low else high * at / steps)) / 2
        for at in range(1, steps)
    ] + [high]


class Window:
    """The median of the latest measurements of one thing."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._when: deque[int] = deque(maxlen=WINDOW)
        self.median = 0.0  # of those that there are; 0 where they are too few

    @property
    def full(self) -> bool:
        """There are as many as count."""
        return len(self._when) == WINDOW

    @property
    def oldest(self) -> int:
        """When the oldest was made."""
        return self._when[0]

    def add(self, seconds: float, when: int = 0) -> float:
        """Take in one; return the median."""
        self._seconds.append(seconds)
        self._when.append(when)
        return self._found()

    def scale(self, change: float) -> None:
        """All of them would take so much longer now."""
        self._seconds = deque((seconds * change for seconds in self._seconds), maxlen=WINDOW)
        self.median *= change

    def forgotten(self, before: int) -> float:
        """Lose the oldest if none is newer than `before`; return the median."""
        if self._when and self._when[-1] <= before:
            self._when.popleft()
            self._seconds.popleft()
        return self._found()

    def _found(self) -> float:
        count = len(self._seconds)
        self.median = sorted(self._seconds)[count // 2] if count >= ENOUGH else 0.0
        return self.median
