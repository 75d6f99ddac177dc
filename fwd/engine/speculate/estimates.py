"""How often drafts hold, learnt from what was committed, whoever had drafted it."""

from collections.abc import Mapping

from fwd.engine.request import Request
from fwd.engine.speculate.drafter import Proposal
from fwd.kernels.sizes import MAX_ROWS

MEMORY = 128  # observations of a place that count, of all requests together
OWN_MEMORY = 32  # and of one request
PRIOR_WEIGHT = 2.0  # observations that the place before, or a first guess, is worth
COMMON_WEIGHT = 4.0  # and that all requests are worth to one of them
Key = tuple[str, int]  # drafter and level


class Estimates:
    """The chance that a draft holds once those before it have, for each drafter, level and place.

    Counts fade, so that what is being written now says most. A request has counts of its own on the ground of those of
    all; a place that was seldom reached is thought to be like the one before it, the first as `first` says of a
    drafter, or `otherwise`. A proposal is watched until the committed ids have left it, used or not: what costs nothing
    to ask is judged on everything.
    """

    def __init__(self, first: Mapping[str, float], otherwise: float) -> None:
        self._first, self._otherwise = first, otherwise
        self._common = _Table(MEMORY)
        self._own: dict[int, _Table] = {}
        self._watched: dict[int, list[_Watched]] = {}

    def watch(self, request: Request, proposal: Proposal) -> None:
        """What a drafter says comes after the ids that are known."""
        if proposal.ids:
            self._watched.setdefault(request.id, []).append(_Watched(request.length, proposal))

    def learn(self, request: Request) -> None:
        """Ids were committed."""
        if not (watched := self._watched.get(request.id)):
            return
        if (own := self._own.get(request.id)) is None:
            own = self._own[request.id] = _Table(OWN_MEMORY)
        for each in watched:
            if places := each.resolved(request):
                self._common.observe(each.key, places, missed=each.missed)
                own.observe(each.key, places, missed=each.missed)
        self._watched[request.id] = [each for each in watched if not each.done]

    def survival(self, request: Request, key: Key, most: int) -> list[float]:
        """The chances that the first 1, 2, … `most` drafts all hold."""
        common, own = self._common.of(key), self._own.get(request.id, EMPTY).of(key)
        chances, chance, rate = [], 1.0, self._first.get(key[0], self._otherwise)
        for (seen, held), (own_seen, own_held) in zip(common[:most], own, strict=False):
            rate = (held + PRIOR_WEIGHT * rate) / (seen + PRIOR_WEIGHT)
            chance *= (own_held + COMMON_WEIGHT * rate) / (own_seen + COMMON_WEIGHT)
            chances.append(chance)
        return chances

    def end(self, request: Request) -> None:
        """Learn what is left to learn, and forget what was the request's alone."""
        self.learn(request)
        self._own.pop(request.id, None)
        self._watched.pop(request.id, None)


class _Watched:
    """A proposal and how much of it is decided."""

    def __init__(self, start: int, proposal: Proposal) -> None:
        self._start, self._ids, self._place = start, proposal.ids, 0
        self.key = proposal.key
        self.missed = False  # at the last place that was decided

    @property
    def done(self) -> bool:
        """There is no more to decide."""
        return self.missed or self._place == len(self._ids)

    def resolved(self, request: Request) -> range:
        """The places that the known ids decide and that were not yet: none after the first that did not hold."""
        first, end = self._place, min(len(self._ids), request.length - self._start)
        known, place = request.ids, first
        while place < end and not self.missed:
            self.missed = known[self._start + place] != self._ids[place]
            place += 1
        self._place = place
        return range(first, place)


Counts = list[tuple[float, float]]  # by place: observations, faded, and how many of them held
NONE: Counts = [(0.0, 0.0)] * (MAX_ROWS - 1)


class _Table:
    """Counts by drafter and level."""

    def __init__(self, memory: int) -> None:
        self._kept = 1 - 1 / memory
        self._counts: dict[Key, Counts] = {}

    def of(self, key: Key) -> Counts:
        return self._counts.get(key, NONE)

    def observe(self, key: Key, places: range, missed: bool) -> None:
        """All of these held; with `missed`, all but the last."""
        if (counts := self._counts.get(key)) is None:
            counts = self._counts[key] = NONE.copy()
        kept = self._kept
        for place in places:
            seen, held = counts[place]
            counts[place] = seen * kept + 1, held * kept + 1
        if missed:
            seen, held = counts[places[-1]]
            counts[places[-1]] = seen, held - 1


EMPTY = _Table(1)
