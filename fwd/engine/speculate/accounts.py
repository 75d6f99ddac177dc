"""Requests as the speculator sees them, and what drafting for them may cost."""

from collections.abc import Sequence
from typing import NamedTuple

from fwd.engine.request import Request
from fwd.engine.speculate.controller import Choice
from fwd.engine.speculate.costs import Costs
from fwd.engine.speculate.drafter import Costly, Drafter, Proposal
from fwd.engine.speculate.purse import Past, Purse
from fwd.kernels.sizes import MAX_ROWS

MOST = MAX_ROWS - 1  # drafts of a step
SHARE = 0.005  # of the time of steps may be spent on asking the free drafters and on choosing,
COSTLY_SHARE, COSTLY_DEBT = 0.005, 1.0  # on the costly one, which may owe a step, and on trials of it
START, DEBT = 0.25, 0.03  # steps: a few looks, and who owes has paid it after 6 ids
COMMON, COSTLY_COMMON, TRIAL_COMMON = 0.5, 1.0, 0.5  # steps put by for whoever comes next,
SAVED, COSTLY_SAVED, TRIAL_SAVED = 8.0, 4.0, 2.0  # and by a request for itself: many looks, misses and trials
FULL = 0.9  # of `COSTLY_COMMON` let a new request be read along, however much of a step a draft takes
LATE = 4  # times as long as usual is what a look counts for at most: it may have been held up
WEIGHT = 1 / 16  # of the latest in what a look takes


class Look(NamedTuple):
    """What may be drafted after `length` known ids of a request."""

    length: int
    proposals: Sequence[Proposal]  # of the free drafters
    choices: Sequence[Choice]  # of all

    @property
    def most(self) -> int:
        """The most that any of them has."""
        return max((len(choice.survival) for choice in self.choices), default=0)


NO_LOOK = Look(-1, (), ())


class Stream:
    """A request and how it wants to be drafted for: `exact` drafts in each step, or up to `bound`.

    `auto`: by whoever pays; `free` and `costly` say who is asked, `payer` what the costly one is paid from, `left` that
    it does not know the request any more.
    """

    __slots__ = ("auto", "bound", "costly", "exact", "free", "left", "look", "payer", "request", "wanted")

    def __init__(self, request: Request, names: Sequence[str], payer: Purse) -> None:
        self.request, self.wanted, most = request, request.submit.draft.drafter, request.submit.draft.max_draft
        self.auto = self.wanted == "auto"
        self.bound = MOST if most < 0 else min(most, MOST)
        self.bound *= self.auto or self.wanted in names
        self.exact = 0 if self.auto or most < 0 else self.bound
        self.free = self.costly = True
        self.left = False
        self.look, self.payer = NO_LOOK, payer

    def asks(self, drafter: Drafter) -> bool:
        """It may be drafted for by that one."""
        return self.auto or self.wanted == drafter.name


