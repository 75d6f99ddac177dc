"""What drafting may cost without bringing anything: seconds that each request has, and all of them together."""

from math import inf

ENDLESS = 1e9  # steps
WEIGHT = 1 / 8  # of the latest step in what a step takes


class Past:
    """The time of steps so far: that of those who pay, and what one stream had of it; what that is of a step now."""

    def __init__(self) -> None:
        self.all = self.each = self.worth = 0.0

    def add(self, seconds: float, streams: int, paying: float) -> None:
        """A step of so many streams took so long; such a part of them pays."""
        each = seconds / streams
        self.all += seconds * paying
        self.each += each
        self.worth += (each - self.worth) * WEIGHT if self.worth else each


class Purse:
    """Seconds put by from the time of steps, a `share` of it, and from what drafts saved; what drafting takes is paid.

    Each request has an account, and there is one of all: what a request spends and saves counts for both. A request
    begins with what the common one has, so with nothing where whole answers gained nothing, but with `start` steps at
    least. The common account puts by no more than `most` steps, which with `full` are there at first, and a request
    `saved`; nobody owes more than `debt`. A step is shared by its streams: each has its part of it, which is what an id
    is worth.
    """

    def __init__(
        self,
        past: Past,
        share: float,
        *,
        most: float,
        saved: float,
        start: float = 0.0,
        debt: float = ENDLESS,
        full: bool = True,
    ) -> None:
        self._past, self._share, self._start, self._debt = past, share, start, debt
        self._most, self._saved = most, saved
        self._spent: dict[int, float] = {}
        self._common = -inf if full else 0.0  # what all spent

    def begin(self, key: int) -> None:
        """A request has come."""
        self._spent[key] = self._past.each * self._share - max(self.common, self._start * self._past.worth)

    def end(self, key: int) -> None:
        """It has ended."""
        self._spent.pop(key, None)

    def has(self, key: int) -> float:
        """What is put by for a request: below 0 what it owes."""
        return min(self._past.each * self._share - self._spent[key], self._saved * self._past.worth)

    @property
    def common(self) -> float:
        """What is put by for all."""
        return min(self._past.all * self._share - self._common, self._most * self._past.worth)

    def spend(self, key: int, seconds: float) -> None:
        """So much was spent for a request, or saved: less than 0. Of one without an account nothing is kept."""
        if key in self._spent:
            owed = -self._debt * self._past.worth
            self._spent[key] = self._past.each * self._share - max(self.has(key) - seconds, owed)
            self._common = self._past.all * self._share - max(self.common - seconds, owed)
