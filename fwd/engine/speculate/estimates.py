"""How often drafts hold, learnt from what was committed, whoever had drafted it."""

from collections.abc import Mapping, Sequence

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
            if held := each.resolved(request):
                self._common.observe(each.key, held)
                own.observe(each.key, held)
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
        self.done = False

    def resolved(self, request: Request) -> Sequence[tuple[int, bool]]:
        """The places that the known ids decide and that were not yet: none after the first that did not hold."""
        known = request.ids[self._start + self._place : self._start + len(self._ids)]
        found = []
        for place, (token, draft) in enumerate(zip(known, self._ids[self._place :], strict=False), self._place):
            found.append((place, token == draft))
            if token != draft:
                break
        self._place += len(found)
        self.done = self._place == len(self._ids) or (bool(found) and not found[-1][1])
        return found


Counts = list[tuple[float, float]]  # by place: observations, faded, and how many of them held
NONE: Counts = [(0.0, 0.0)] * (MAX_ROWS - 1)


class _Table:
    """Counts by drafter and level."""

    def __init__(self, memory: int) -> None:
        self._kept = 1 - 1 / memory
        self._counts: dict[Key, Counts] = {}

    def of(self, key: Key) -> Counts:
        return self._counts.get(key, NONE)

    def observe(self, key: Key, places: Sequence[tuple[int, bool]]) -> None:
        if (counts := self._counts.get(key)) is None:
            counts = self._counts[key] = NONE.copy()
        for place, held in places:
            seen, before = counts[place]
            counts[place] = (seen * self._kept + 1, before * self._kept + held)


EMPTY = _Table(1)
