"""What steps take by their rows and drafting by its length, learnt from what is run anyway; nothing is run for it."""

from collections import deque

import numpy as np

from fwd.engine.scheduler import MAX_ROWS

WINDOW = 9  # measurements of a size that its median is of
ENOUGH = 3  # of them to believe: the first is of a warm-up
SLOPE = 0.01  # by which a size that was not measured is thought to take longer, for each more
FRESH = 64  # measurements that are recent: a size that has only such takes the others along
FORGET = 1024  # measurements after which an unused size loses one of its own


class Costs:
    """Seconds by size, 1 … `MAX_ROWS`: the rows of a step, or the drafts that are made for it.

    A dense model takes as long for all rows of a bucket, a mixture of experts a little longer for each; both show. A
    size has the median of its latest measurements, so one that was held up changes nothing. Where there are not enough
    it is guessed to cost little, so that it is tried: hardly more than the next smaller one, or in proportion to the
    next greater one; `unknown` where nothing is known. A change of a size that is in use is one of all, as when
    contexts grow. No size takes less than a smaller one.
    """

    def __init__(self, unknown: float = 1e-3) -> None:
        self._unknown = unknown
        self._times = [_Times() for _ in range(MAX_ROWS)]
        self._count = 0
        self._fit()

    def seconds(self, size: int) -> float:
        """What `size` rows, or drafts, take; none take nothing."""
        return float(self.curve[size])

    def measured(self, size: int, seconds: float) -> None:
        """Learn from one."""
        self._count += 1
        own = self._times[size - 1]
        before = own.seconds if own.recent(self._count - FRESH) else 0.0
        own.add(self._count, max(seconds, 1e-9))
        if before and own.seconds != before:
            self._take_along(own, own.seconds / before)
        if self._count % FORGET == 0:
            for times in self._times:
                times.forget(self._count - FORGET)
        self._fit()

    def _take_along(self, own: "_Times", change: float) -> None:
        for times in self._times:
            if times is not own:
                times.scale *= change

    def _fit(self) -> None:
        """Draw `curve`, float64 [`MAX_ROWS` + 1], through what is known."""
        known = [times.seconds for times in self._times]
        first = next((size for size, seconds in enumerate(known, 1) if seconds), 0)
        curve = [known[first - 1] / first if first else self._unknown]
        for seconds in known:
            curve.append(seconds or curve[-1] * (1 + SLOPE))
        self.curve = np.minimum.accumulate(curve[::-1])[::-1]
        self.curve[0] = 0.0


class _Times:
    """The latest measurements of one size; `seconds` is 0 where they are too few."""

    def __init__(self) -> None:
        self._values: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._median = 0.0
        self.scale = 1.0  # by which they have changed since

    @property
    def seconds(self) -> float:
        return self._median * self.scale

    def recent(self, after: int) -> bool:
        """There are as many as count, all of them from after then."""
        return len(self._values) == WINDOW and self._values[0][0] > after

    def add(self, when: int, seconds: float) -> None:
        self._values.append((when, seconds / self.scale))
        self._update()

    def forget(self, before: int) -> None:
        """Lose the oldest if all are of `before`."""
        if self._values and self._values[-1][0] <= before:
            self._values.popleft()
            self._update()

    def _update(self) -> None:
        enough = len(self._values) >= ENOUGH
        self._median = sorted(value for _, value in self._values)[len(self._values) // 2] if enough else 0.0
