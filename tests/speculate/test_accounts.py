"""Whatever drafting takes is paid by those who may have drafts for as long as it pays, and by nobody else."""

import pytest
from traces import Kind, request_of, written

from fwd.engine.speculate.accounts import COSTLY_SHARE, SHARE, START, Accounts
from fwd.engine.speculate.costs import Costs
from fwd.engine.speculate.drafter import Proposal
from fwd.engine.speculate.purse import Past, Purse
from fwd.protocol.values import Draft

STEP = 1e-3
SOME = written([(Kind(begins=0.5, length=30.0, misleads=0.1, neural=(0.9, 0.85)), 9)], 0)
AUTO, OFF, NAMED = Draft(), Draft(drafter="off"), Draft(drafter="mtp", max_draft=8)


class Costly:
    name = "mtp"

    def end(self, request):
        pass

    def read(self):
        return ()


@pytest.fixture
def accounts():
    steps, drafting = Costs(), Costs(unknown=0.0)
    for _ in range(10):
        steps.measured(1, STEP)
        drafting.measured(1, STEP / 4)
    return Accounts(Costly(), steps, drafting, ("suffix", "mtp"))


def request(number, draft=AUTO):
    return request_of(number, SOME, draft)


def common(accounts):
    return [purse.common for purse in accounts._purses]


def test_the_share_is_of_the_time_of_those_who_pay(accounts):
    """Steps of requests without drafts, and what they have of steps with others, are not spent from."""
    for number, draft in enumerate([OFF, OFF, AUTO]):
        accounts.stream(request(number, draft))
    before = accounts._trying.common
    for _ in range(30):
        accounts.step(3, 0, 3 * STEP, 0.0)
    assert accounts._trying.common - before == pytest.approx(30 * STEP * COSTLY_SHARE)
    accounts.end(request(2))
    before = common(accounts)
    for _ in range(30):
        accounts.step(2, 0, 2 * STEP, 0.0)
    assert common(accounts) == before


def test_what_a_named_drafter_takes_and_brings_is_nobodys(accounts):
    for number, draft in enumerate([NAMED, AUTO]):
        accounts.stream(request(number, draft))
    for _ in range(300):
        accounts.step(2, 0, 2 * STEP, 0.0)
    accounts.step(10, 8, 5 * STEP, STEP)
    before = common(accounts)
    proposal = Proposal("mtp", (1,) * 8)
    accounts.made([(request(0), proposal)], 8)
    accounts.settle(request(0), proposal, 0)
    accounts.settle(request(0), proposal, 8)
    assert common(accounts) == before
    accounts.settle(request(1), proposal, 0)
    assert common(accounts) != before


def test_the_first_requests_begin_with_as_much_as_later_ones(accounts):
    accounts.stream(request(0))
    accounts.step(1, 0, STEP, 0.0)
    accounts.stream(request(1))
    for purse in accounts._purses:
        assert purse.has(0) == purse.has(1)
    assert accounts._looking.has(0) >= START * STEP


@pytest.mark.parametrize("part", [0.1, 0.6, 3.0])
def test_a_draft_that_takes_much_of_a_step_is_tried_until_it_does_not_pay(accounts, part):
    for _ in range(200):
        accounts._drafting.measured(1, part * STEP)
    for _ in range(300):
        accounts.step(1, 0, STEP, 0.0)
    first = accounts.stream(request(0))
    assert not first.left
    accounts.made([(request(0), Proposal("mtp", (1,)))], 1)
    for _ in range(9):
        first.payer.spend(0, part * STEP)
    assert accounts.stream(request(1)).left


def test_a_purse_puts_by_a_share_and_owes_no_more_than_its_debt():
    past = Past()
    purse = Purse(past, SHARE, most=2.0, saved=2.0, debt=0.5, full=False)
    past.add(STEP, 1, 1)
    purse.begin(7)
    for _ in range(100):
        past.add(STEP, 1, 1)
    assert purse.has(7) == pytest.approx(101 * SHARE * STEP)
    purse.spend(7, 10 * STEP)
    assert purse.has(7) == pytest.approx(-0.5 * STEP)
    assert purse.common == pytest.approx(-0.5 * STEP)
    for _ in range(10_000):
        past.add(STEP, 1, 1)
    assert purse.has(7) == pytest.approx(2 * STEP)
    purse.spend(7, -10 * STEP)
    assert purse.has(7) == pytest.approx(2 * STEP), "what drafts save is not put by for ever"
    purse.end(7)
    purse.spend(7, STEP)
    assert purse.common == pytest.approx(2 * STEP), "of a request that has ended nothing is kept"
