"""How often drafts hold is learnt from what was committed, and the same whether they were used or only watched."""

import random

import pytest

from fwd.engine.request import Request
from fwd.engine.speculate.drafter import Proposal
from fwd.engine.speculate.estimates import Estimates
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Limits

RIGHT, WRONG = 1, 2
KEY = ("suffix", 3)


def request_of(number=1, tokens=100_000):
    return Request(Submit(id=number, prompt=pack_ids([RIGHT]), limits=Limits(max_tokens=tokens)))


def proposal(rng, rates, key=KEY):
    """Drafts of which each holds with its rate once those before it have."""
    ids = []
    for rate in rates:
        ids.append(RIGHT if WRONG not in ids and rng.random() < rate else WRONG)
    return Proposal(key[0], tuple(ids), key[1])


def commit(estimates, request, count):
    request.append([RIGHT] * count)
    estimates.learn(request)


def held(proposed):
    return next((place for place, token in enumerate(proposed.ids) if token == WRONG), len(proposed.ids))


def used(estimates, request, rng, rates, steps, key=KEY):
    """Each step commits what held of its proposal, and one more."""
    for _ in range(steps):
        proposed = proposal(rng, rates, key)
        estimates.watch(request, proposed)
        commit(estimates, request, held(proposed) + 1)


def rates_of(chances):
    return [chance / before for chance, before in zip(chances, [1.0, *chances], strict=False)]


RATES = (0.9, 0.6, 0.8, 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_estimates_come_to_what_is_true(seed):
    rng, estimates, total = random.Random(seed), Estimates({}, 0.5), [0.0] * len(RATES)
    for number in range(1, 41):
        request = request_of(number)
        used(estimates, request, rng, RATES, 100)
        found = rates_of(estimates.survival(request, KEY, len(RATES)))
        total = [sofar + rate for sofar, rate in zip(total, found, strict=True)]
        estimates.end(request)
    assert [each / 40 for each in total] == pytest.approx(RATES, abs=0.06)


@pytest.mark.parametrize("seed", range(5))
def test_what_was_only_watched_teaches_what_use_teaches(seed):
    """The same proposals, committed as they held in one step, or id by id while nobody drafts."""
    rng = random.Random(seed)
    ways = [(Estimates({}, 0.5), request_of()) for _ in range(2)]
    for _ in range(200):
        proposed = proposal(rng, RATES)
        for estimates, request in ways:
            estimates.watch(request, proposed)
        count = held(proposed) + 1
        commit(*ways[0], count)
        for _ in range(count):
            commit(*ways[1], 1)
        one, other = (estimates.survival(request, KEY, 4) for estimates, request in ways)
        assert one == other


def test_a_place_is_judged_only_where_those_before_it_held():
    estimates, request = Estimates({}, 0.5), request_of()
    for _ in range(50):
        estimates.watch(request, Proposal(*KEY[:1], (RIGHT, WRONG, RIGHT), KEY[1]))
        commit(estimates, request, 2)
    first, second, third = rates_of(estimates.survival(request, KEY, 3))
    assert first > 0.9
    assert second < 0.1
    assert third < 0.1, "never seen: as the one before it"


def test_what_is_not_decided_yet_waits():
    estimates, request = Estimates({}, 0.5), request_of()
    before = estimates.survival(request, KEY, 2)
    estimates.watch(request, Proposal("suffix", (RIGHT, RIGHT), 3))
    estimates.learn(request)
    assert estimates.survival(request, KEY, 2) == before
    commit(estimates, request, 1)
    (first, second), (was_first, was_second) = estimates.survival(request, KEY, 2), before
    assert first > was_first
    assert second / first < first, "the second place was not seen yet: it follows the first, less sure"
    commit(estimates, request, 1)
    assert estimates.survival(request, KEY, 2)[1] > second
    assert was_second < second


def test_levels_and_requests_are_told_apart_and_new_requests_begin_with_what_all_have_taught():
    rng, estimates = random.Random(1), Estimates({}, 0.5)
    good, bad = request_of(1), request_of(2)
    for _ in range(100):
        used(estimates, good, rng, (0.95,), 1)
        used(estimates, bad, rng, (0.05,), 1)
        used(estimates, good, rng, (0.02,), 1, key=("suffix", 1))
    chance = {each.id: estimates.survival(each, KEY, 1)[0] for each in (good, bad, request_of(3))}
    assert chance[1] > 0.8 > 0.65 > chance[3] > 0.35 > 0.2 > chance[2]
    assert estimates.survival(good, ("suffix", 1), 1)[0] < 0.15


def test_what_is_written_now_says_most():
    rng, estimates, request = random.Random(2), Estimates({}, 0.5), request_of()
    used(estimates, request, rng, (0.0,), 2000)
    assert estimates.survival(request, KEY, 1)[0] < 0.05
    used(estimates, request, rng, (1.0,), 40)
    assert estimates.survival(request, KEY, 1)[0] > 0.6


def test_the_first_guess_is_the_drafters():
    estimates = Estimates({"mtp": 0.75}, 0.5)
    assert estimates.survival(request_of(), ("mtp", 0), 3) == pytest.approx([0.75, 0.75**2, 0.75**3])
    assert estimates.survival(request_of(), ("suffix", 4), 2) == pytest.approx([0.5, 0.25])


def test_nothing_is_kept_of_a_request_that_ended():
    estimates, request = Estimates({}, 0.5), request_of()
    used(estimates, request, random.Random(0), RATES, 5)
    estimates.watch(request, Proposal("suffix", (RIGHT,) * 15, 3))
    estimates.end(request)
    assert not estimates._own
    assert not estimates._watched
