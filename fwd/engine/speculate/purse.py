"""What drafting may cost without bringing anything: seconds that each request has, and all of them together."""

from math import inf

WEIGHT = 1 / 8  # of the latest step in what a step takes


class Purse:
    """Seconds put by from the time of steps, a `share` of it, and from what drafts saved; what drafting takes is paid.

    Each request has an account, and there is one of all: what a request spends and saves counts for both. A request
    begins with what the common one has, so with nothing where whole answers gained nothing, but with `start` steps at
    least. More than `most` steps are not put by; with `full` those are there at first. A step counts for each of its streams as
    its part of it: that is what an id is worth.
    """

    def __init__(self, share: float, start: float, most: float, *, full: bool = True) -> None:
        self._share, self._start, self._most = share, start, most
        self._fed = 0.0  # to each account so far
        self._spent: dict[int, float] = {}
        self._common = inf if full else 0.0
        self._worth = 0.0

    def feed(self, seconds: float, streams: int) -> None:
        """A step of so many streams took so long."""
        each = seconds / streams
        self._worth += (each - self._worth) * WEIGHT if self._worth else each
        self._fed += self._share * each
        self._common = min(self._common + self._share * seconds, self._most * self._worth)

    def begin(self, key: int) -> None:
        """A request has come."""
        self._spent[key] = self._fed - max(self._common, self._start * self._worth)

    def end(self, key: int) -> None:
        """It has ended."""
        self._spent.pop(key, None)

    def has(self, key: int) -> float:
        """What is put by for a request: below 0 what it owes."""
        return min(self._fed - self._spent[key], self._most * self._worth)

    def spend(self, key: int, seconds: float) -> None:
        """So much was spent for a request, or saved: less than 0. Of one without an account nothing is kept."""
        if key in self._spent:
            self._spent[key] = max(self._spent[key], self._fed - self._most * self._worth) + seconds
            self._common -= seconds

    def lose(self, key: int) -> None:
        """Take what a request has: it must put by anew."""
        self._spent[key] = max(self._spent[key], self._fed)
