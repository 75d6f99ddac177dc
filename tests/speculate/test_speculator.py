"""Drafters under the controller: they are used where they pay, let be where they do not, and tried again."""

import random

import pytest
from traces import Clock, Guesses, Kind, Machine, fixed, request_of, run, written

from fwd.engine.request import Request
from fwd.engine.speculate.costs import ENOUGH
from fwd.engine.speculate.drafter import NOTHING, Proposal, Wish
from fwd.engine.speculate.speculator import MOST, JointSpeculator
from fwd.kernels.sizes import MAX_ROWS
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Draft, Limits

GOOD = Kind(begins=0.5, length=30.0, misleads=0.1, neural=(0.9, 0.85))
BAD = Kind(begins=0.0, length=1.0, misleads=0.9, neural=(0.02, 0.02))
GPU = Machine(step=lambda rows: 1e-3 * (1 + 0.02 * rows), draft=lambda count: 2e-4 * count, gap=5e-5)
SOME = written([(GOOD, 9)], 0)
CPU = Machine(step=lambda rows: 1e-3 * (0.2 + 0.8 * rows), draft=lambda count: 1e-4 * count, gap=5e-5)


class World:
    """Streams of one text each on a machine; `speculator` has both drafters unless told otherwise."""

    def __init__(self, traces, machine=GPU, names=("suffix", "mtp"), draft=None, *, ahead=True):
        self.clock, self.machine = Clock(), machine
        by_request = dict(enumerate(traces, 1))
        self.drafters = [
            Guesses(name, by_request, free=name == "suffix", clock=self.clock, machine=machine) for name in names
        ]
        costly = self.drafters[-1] if names[-1] == "mtp" else None
        self.speculator = JointSpeculator(
            [each for each in self.drafters if each is not costly], costly, ahead=ahead, clock=self.clock
        )
        self.requests = [
            request_of(number, trace, draft[number - 1] if draft else Draft()) for number, trace in by_request.items()
        ]

    def run(self):
        return run(self.speculator, self.requests, self.machine, self.clock)

    def counts(self):
        return {each.name: each for each in self.speculator.counts()}


def test_what_does_not_pay_is_let_be():
    trace = written([(BAD, 4000)], 1)
    for machine in (GPU, CPU):
        world = World([trace], machine)
        assert world.run() >= 0.98 * fixed(trace, machine, free=True, count=0)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_tried_again_and_used_once_it_pays(seed):
    """Off is not for ever: what is lost by trials is bounded, what they find is followed up."""
    world = World([written([(BAD, 3000)], seed)], names=["mtp"])
    world.run()
    before = world.counts()["mtp"]
    late = World([written([(BAD, 3000), (GOOD._replace(begins=0.0), 1000)], seed)], names=["mtp"])
    late.run()
    after = late.counts()["mtp"]
    assert before.accepted < 0.1 * before.drafted
    assert before.drafts < 0.05 * 3000
    assert after.accepted - before.accepted > 500


def test_trials_cost_a_hundredth_at_most():
    trace = written([(BAD._replace(misleads=0.0), 6000)], 4)
    expensive = GPU._replace(draft=lambda count: 2e-3 * count)
    world = World([trace], expensive, names=["mtp"])
    off = fixed(trace, expensive, free=True, count=0)
    assert 0.98 * off <= world.run() < off
    assert world.counts()["mtp"].drafts > 10


def test_where_rows_are_dear_only_sure_drafts_are_tried():
    """Nine in ten hold: on this CPU a draft pays, on one where each row costs as much as the first none does."""
    trace = written([(GOOD, 4000)], 2)
    dear = CPU._replace(step=lambda rows: 1e-3 * rows)
    for machine, least in ((CPU, 1.02), (dear, 0.95)):
        off = 1 / (machine.step(1) + machine.gap)
        assert World([trace], machine, ahead=False).run() > least * off


