"""Who drafts for whom and how much: what gives most tokens a second, of all that a step has room for."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fwd.engine.speculate.costs import Costs
from fwd.kernels.sizes import MAX_ROWS

SURE = 0.97  # of what drafts promise is counted on: of several estimates the best is the luckiest,
DEAR = 0.985  # and of that, of costly drafts: what they displace in caches is not measured
Array = NDArray[np.float64]
Places = NDArray[np.intp]


class Choice(NamedTuple):
    """One way to draft for a request: the chances that the first 1, 2, … drafts all hold.

    `costly`: making them takes time, which goes by the longest that is asked for in a step.
    """

    drafter: str
    survival: Sequence[float]
    costly: bool = False


class Pick(NamedTuple):
    """So many drafts of that drafter."""

    drafter: str = ""
    drafts: int = 0


NO_PICK = Pick()


class Prices(NamedTuple):
    """What a step takes by its rows, and the costly drafter by its drafts.

    A step takes `always` more, and with drafts `waiting`: it cannot be launched before the one before it is read.
    """

    steps: Costs
    drafting: Costs
    always: float = 0.0
    waiting: float = 0.0

    def seconds(self, rows: int, room: int, longest: int) -> Array:
        """Of steps of `rows` rows: float64 [longest + 1, room + 1] by the longest costly drafts, and by all drafts."""
        steps, drafting = np.array(self.steps.curve), np.array(self.drafting.curve)
        seconds: Array = drafting[: longest + 1, None] + steps[rows : rows + room + 1] + self.always
        seconds[:, 1:] += self.waiting
        return seconds

    def rates(self, choice: Choice, rows: int) -> Iterator[tuple[float, float]]:
        """With 1, 2, … of the drafts beside `rows` rows: ids a second, and the seconds of the step."""
        steps, drafting, ids = self.steps.curve, self.drafting.curve, float(rows)
        more = self.always + self.waiting
        for count, chance in enumerate(choice.survival[: MAX_ROWS - rows], 1):
            ids += chance
            seconds = steps[rows + count] + more + (drafting[count] if choice.costly else 0.0)
            yield ids / seconds, seconds


class Verdict(NamedTuple):
    """What each request gets, and the tokens a second that are expected of the best there is.

    With `trial` that is not what they get: the request at that place has a trial in its place.
    """

    picks: list[Pick]
    rate: float
    trial: int = -1


def choose(requests: Sequence[Sequence[Choice]], rows: int, prices: Prices) -> Verdict:
    """The best of all allocations of drafts to requests beside `rows` rows that give a token each; or no drafts.

    All numbers of drafts are compared, not only the next one, since a step may take as long for some more; each with
    the best division among the requests, and for each length that the costly drafter may be asked for.
    """
    if len(requests) == 1:
        return _alone(requests[0], rows, prices)
    room = MAX_ROWS - rows
    gains = [_Gains(choices, room) for choices in requests]
    longest = max(each.longest for each in gains)
    total, counts = gains[0].table(longest), []
    for each in gains[1:]:
        divided = _divided(total, each.table(longest))
        counts.append(divided.argmax(axis=2))
        total = divided.max(axis=2)
    rates = (rows + total) / prices.seconds(rows, room, longest)
    rates[:, 1:] *= SURE
    rates[1:] *= DEAR
    best = int(rates.argmax())
    limit, drafts = divmod(best, room + 1)
    picks = [NO_PICK] * len(gains)
    for place in range(len(gains) - 1, -1, -1):
        count = int(counts[place - 1][limit, drafts]) if place else drafts
        picks[place] = gains[place].pick(limit, count)
        drafts -= count
    return Verdict(picks, float(rates.flat[best]))


def trial(choices: Sequence[Choice], rows: int, prices: Prices, rate: float, stake: float) -> Pick:
    """The most promising drafts of a costly drafter with which a step takes at most `stake` seconds too long.

    That is so much longer than `rows` ids take at `rate`, the ids a second that seem best.
    """
    most, best, pick = rows / rate + stake, 0.0, NO_PICK
    for choice in choices:
        for count, (each, seconds) in enumerate(prices.rates(choice, rows) if choice.costly else (), 1):
            if each > best and seconds <= most:
                best, pick = each, Pick(choice.drafter, count)
    return pick


def _alone(choices: Sequence[Choice], rows: int, prices: Prices) -> Verdict:
    """The best for one request."""
    best, pick = rows / (prices.steps.curve[rows] + prices.always), NO_PICK
    for choice in choices:
        sure = SURE * DEAR if choice.costly else SURE
        most = sure * (rows + sum(choice.survival))
        for count, (rate, seconds) in enumerate(prices.rates(choice, rows), 1):
            if rate * sure > best:
                best, pick = rate * sure, Pick(choice.drafter, count)
            elif most <= best * seconds:  # as will more drafts be
                break
    return Verdict([pick], best)


def _divided(total: Array, table: Array) -> Array:
    """[limits, drafts, of which so many are the next request's]: what all gain together; both are [limits, drafts]."""
    impossible = np.full((len(total), 1), -np.inf)
    rest = np.concatenate((total, impossible), axis=1)[:, _rests(total.shape[1])]
    return rest + table[:, None, :]


@cache
def _rests(size: int) -> Places:
    """[drafts, count]: what is left of drafts without count; where that is less than none, the last place."""
    places = np.arange(size)
    rests: Places = np.maximum(places[:, None] - places, -1)
    return rests


class _Gains:
    """The ids that a request is expected to gain by its drafts, up to `room` of them."""

    def __init__(self, choices: Sequence[Choice], room: int) -> None:
        self._choices = [(choice, list(accumulate(choice.survival[:room], initial=0.0))) for choice in choices]
        self._room = room
        self.longest = max((len(sums) - 1 for choice, sums in self._choices if choice.costly), default=0)

    def table(self, longest: int) -> Array:
        """[longest + 1, room + 1]: the best by the most that the costly drafter is asked for, and by the drafts."""
        best = np.zeros((longest + 1, self._room + 1))
        for choice, sums in self._choices:
            padded = np.array(sums + sums[-1:] * (self._room + 1 - len(sums)))
            np.maximum(best, padded[_counts(longest, self._room)] if choice.costly else padded, out=best)
        return best

    def pick(self, limit: int, count: int) -> Pick:
        """The best way to have `count` drafts, of the costly drafter not more than `limit`."""
        ways = [(choice, sums[: min(count, limit if choice.costly else count) + 1]) for choice, sums in self._choices]
        choice, sums = max(ways, key=lambda way: way[1][-1], default=(None, [0.0]))
        return Pick(choice.drafter, len(sums) - 1) if choice and len(sums) > 1 else NO_PICK


@cache
def _counts(longest: int, room: int) -> Places:
    """[longest + 1, room + 1]: of so many drafts those that a costly drafter makes."""
    counts: Places = np.minimum(np.arange(longest + 1)[:, None], np.arange(room + 1))
    return counts