class Accounts:
    """Who is looked at, by what drafting takes and brings.

    Whatever it takes is paid from what it saves and a small share of the time of steps, in three purses: asking the
    free drafters and choosing; the costly one where it should pay, its reading along included; and trials of it where
    it does not seem to, or owes. A request that cannot pay sleeps; one that cannot pay for being read along is left by
    the costly drafter.
    """

    def __init__(self, costly: Costly | None, steps: Costs, drafting: Costs, names: Sequence[str]) -> None:
        self._costly, self._steps, self._drafting, self._names = costly, steps, drafting, names
        self._past = past = Past()
        self._looking = Purse(past, SHARE, start=START, most=COMMON, saved=SAVED, debt=DEBT)
        self._made = Purse(past, COSTLY_SHARE, most=COSTLY_COMMON, saved=COSTLY_SAVED, debt=COSTLY_DEBT)
        self._trying = Purse(past, COSTLY_SHARE, most=TRIAL_COMMON, saved=TRIAL_SAVED, full=False)
        self._purses = (self._looking, self._made, self._trying)
        self._look_seconds = 0.0
        self._price = self._worth = 0.0  # of a draft's row in the last step, and of an id
        self._rate = 0.0  # ids a second that a trial in the next step with drafts is in place of
        self.streams: dict[int, Stream] = {}

    def stream(self, request: Request) -> Stream:
        """What is known of a request. The costly drafter leaves a new one that could not pay to be read and tried."""
        stream = self.streams.get(request.id)
        if stream is None:
            stream = self.streams[request.id] = Stream(request, self._names, self._made)
            for purse in self._purses:
                purse.begin(request.id)
            least = min(2 * self._drafting.seconds(1), FULL * COSTLY_COMMON * self._past.worth)
            if stream.auto and self._made.has(request.id) < least:
                self._leave(stream)
        return stream

    def end(self, request: Request) -> None:
        """The request has ended."""
        self.streams.pop(request.id, None)
        for purse in self._purses:
            purse.end(request.id)

    def awake(self, stream: Stream) -> bool:
        """Settle who is asked for a request: whom it can pay. False: nobody."""
        if stream.auto:
            key = stream.request.id
            stream.free = self._looking.has(key) >= self._look_seconds
            stream.payer = self._made if self._made.has(key) >= 0 else self._trying
            stream.costly = not stream.left and (
                stream.payer is self._made or self._trying.has(key) >= self._drafting.seconds(1)
            )
        return stream.free or stream.costly

    def stake(self, stream: Stream) -> float:
        """The seconds that a trial of the costly drafter may lose."""
        return self._trying.has(stream.request.id)

    def tries(self, stream: Stream, rate: float) -> None:
        """A trial is made in the next step, in place of what gives `rate` ids a second."""
        stream.payer, self._rate = self._trying, rate

    def looked(self, streams: Sequence[Stream], seconds: float) -> None:
        """So long it took to look at them."""
        each = seconds / len(streams)
        each = min(each, LATE * self._look_seconds) if self._look_seconds else each
        self._look_seconds += (each - self._look_seconds) * WEIGHT
        for stream in streams:
            if stream.auto:
                (self._looking if stream.free else stream.payer).spend(stream.request.id, each)

    def made(self, proposals: Sequence[tuple[Request, Proposal]], longest: int) -> None:
        """The costly drafter made these; a request for which it had nothing is left."""
        each = self._drafting.seconds(longest) / len(proposals)
        for request, proposal in proposals:
            if (stream := self.streams[request.id]).auto:
                stream.payer.spend(request.id, each)
                if not proposal.ids:
                    self._leave(stream)

    def read_along(self) -> bool:
        """Have requests pay for being read along since it was asked last; whether any was."""
        if not self._costly or not (read := self._costly.read()):
            return False
        each = self._drafting.seconds(1)
        for stream in filter(None, map(self.streams.get, read)):
            if stream.auto:
                self._made.spend(stream.request.id, each)
                if stream.left or self._made.has(stream.request.id) < 0:
                    self._leave(stream)
        return True

    def step(self, rows: int, drafts: int, seconds: float, gap: float) -> None:
        """A step took so long without what its drafts took to be made, and `gap` was waited for them.

        What is paid is what it was thought to take: to find that out is not their fault.
        """
        streams = max(1, rows - drafts)
        first = not self._past.worth
        self._past.add(seconds, streams, self._paying)
        if first:
            self._begin_again()
        if drafts:
            curve = self._steps.curve
            self._worth = 1 / self._rate if self._rate else curve[streams] / streams
            self._price = (curve[rows] + gap - streams * self._worth) / drafts
            self._rate = 0.0

    def settle(self, request: Request, proposal: Proposal, held: int) -> None:
        """Of the drafts of a request in that step so many held."""
        if (stream := self.streams[request.id]).auto:
            made = self._costly is not None and proposal.drafter == self._costly.name
            payer = stream.payer if made else self._looking
            payer.spend(request.id, len(proposal.ids) * self._price - held * self._worth)

    def _begin_again(self) -> None:
        """What requests begin with is known when a step has been measured."""
        for key in self.streams:
            for purse in self._purses:
                purse.begin(key)

    @property
    def _paying(self) -> float:
        """The part of the requests that are drafted for as long as it pays."""
        return sum(stream.auto for stream in self.streams.values()) / max(1, len(self.streams))

    def _leave(self, stream: Stream) -> None:
        stream.left = True
        if self._costly:
            self._costly.end(stream.request)