def test_the_free_drafter_is_judged_without_being_used():
    """While nothing pays it is watched, and what is known of it in the end is what was seen, not used."""
    slow = GPU._replace(step=lambda rows: 1e-3 * rows, gap=2e-3)
    world = World([written([(GOOD, 1500)], 3)], slow, names=["suffix"])
    world.run()
    counts = world.counts()["suffix"]
    request = Request(Submit(id=9, prompt=pack_ids([0])))
    assert counts.drafts < 60
    assert world.speculator._estimates.survival(request, ("suffix", 6), 8)[-1] > 0.97**8 - 0.15
    assert world.speculator._estimates.survival(request, ("suffix", 1), 1)[0] < 0.15


def test_requests_alike_get_alike_and_nobody_stands_still():
    traces = [written([(GOOD, 1500)], seed) for seed in range(3)]
    world = World(traces)
    world.run()
    lengths = [request.length for request in world.requests]
    assert min(lengths) > 0.75 * max(lengths)
    world = World([*traces, written([(BAD, 1500)], 9)])
    steps = [0]
    world.speculator.measured = lambda *step, inner=world.speculator.measured: (steps.append(step), inner(*step))
    world.run()
    assert world.requests[-1].length >= len(steps) - 1, "a token a step, whoever else has drafts"


def asked(draft, count=60, names=("suffix", "mtp"), seed=5):
    """The counts after a run of one request with that wish, and what was proposed at each step."""
    world = World([written([(GOOD, count)], seed)], names=names, draft=[draft])
    seen, propose = [], world.speculator.propose
    world.speculator.propose = lambda wishes, rows: seen.extend(propose(wishes, rows)) or seen[-len(wishes) :]
    world.run()
    return world.counts(), seen


def test_a_named_drafter_is_the_only_one_asked():
    counts, seen = asked(Draft(drafter="mtp"))
    assert {proposal.drafter for proposal in seen} <= {"mtp", ""}
    assert counts["mtp"].drafts > 0 == counts["suffix"].ms
    counts, seen = asked(Draft(drafter="suffix"))
    assert {proposal.drafter for proposal in seen} <= {"suffix", ""}


def test_off_a_bound_of_none_and_a_drafter_that_is_not_there_draft_nothing():
    for draft in (Draft(drafter="off"), Draft(drafter="off", max_draft=4), Draft(max_draft=0), Draft(drafter="eagle")):
        counts, seen = asked(draft)
        assert not any(proposal.ids for proposal in seen)
        assert all(each.ms == 0 for each in counts.values())


def test_max_draft_bounds_what_the_controller_chooses():
    _, seen = asked(Draft(max_draft=2))
    assert max(len(proposal.ids) for proposal in seen) == 2


@pytest.mark.parametrize("count", [1, 3, MOST, 64])
def test_a_named_drafter_and_a_length_is_what_is_done(count):
    """Also where nothing of it holds; beyond what a step has rows for it is that."""
    trace, draft = written([(BAD, 200)], 6), Draft(drafter="mtp", max_draft=count)
    world = World([trace], draft=[draft])
    seen, propose = [], world.speculator.propose
    world.speculator.propose = lambda wishes, rows: seen.append((wishes, propose(wishes, rows))) or seen[-1][1]
    world.run()
    for (wish,), (proposal,) in seen:
        assert len(proposal.ids) == min(count, MOST, wish.most)
    assert len(seen) > 150


def test_those_who_say_how_much_share_what_there_is():
    world = World([written([(GOOD, 50)], seed) for seed in range(3)], draft=[Draft(drafter="mtp", max_draft=15)] * 3)
    wishes = [Wish(request, 13) for request in world.requests]
    assert [len(proposal.ids) for proposal in world.speculator.propose(wishes, 3)] == [4, 4, 5]


def test_a_request_without_anything_to_draft_runs_ahead():
    request = Request(Submit(id=1, prompt=pack_ids([1, 2, 3]), limits=Limits(max_tokens=50)))
    world = World([SOME], names=["suffix"])
    world.speculator._free[0].propose = lambda wishes: [NOTHING] * len(wishes)
    request.append([4])
    assert not world.speculator.drafts(request)


