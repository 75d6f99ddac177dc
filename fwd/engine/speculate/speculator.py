"""Drafters, what they have been worth, what steps take, and the controller: who drafts what for the next step."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, get_args

from fwd.engine.request import Request
from fwd.engine.speculate.controller import NO_PICK, Choice, Pick, Prices, choose
from fwd.engine.speculate.costs import Costs, Window
from fwd.engine.speculate.drafter import NOTHING, Drafter, Proposal, Wish
from fwd.engine.speculate.estimates import Estimates
from fwd.engine.speculate.tally import Tally
from fwd.engine.speculate.trials import Trial, Trials
from fwd.kernels.sizes import MAX_ROWS
from fwd.protocol.values import Drafter as DrafterName
from fwd.protocol.values import DrafterCounts

MOST = MAX_ROWS - 1  # drafts of a step
FREE, COSTLY = 0.25, 0.75  # the first guess at how often drafts hold: what costs must be tried to be known
SILENT = 64  # ids after which a costly drafter that had nothing to say is asked again
STALE = 256  # steps that run ahead after which what one waits for the host is less sure
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


class Look(NamedTuple):
    """What may be drafted after `length` known ids of a request."""

    length: int
    proposals: Sequence[Proposal]  # of the free drafters
    choices: Sequence[Choice]  # of all

    @property
    def most(self) -> int:
        """The most that any of them has."""
        return max((len(choice.survival) for choice in self.choices), default=0)


class Decision(NamedTuple):
    """What gives most ids a second, and how many; `trial` is for the request at `place`, in place of all that."""

    picks: list[Pick]
    rate: float
    trial: Trial | None = None
    place: int = 0


class JointSpeculator:
    """Lets the controller choose among drafters, of which one may be costly; the free ones are asked at each step.

    A request that names a drafter is drafted for by that one alone; if it says how much as well, by so much wherever
    there is as much. `ahead`: the runner need not wait for a step to be read unless there are drafts. `clock` gives
    seconds. `names` are those that a request may name.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        *,
        ahead: bool,
        corpus: Kept | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._drafters, self._ahead, self._corpus, self._clock = drafters, ahead, corpus, clock
        self.names = tuple(drafter.name for drafter in drafters if drafter.name in get_args(DrafterName))
        self._free = [drafter for drafter in drafters if drafter.free]
        self._costly = next((drafter for drafter in drafters if not drafter.free), None)
        assert len(drafters) - len(self._free) <= 1
        self._estimates = Estimates({self._costly.name: COSTLY} if self._costly else {}, FREE)
        self._steps, self._drafting, self._gap = Costs(), Costs(unknown=0.0), Window()
        self._looks: dict[int, Look] = {}
        self._silent: dict[int, int] = {}  # where the costly drafter is asked again that had nothing to say
        self._tallies = {drafter.name: Tally() for drafter in drafters}
        self._trials = Trials()
        self._step = _Step()
        self._case: object = None  # that was decided last
        self._decision = Decision([], 0.0)
        self._rows = 1  # of the last step, without drafts
        self._read = 0.0  # when it was read; 0: it is long ago
        self._count = 0  # steps that were measured

    def drafts(self, request: Request) -> bool:
        """Whether the request may have drafts in its next step, which then must wait for the one before it.

        While a step is in flight its last id is not among those that are known: then what may follow them decides.
        """
        look = self._look(request)
        if not look.choices:
            return self._exact(request) > 0
        if self._exact(request) or not self._ahead:
            return True
        decision = self._decide([Wish(request, MOST)], self._rows)
        return decision.trial is not None or decision.picks[0].drafts > 0

    def propose(self, wishes: Sequence[Wish], rows: int) -> list[Proposal]:
        """Return drafts for requests all of whose ids but one are computed, for a step that has `rows` rows already."""
        picks = self._picks(wishes, rows)
        proposals = [self._cut(wish, pick) for wish, pick in zip(wishes, picks, strict=True)]
        costly = [place for place, pick in enumerate(picks) if self._costly and pick.drafter == self._costly.name]
        if costly:
            asked = [Wish(wishes[place].request, picks[place].drafts) for place in costly]
            for place, proposal in zip(costly, self._made(asked), strict=True):
                proposals[place] = proposal
        self._step.drafts = sum(len(proposal.ids) for proposal in proposals)
        return proposals

    def settle(self, request: Request, proposal: Proposal, count: int) -> None:
        """The last `count` ids of a request were committed in a step with a proposal, of which `count` − 1 held."""
        if proposal.ids:
            self._tallies.setdefault(proposal.drafter, Tally()).add(len(proposal.ids), count - 1)
        self._trials.settle(request, count - 1)
        self._estimates.learn(request)

    def measured(self, rows: int, seconds: float) -> None:
        """A decode step of so many rows took so long, from its launch or from when the one before it was read."""
        now, step = self._clock(), self._step
        self._steps.measured(rows, seconds)
        self._count += 1
        if self._read and (step.drafts or not self._ahead):
            self._gap.add(now - seconds - self._read - step.seconds, self._count)
        elif self._count % STALE == 0:  # lest nobody drafts for ever because the host was busy once
            self._gap.forgotten(self._count - STALE)
        if not step.seconds:
            self._trials.save(seconds)
        self._read, self._rows, self._step = now, max(1, rows - step.drafts), _Step()

    def paused(self) -> None:
        """What comes next is no decode step: what passes until the one after it is not waited for the host."""
        self._read = 0.0

    def end(self, request: Request) -> None:
        """The request has ended."""
        self._looks.pop(request.id, None)
        self._silent.pop(request.id, None)
        self._trials.settle(request, 0)
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

    def _asked(self, request: Request, drafter: Drafter) -> bool:
        return request.submit.draft.drafter in {"auto", drafter.name}

    def _exact(self, request: Request) -> int:
        """How many drafts the request wants in each step, 0 where that is for the controller to say."""
        draft = request.submit.draft
        return min(max(0, draft.max_draft), MOST) if draft.drafter in self.names else 0

    def _look(self, request: Request) -> Look:
        look = self._looks.get(request.id)
        if look is None or look.length != request.length:
            look = self._looks[request.id] = self._looked(request)
        return look

    def _looked(self, request: Request) -> Look:
        """Ask the free drafters, and see what theirs and others' drafts may be worth."""
        wanted = request.submit.draft.max_draft
        most = min(MOST, request.room, MOST if wanted < 0 else wanted)
        if most <= 0:
            return Look(request.length, (), ())
        asked = [drafter for drafter in self._free if self._asked(request, drafter)]
        proposals = [self._timed(drafter, [Wish(request, most)])[0] for drafter in asked]
        found = [made for made in proposals if made.ids]
        for made in found:
            self._estimates.watch(request, made)
        choices = [Choice(made.drafter, self._estimates.survival(request, made.key, len(made.ids))) for made in found]
        silent = self._silent.get(request.id, 0) > request.length
        if self._costly and self._asked(request, self._costly) and not silent:
            name = self._costly.name
            choices.append(Choice(name, self._estimates.survival(request, (name, 0), most), costly=True))
        return Look(request.length, found, choices)

    def _picks(self, wishes: Sequence[Wish], rows: int) -> list[Pick]:
        """Who drafts how much: those who say so first, then whom it pays for, else perhaps a trial."""
        picks = self._exact_picks(wishes, MAX_ROWS - rows)
        rows += sum(pick.drafts for pick in picks.values())
        rest = [place for place in range(len(wishes)) if place not in picks]
        if rest:
            picks |= zip(rest, self._best([wishes[place] for place in rest], rows), strict=True)
        return [picks[place] for place in range(len(wishes))]

    def _exact_picks(self, wishes: Sequence[Wish], spare: int) -> dict[int, Pick]:
        """Drafts for those who say how many they want, by their places; where rows lack all have the same share."""
        wanted = {place: self._exact(wish.request) for place, wish in enumerate(wishes)}
        exact = [place for place, count in wanted.items() if count]
        picks: dict[int, Pick] = {}
        for left, place in zip(range(len(exact), 0, -1), exact, strict=True):
            choices = self._look(wishes[place].request).choices
            most = min(spare // left, wishes[place].most, wanted[place])
            pick = Pick(choices[0].drafter, min(most, len(choices[0].survival))) if choices else NO_PICK
            spare -= pick.drafts
            picks[place] = pick
        return picks

    def _best(self, wishes: Sequence[Wish], rows: int) -> list[Pick]:
        decision = self._decide(wishes, rows)
        if decision.trial is None:
            return decision.picks
        self._trials.stake(wishes[decision.place].request, decision.trial, decision.rate)
        return [decision.trial.pick if place == decision.place else NO_PICK for place in range(len(wishes))]

    def _decide(self, wishes: Sequence[Wish], rows: int) -> Decision:
        """What is best, and the trial that may be made instead: once for what is asked twice."""
        looks = [self._look(wish.request) for wish in wishes]
        mosts = [min(wish.most, look.most) for wish, look in zip(wishes, looks, strict=True)]
        case = (rows, [(wish.request.id, wish.request.length) for wish in wishes], mosts)
        if self._case != case:
            worth = FAIR if len(wishes) > 1 else 1.0
            choices = [_up_to(most, look.choices, worth) for most, look in zip(mosts, looks, strict=True)]
            self._case, self._decision = case, self._decision_on(choices, [wish.request for wish in wishes], rows)
        return self._decision

    def _decision_on(self, choices: Sequence[Sequence[Choice]], requests: Sequence[Request], rows: int) -> Decision:
        prices = self._prices(requests)
        verdict = choose(choices, rows, prices)
        if self._costly and all(pick.drafter != self._costly.name for pick in verdict.picks):
            for place, each in enumerate(choices):
                if trial := self._trials.affords(each, rows, prices, verdict.rate):
                    return Decision(verdict.picks, verdict.rate, trial, place)
        return Decision(verdict.picks, verdict.rate)

    def _prices(self, requests: Sequence[Request]) -> Prices:
        gap = max(0.0, self._gap.median)
        waits = not self._ahead or any(map(locked, requests))
        return Prices(self._steps, self._drafting, *((gap, 0.0) if waits else (0.0, gap)))

    def _cut(self, wish: Wish, pick: Pick) -> Proposal:
        """So much of what a free drafter has said."""
        for proposal in self._look(wish.request).proposals:
            if proposal.drafter == pick.drafter:
                return proposal._replace(ids=proposal.ids[: pick.drafts]) if pick.drafts else NOTHING
        return NOTHING

    def _made(self, wishes: Sequence[Wish]) -> list[Proposal]:
        """What the costly drafter makes."""
        assert self._costly
        begun = self._clock()
        proposals = self._timed(self._costly, wishes)
        self._step.seconds = self._clock() - begun
        if any(proposal.ids for proposal in proposals):
            self._drafting.measured(max(wish.most for wish in wishes), self._step.seconds)
        for (request, _), proposal in zip(wishes, proposals, strict=True):
            if proposal.ids:
                self._estimates.watch(request, proposal._replace(level=0))
            else:
                self._silent[request.id] = request.length + SILENT
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
    return [
        choice._replace(survival=[chance * worth**place for place, chance in enumerate(choice.survival[:most])])
        for choice in choices
    ]


class _Step:
    """What the next step has: drafts, and the seconds that the costly drafter took for them."""

    def __init__(self) -> None:
        self.drafts = 0
        self.seconds = 0.0
