"""Texts that never were, with what drafters would guess of them, and a GPU that takes as long as it is said to.

A trace says for each place of an answer how many drafts of each drafter would hold from there on. Where the answer
repeats an earlier text the suffix drafter is right to the end of the repetition; a neural drafter is right as often as
its acceptances by place say.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fwd.engine.request import Request
from fwd.engine.speculate.drafter import NOTHING, Proposal, Speculator, Wish
from fwd.kernels.sizes import MAX_ROWS
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Draft, Limits

MOST = MAX_ROWS - 1
ANY = Draft()
WRONG = 1 << 24  # added to an id: no place has it


class Kind(NamedTuple):
    """What is written: how often a repetition begins, how long they are on average, how often a match misleads.

    `neural` are the chances that a draft holds once those before it have, at the first place and at the last.
    """

    begins: float
    length: float
    misleads: float
    neural: tuple[float, float]


class Place(NamedTuple):
    """What would be drafted at a place: the level of the match (−1: none), and how many drafts would hold of each."""

    level: int
    suffix: int
    neural: int


Trace = Sequence[Place]


def written(parts: Sequence[tuple[Kind, int]], seed: int) -> Trace:
    """A text of so many places of each kind, one after the other."""
    random = np.random.default_rng(seed)
    return [place for kind, count in parts for place in _places(kind, count, random)]


def _places(kind: Kind, count: int, random: np.random.Generator) -> Iterator[Place]:
    left = matched = 0
    rates = np.linspace(*kind.neural, MOST)
    for _ in range(count):
        failed = np.flatnonzero(random.random(MOST) >= rates)
        neural = int(failed[0]) if len(failed) else MOST
        if left:
            left, matched = left - 1, matched + 1
            yield Place(1 + min(matched, 32).bit_length(), min(left, MOST), neural)
            continue
        matched = 0
        left = int(random.geometric(1 / kind.length)) if random.random() < kind.begins else 0
        yield Place(1 if random.random() < kind.misleads else -1, 0, neural)


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the seconds so far."""
        return self.now


class Machine(NamedTuple):
    """`step(rows)` and `draft(count)` in seconds; `gap` is what a step waits for the host when it cannot run ahead."""

    step: Callable[[int], float]
    draft: Callable[[int], float]
    gap: float


class Guesses:
    """Drafts as traces have them, by request."""

    def __init__(self, name: str, traces: dict[int, Trace], *, free: bool, clock: Clock, machine: Machine) -> None:
        self.name, self.free = name, free
        self._traces, self._clock, self._machine = traces, clock, machine

    def propose(self, wishes: Sequence[Wish]) -> list[Proposal]:
        """Take as long as the machine takes for drafts."""
        if not self.free:
            self._clock.now += self._machine.draft(max(wish.most for wish in wishes))
        return [self._guess(wish) for wish in wishes]

    def end(self, request: Request) -> None:
        """Nothing is kept."""

    def read(self) -> Sequence[int]:
        """It knows all there is."""
        return ()

    def _guess(self, wish: Wish) -> Proposal:
        start = wish.request.length
        place = self._traces[wish.request.id][start - 1]
        level, held = (place.level, place.suffix) if self.free else (0, place.neural)
        if level < 0:
            return NOTHING
        return Proposal(self.name, tuple(start + at + WRONG * (at >= held) for at in range(wish.most)), level)


def request_of(number: int, trace: Trace, draft: Draft = ANY) -> Request:
    """A request whose answer has its places for ids; it has one id of prompt and is computed up to the first draw."""
    limits = Limits(max_tokens=len(trace) - 1)
    request = Request(Submit(id=number, prompt=pack_ids([0]), limits=limits, draft=draft))
    request.append([1])
    request.advance(1)
    return request


def run(speculator: Speculator, requests: Sequence[Request], machine: Machine, clock: Clock) -> float:
    """Tokens a second until the first of the requests has ended, with steps in the order in which the loop has them."""
    begun, first = clock.now, sum(request.length for request in requests)
    while all(request.length < request.limit for request in requests):
        clock.now += machine.gap
        drafting = [each for each in requests if each.room > 0 and speculator.drafts(each)]
        wishes = [Wish(each, min(each.room, MAX_ROWS - len(requests))) for each in drafting]
        made = speculator.propose(wishes, len(requests)) if wishes else []
        proposals = {wish.request.id: proposal for wish, proposal in zip(wishes, made, strict=True)}
        if not any(proposal.ids for proposal in made):
            while not _ended(requests, 2) and not any(map(speculator.drafts, requests)):
                _step(speculator, requests, {}, machine, clock)
        _step(speculator, requests, proposals, machine, clock)
    return (sum(request.length for request in requests) - first) / (clock.now - begun)


def _ended(requests: Sequence[Request], left: int) -> bool:
    return any(request.limit - request.length < left for request in requests)


def _step(
    speculator: Speculator, requests: Sequence[Request], proposals: dict[int, Proposal], machine: Machine, clock: Clock
) -> None:
    drafts = sum(len(proposal.ids) for proposal in proposals.values())
    seconds = machine.step(len(requests) + drafts)
    clock.now += seconds
    speculator.measured(len(requests) + drafts, drafts, seconds)
    for request in requests:
        proposal = proposals.get(request.id, NOTHING)
        held = next((at for at, token in enumerate(proposal.ids) if token >= WRONG), len(proposal.ids))
        start = request.length
        request.ids.extend(array("i", range(start, min(start + held + 1, request.limit))))
        request.advance(request.length - 1)
        speculator.settle(request, proposal, request.length - start)


def fixed(trace: Trace, machine: Machine, *, free: bool, count: int) -> float:
    """Tokens a second with `count` drafts of one drafter wherever it has any; 0 runs ahead."""
    at, seconds = 1, 0.0
    while at < len(trace) - 1:
        place = trace[at]
        drafts = min(count, len(trace) - 2 - at) if not free or place.level >= 0 else 0
        seconds += machine.step(1 + drafts) + machine.gap * (count > 0) + (0 if free else machine.draft(drafts))
        at += 1 + min(place.suffix if free else place.neural, drafts)
    return (at - 1) / seconds