def test_the_free_drafter_is_asked_once_for_each_length():
    request = Request(Submit(id=1, prompt=pack_ids([1, 2, 3]), limits=Limits(max_tokens=50)))
    world, calls = World([SOME], names=["suffix"]), []
    world.speculator._free[0].propose = lambda wishes: (
        calls.append(wishes) or [Proposal("suffix", (7,) * wishes[0].most)]
    )
    for _ in range(ENOUGH):
        assert not world.speculator.drafts(request), "what a step takes without drafts is not known yet"
        world.speculator.measured(1, 0, 1e-3)
    request.append([4])
    for _ in range(3):
        world.speculator.drafts(request)
    world.speculator.propose([Wish(request, 5)], 1)
    assert len(calls) == 1
    request.append([5])
    world.speculator.drafts(request)
    assert len(calls) == 2


def test_a_costly_drafter_that_says_nothing_is_left_alone():
    request = Request(Submit(id=1, prompt=pack_ids([1]), limits=Limits(max_tokens=500)))
    world, calls = World([SOME], names=["mtp"]), []
    world.speculator._costly.propose = lambda wishes: calls.append(wishes) or [NOTHING]
    for _ in range(100):
        request.append([4])
        if world.speculator.drafts(request):
            world.speculator.propose([Wish(request, 9)], 1)
        world.speculator.measured(1, 0, 1e-3)
        world.speculator.settle(request, NOTHING, 1)
    assert len(calls) == 1


def test_a_drafter_is_not_worth_waiting_for_what_would_run_ahead():
    """What a step waits for the host is part of what drafts cost, unless it is waited for anyway."""
    trace = written([(GOOD._replace(begins=0.0, misleads=0.0, neural=(0.3, 0.3)), 2000)], 8)
    slow_host = GPU._replace(gap=1e-3)
    off = fixed(trace, slow_host, free=True, count=0)
    assert World([trace], slow_host, names=["mtp"]).run() > 0.97 * off


@pytest.mark.parametrize(("pauses", "told"), [(range(100, 200), True), (range(100, 110), False)])
def test_pauses_between_steps_are_not_what_drafts_cost(pauses, told):
    """Prompts between steps, and nothing to do at all, are told of; a host that was busy for a while is forgotten."""
    world = World([written([(GOOD, 6000)], 3)], names=["suffix"])
    steps, measured = [0], world.speculator.measured

    def paused(*step):
        measured(*step)
        steps[0] += 1
        if steps[0] in pauses:
            world.clock.now += 1.0
            if told:
                world.speculator.paused()

    world.speculator.measured = paused
    world.run()
    assert world.counts()["suffix"].accepted > 6000 / 3


def test_counts_are_of_what_was_drafted():
    world = World([written([(GOOD, 300)], 7)])
    world.run()
    counts = world.counts()
    assert sum(each.accepted for each in counts.values()) > 200
    for each in counts.values():
        assert each.accepted == sum(each.places) <= each.drafted
        assert list(each.places) == sorted(each.places, reverse=True)
        assert each.drafts <= each.drafted <= MOST * each.drafts
    assert counts["mtp"].ms > 0 == counts["suffix"].ms
    rest = world.requests[0].output - 1 - sum(each.accepted for each in counts.values())
    assert 0 < rest < 300


def test_nothing_is_kept_of_requests_that_ended():
    world = World([written([(GOOD, 100)], 7)])
    world.run()
    speculator = world.speculator
    speculator.end(world.requests[0])
    accounts = speculator._accounts
    assert not any((accounts.streams, *(purse._spent for purse in accounts._purses)))


def test_rows_are_never_more_than_a_step_has():
    rng = random.Random(1)
    for seed in range(30):
        count = rng.randrange(1, MAX_ROWS + 1)
        draft = [rng.choice([Draft(), Draft(drafter="mtp", max_draft=rng.randrange(20))]) for _ in range(count)]
        world = World([written([(rng.choice([GOOD, BAD]), 60)], seed + each) for each in range(count)], draft=draft)
        rows, most = rng.randrange(count, MAX_ROWS + 1), []
        wishes = [Wish(request, rng.randrange(1, 16)) for request in world.requests]
        if rows < MAX_ROWS:
            most = world.speculator.propose(wishes, rows)
        assert rows + sum(len(proposal.ids) for proposal in most) <= MAX_ROWS
        assert all(len(each.ids) <= wish.most for each, wish in zip(most, wishes, strict=False))
