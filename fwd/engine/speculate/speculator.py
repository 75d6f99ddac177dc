"""Drafters, what they have been worth, what steps take, and the controller: who drafts what for the next step."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol, get_args

from fwd.engine.request import Request
from fwd.engine.speculate.accounts import MOST, Accounts, Look, Stream
from fwd.engine.speculate.controller import NO_PICK, Choice, Pick, Prices, Verdict, choose, trial
from fwd.engine.speculate.costs import Costs, Window
from fwd.engine.speculate.drafter import NOTHING, Costly, Drafter, Proposal, Wish
from fwd.engine.speculate.estimates import Estimates
from fwd.engine.speculate.tally import Tally
from fwd.kernels.sizes import MAX_ROWS
from fwd.protocol.values import Drafter as DrafterName
from fwd.protocol.values import DrafterCounts

FREE, COSTLY = 0.25, 0.75  # the first guess at how often drafts hold: what costs must be tried to be known
PLAIN = 4  # of so many steps one without drafts is measured: where neither the last one had any, nor was read along
STALE = 256  # steps that run ahead after which what one waits for the host is less sure
REST = 64  # steps after which what one without drafts takes is looked at again, by two such steps,
DOUBT = 1.1  # where drafts are not thought to give so many times more
FAIR = 0.98  # what each further draft of a request is worth where others could have it


class Kept(Protocol):
    """What drafters remember of other requests."""

    @property
    def tokens(self) -> int:
        """Ids in it."""
        ...

    def drop(self) -> int:
        """Forget them, in memory and on disk: how many there were."""
        ...


class JointSpeculator:
    """Lets the controller choose among drafters, of which one may be costly.

    What drafting takes and does not bring is a small share of the time of steps (`Accounts`): a request that cannot pay
    sleeps, so it runs ahead. The free drafters are scored on what others have drafted too.

    A request that names a drafter is drafted for by that one alone, whatever it costs; if it says how much as well, by
    so much wherever there is as much. `ahead`: the runner need not wait for a step to be read unless there are drafts.
    `clock` gives seconds. `names` are those that a request may name.
    """

    def __init__(
        self,
        free: Sequence[Drafter],
        costly: Costly | None = None,
        *,
        ahead: bool,
        corpus: Kept | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._free, self._costly, self._ahead, self._corpus, self._clock = free, costly, ahead, corpus, clock
        self._drafters = [*free, *([costly] if costly else [])]
        self.names = tuple(drafter.name for drafter in self._drafters if drafter.name in get_args(DrafterName))
        self._estimates = Estimates({costly.name: COSTLY} if costly else {}, FREE)
        self._steps, self._drafting = Costs(), Costs(unknown=0.0)
        self._gap, self._draft_gap = Window(), Window()  # what steps without drafts and with such wait for the host
        self._accounts = Accounts(costly, self._steps, self._drafting, self.names)
        self._tallies = {drafter.name: Tally() for drafter in self._drafters}
        self._making = 0.0  # seconds that the costly drafter took for the next step
        self._case: object = None  # that was decided last
        self._decision = Verdict([], 0.0)
        self._rows = 1  # of the last step, without drafts
        self._read = 0.0  # when it was read; 0: it is long ago
        self._count = 0  # steps that were measured
        self._drafted = False  # the last step had drafts
        self._plain = 0  # the last one that was learnt from and had none

    def drafts(self, request: Request) -> bool:
        """Whether the request may have drafts in its next step, which then must wait for the one before it.

        While a step is in flight its last id is not among those that are known: then what may follow them decides.
        """
        stream = self._accounts.stream(request)
        if stream.exact or not stream.bound:
            return stream.exact > 0
        unknown = not self._drafted and not self._steps.knows(self._rows)  # what drafts are compared with comes first
        if unknown or self._rows >= MAX_ROWS or not self._accounts.awake(stream):
            return False
        begun = self._clock()
        promising = self._promises(stream)
        self._accounts.looked([stream], self._clock() - begun)
        return promising

    def propose(self, wishes: Sequence[Wish], rows: int) -> list[Proposal]:
        """Return drafts for requests all of whose ids but one are computed, for a step that has `rows` rows already."""
        begun = self._clock()
        streams = [self._accounts.stream(wish.request) for wish in wishes]
        picks = self._picks(wishes, streams, rows)
        proposals = [self._cut(stream, pick) for stream, pick in zip(streams, picks, strict=True)]
        costly = [place for place, pick in enumerate(picks) if self._costly and pick.drafter == self._costly.name]
        if costly:
            asked = [Wish(wishes[place].request, picks[place].drafts) for place in costly]
            for place, proposal in zip(costly, self._made(asked), strict=True):
                proposals[place] = proposal
        self._accounts.looked(streams, self._clock() - begun - self._making)
        return proposals

    def settle(self, request: Request, proposal: Proposal, count: int) -> None:
        """The last `count` ids of a request were committed in a step with a proposal, of which `count` − 1 held."""
        if proposal.ids:
            self._tallies.setdefault(proposal.drafter, Tally()).add(len(proposal.ids), count - 1)
            self._accounts.settle(request, proposal, count - 1)

    def measured(self, rows: int, drafts: int, seconds: float) -> None:
        """A decode step of so many rows took so long, from its launch or from when the one before it was read.

        Of these rows `drafts` were for drafts.
        """
        now = self._clock()
        gap = now - seconds - self._read - self._making
        self._accounts.step(rows, drafts, seconds, self._waiting if drafts else 0.0)
        self._count += 1
        regular = self._count % PLAIN == 0
        read = regular and self._accounts.read_along()
        if drafts:
            self._learn(rows, seconds, self._draft_gap, gap)
        elif not self._steps.knows(rows) or ((regular or self._rests) and not read and not self._drafted):
            self._learn(rows, seconds, self._gap, gap)
            self._plain = self._count
        if self._count % STALE == 0:  # lest nobody drafts for ever because the host was busy once
            self._draft_gap.forgotten(self._count - STALE)
        self._read, self._rows, self._drafted = now, max(1, rows - drafts), drafts > 0
        self._making = 0.0

    def paused(self) -> None:
        """What comes next is no decode step: what passes until the one after it is not waited for the host."""
        self._read = 0.0

    def end(self, request: Request) -> None:
        """The request has ended."""
        self._accounts.end(request)
        self._estimates.end(request)
        for drafter in self._drafters:
            drafter.end(request)

    def counts(self) -> list[DrafterCounts]:
        """What each drafter has done so far."""
        return [tally.told(name) for name, tally in self._tallies.items()]

    @property
    def corpus_tokens(self) -> int:
        """Ids of earlier answers that drafters look into."""
        return self._corpus.tokens if self._corpus else 0

    def drop(self) -> int:
        """Forget them: how many there were."""
        return self._corpus.drop() if self._corpus else 0

    def _promises(self, stream: Stream) -> bool:
        look = self._look(stream)
        if not self._ahead or not look.choices:
            return bool(look.choices)
        return self._decide([Wish(stream.request, MOST)], [stream], self._rows).picks[0].drafts > 0

    def _look(self, stream: Stream) -> Look:
        if stream.look.length != stream.request.length:
            stream.look = self._looked(stream)
        return stream.look

    def _looked(self, stream: Stream) -> Look:
        """Ask the free drafters, and see what theirs and others' drafts may be worth."""
        request, most = stream.request, min(stream.bound, stream.request.room)
        self._estimates.learn(request)
        if most <= 0:
            return Look(request.length, (), ())
        asked = [drafter for drafter in self._free if stream.free and stream.asks(drafter)]
        found = [made for drafter in asked if (made := self._timed(drafter, [Wish(request, most)])[0]).ids]
        for made in found:
            self._estimates.watch(request, made)
        choices = [Choice(made.drafter, self._estimates.survival(request, made.key, len(made.ids))) for made in found]
        if self._costly and stream.costly and not stream.left and stream.asks(self._costly):
            name = self._costly.name
            choices.append(Choice(name, self._estimates.survival(request, (name, 0), most), costly=True))
        return Look(request.length, found, choices)

    def _picks(self, wishes: Sequence[Wish], streams: Sequence[Stream], rows: int) -> list[Pick]:
        """Who drafts how much: those who say so first, then whom it pays for, else perhaps a trial."""
        picks = self._exact_picks(wishes, streams, MAX_ROWS - rows)
        rows += sum(pick.drafts for pick in picks.values())
        if rest := [place for place in range(len(wishes)) if place not in picks]:
            found = self._decide([wishes[place] for place in rest], [streams[place] for place in rest], rows)
            if found.trial >= 0:
                self._accounts.tries(streams[rest[found.trial]], found.rate)
            picks |= zip(rest, found.picks, strict=True)
        return [picks[place] for place in range(len(wishes))]

    def _exact_picks(self, wishes: Sequence[Wish], streams: Sequence[Stream], spare: int) -> dict[int, Pick]:
        """Drafts for those who say how many they want, by their places; where rows lack all have the same share."""
        exact = [place for place, stream in enumerate(streams) if stream.exact]
        picks: dict[int, Pick] = {}
        for left, place in zip(range(len(exact), 0, -1), exact, strict=True):
            choices = self._look(streams[place]).choices
            most = min(spare // left, wishes[place].most, streams[place].exact) if choices else 0
            pick = Pick(choices[0].drafter, min(most, len(choices[0].survival))) if most else NO_PICK
            spare -= pick.drafts
            picks[place] = pick
        return picks

    def _decide(self, wishes: Sequence[Wish], streams: Sequence[Stream], rows: int) -> Verdict:
        """What is best, or a trial that may be made instead: once for what is asked twice."""
        looks = [self._look(stream) for stream in streams]
        mosts = [min(wish.most, look.most) for wish, look in zip(wishes, looks, strict=True)]
        case = (rows, [(wish.request.id, wish.request.length) for wish in wishes], mosts)
        if self._case != case:
            worth = FAIR if len(wishes) > 1 else 1.0
            choices = [_up_to(most, look.choices, worth) for most, look in zip(mosts, looks, strict=True)]
            self._case, self._decision = case, self._decided(choices, streams, rows)
        return self._decision

    def _decided(self, choices: Sequence[Sequence[Choice]], streams: Sequence[Stream], rows: int) -> Verdict:
        prices = self._prices(streams)
        verdict = choose(choices, rows, prices)
        if self._rests and verdict.rate < DOUBT * rows / (prices.steps.seconds(rows) + prices.always):
            return Verdict([NO_PICK] * len(choices), verdict.rate)
        if self._costly and all(pick.drafter != self._costly.name for pick in verdict.picks):
            for place, each in enumerate(choices):
                tried = trial(each, rows, prices, verdict.rate, self._accounts.stake(streams[place]))
                if tried.drafts:
                    return Verdict(
                        [tried if at == place else NO_PICK for at in range(len(choices))], verdict.rate, place
                    )
        return verdict

    def _prices(self, streams: Sequence[Stream]) -> Prices:
        locks = any(locked(stream.request) for stream in streams)
        waits = (self._draft_gap.median, 0.0) if locks else (self._gap.median, self._waiting)
        return Prices(self._steps, self._drafting, *waits)

    @property
    def _rests(self) -> bool:
        """It is long ago that a step without drafts came after another one."""
        return self._count - self._plain > REST

    @property
    def _waiting(self) -> float:
        """How much longer a step waits for the host if it has drafts."""
        return max(0.0, self._draft_gap.median - self._gap.median)

    def _learn(self, rows: int, seconds: float, gaps: Window, gap: float) -> None:
        """What a step took and, unless it was the first for long, waited for the host."""
        self._steps.measured(rows, seconds)
        if self._read:
            gaps.add(max(0.0, gap), self._count)

    def _cut(self, stream: Stream, pick: Pick) -> Proposal:
        """So much of what a free drafter has said."""
        for proposal in self._look(stream).proposals:
            if proposal.drafter == pick.drafter:
                return proposal._replace(ids=proposal.ids[: pick.drafts]) if pick.drafts else NOTHING
        return NOTHING

    def _made(self, wishes: Sequence[Wish]) -> list[Proposal]:
        """What the costly drafter makes; a request for which it has nothing is left."""
        assert self._costly
        begun, longest = self._clock(), max(wish.most for wish in wishes)
        proposals = self._timed(self._costly, wishes)
        self._making = self._clock() - begun
        if any(proposal.ids for proposal in proposals):
            self._drafting.measured(longest, self._making)
        made = [(wish.request, proposal) for wish, proposal in zip(wishes, proposals, strict=True)]
        for request, proposal in made:
            self._estimates.watch(request, proposal._replace(level=0))
        self._accounts.made(made, longest)
        return proposals

    def _timed(self, drafter: Drafter, wishes: Sequence[Wish]) -> list[Proposal]:
        begun = self._clock()
        proposals = drafter.propose(wishes)
        self._tallies[drafter.name].seconds += self._clock() - begun
        return proposals


def locked(request: Request) -> bool:
    """The request cannot be run ahead anyway: what it may say next depends on what it has said."""
    return bool(request.submit.grammar)


def _up_to(most: int, choices: Sequence[Choice], worth: float) -> list[Choice]:
    """The choices for at most so many drafts, each of them being `worth` so much of the one before it."""
    if worth == 1.0:
        return [choice._replace(survival=choice.survival[:most]) for choice in choices]
    return [
        choice._replace(survival=[chance * worth**place for place, chance in enumerate(choice.survival[:most])])
        for choice in choices
    ]
