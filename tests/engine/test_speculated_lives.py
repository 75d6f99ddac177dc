"""Same seed, same bytes, whoever drafts and however much: random lives under the speculator that serves, with drafters
that are right, wrong and both, wishes of all kinds, and steps that take whatever they take."""

import itertools
import random
from collections import Counter

import pytest
from guesser import NATURES
from mock_engine import PAGE, Engine
from mock_runner import VOCAB, next_token
from msgspec.structs import replace
from test_lives import LAYOUTS, World, units_of

from fwd.engine.speculate.drafter import NOTHING, Proposal
from fwd.engine.speculate.speculator import MOST, JointSpeculator
from fwd.kernels.sizes import MAX_ROWS
from fwd.protocol.messages import Ping, Pong, Submit
from fwd.protocol.values import Draft

NAMES = ("suffix", "grammar", "mtp")


class Mock:
    """A drafter of some nature, which now and then has nothing to say; the costly one is asked when it is wanted."""

    def __init__(self, rng, name, nature):
        self.rng, self.name, self.nature = rng, name, nature
        self.ended = set()

    def propose(self, wishes):
        return [self.guess(*wish) for wish in wishes]

    def guess(self, request, most):
        assert 0 < most <= min(MOST, request.room)
        assert request.submit.draft.drafter in {"auto", self.name}
        if self.rng.random() < 0.2:
            return NOTHING
        ids = list(request.ids)
        for _ in range(self.rng.randrange(1, most + 1)):
            right = next_token(ids, request.submit.seed, request.submit.choice)
            ids.append(right if self.right(len(ids)) else (right + 1) % VOCAB)
        return Proposal(self.name, tuple(ids[request.length :]), self.rng.randrange(3))

    def right(self, position):
        chances = {"oracle": 1.0, "liar": 0.0, "fool": 0.8}
        return self.rng.random() < chances.get(self.nature, position % PAGE != 0)

    def end(self, request):
        self.ended.add(request.id)

    def read(self):
        return ()


class Checked(JointSpeculator):
    """Every proposal is one that the scheduler may be given; times are drawn, so that a seed says everything."""

    def __init__(self, rng, drafters, *, ahead):
        ticks, tick = itertools.count(), rng.choice([1e-6, 1e-6, 1e-3])  # of the clock: looking is cheap, or dear
        costly = next((each for each in drafters if each.name == "mtp"), None)
        free = [each for each in drafters if each is not costly]
        super().__init__(free, costly, ahead=ahead, clock=lambda: next(ticks) * tick)
        self.rng, self.cost = rng, rng.choice([0.0, 0.02, 1.0])

    def propose(self, wishes, rows):
        proposals = super().propose(wishes, rows)
        assert len(proposals) == len(wishes)
        assert rows + sum(len(proposal.ids) for proposal in proposals) <= MAX_ROWS
        for (request, most), proposal in zip(wishes, proposals, strict=True):
            wanted = request.submit.draft
            assert len(proposal.ids) <= most
            assert proposal == NOTHING or wanted.drafter in {"auto", proposal.drafter}
            assert wanted.max_draft < 0 or len(proposal.ids) <= wanted.max_draft
        return proposals

    def measured(self, rows, drafts, seconds):
        assert 0 <= drafts < rows
        assert seconds >= 0
        super().measured(rows, drafts, 1e-3 * (1 + self.cost * rows) * self.rng.choice([1, 1, 1, 1, 30]))


class Wishing(Engine):
    """Requests come with the wishes that `wish` has for them."""

    def handle(self, *messages):
        super().handle(*(self.wished(each) if isinstance(each, Submit) else each for each in messages))

    def wished(self, submit):
        return replace(submit, draft=self.wish(submit.id))


class Drafted(World):
    def __init__(self, rng, layout, ahead):
        self.accepted = Counter()
        super().__init__(rng, layout, ahead)

    def start(self):
        rng = self.rng
        units = units_of(self.groups, self.full, self.seqs, self.spare)
        drafters = [Mock(rng, name, rng.choice(NATURES)) for name in NAMES if rng.random() < 0.8]
        speculator = Checked(rng, drafters, ahead=self.ahead)
        self.engine = Wishing(self.groups, units, self.seqs, ahead=self.ahead, speculator=speculator)
        self.engine.wish = self.wish

    def wish(self, number):
        """One for each request, for all its lives."""
        rng = random.Random(f"{number} {self.full}")
        drafter = rng.choice(["auto", "auto", "auto", "off", "suffix", "mtp", "eagle"])
        return Draft(drafter=drafter, max_draft=rng.choice([-1, -1, 0, 1, 3, 15, 64]))

    def ping(self):
        self.engine.handle(Ping(seq=1))
        (pong,) = [message for message in self.engine.messages if isinstance(message, Pong)][-1:]
        for counts in pong.drafters:
            assert counts.accepted == sum(counts.places) <= counts.drafted

    def check_drafts(self, result):
        drafted, accepted = result.timing.drafted, result.timing.accepted
        assert set(drafted) == set(accepted) <= set(NAMES)
        assert all(accepted[name] <= drafted[name] for name in drafted)
        assert sum(held * steps for held, steps in enumerate(result.timing.holds)) == sum(accepted.values())
        assert sum(result.timing.holds) <= min(result.timing.steps, sum(drafted.values()))
        self.accepted.update(accepted)

    def finish(self):
        super().finish()
        speculator = self.engine.loop._speculator
        accounts, estimates = speculator._accounts, speculator._estimates
        kept = (accounts.streams, *(purse._spent for purse in accounts._purses), estimates._own, estimates._watched)
        assert not any(kept)


def live(seed, layout, events=60):
    rng = random.Random(f"speculated {seed} {layout}")
    world = Drafted(rng, layout, ahead=seed % 2 == 0)
    actions = [world.step] * 30 + [world.submit] * 6 + [world.cancel, world.evict, world.evict, world.ping]
    for _ in range(events):
        world.crash() if rng.random() < 0.01 else rng.choice(actions)()
    world.finish()
    return world.accepted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_drafter_and_no_wish_changes_an_answer(layout):
    accepted = sum(sum(live(seed, layout).values()) for seed in range(40))
    assert accepted > 1000


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_thousands_of_speculated_lives(layout):
    for seed in range(1000, 3000):
        live(seed, layout, events=80)
