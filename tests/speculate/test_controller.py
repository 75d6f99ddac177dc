"""The controller gives what is best of all allocations, whatever steps, drafts and chances are like."""

import itertools
import random

import numpy as np
import pytest

from fwd.engine.scheduler import BUCKETS
from fwd.engine.speculate.controller import DEAR, NO_PICK, SURE, Choice, Pick, Prices, choose
from fwd.engine.speculate.costs import Costs
from fwd.kernels.sizes import MAX_ROWS


def costs(seconds):
    """`seconds` of each size from 1 on."""
    made = Costs()
    made._curve = [0.0, *seconds]
    return made


def stairs(rng):
    """A dense model's: all rows of a bucket take as long."""
    levels = list(itertools.accumulate((rng.random() * rng.choice([0.02, 0.5]) for _ in BUCKETS), initial=1.0))
    return [levels[next(at for at, size in enumerate(BUCKETS) if size >= rows)] for rows in range(1, MAX_ROWS + 1)]


def slope(rng):
    steep = rng.choice([0.0, 0.05, 0.4])
    return list(itertools.accumulate((rng.random() * steep for _ in range(MAX_ROWS - 1)), initial=1.0))


def survival(rng, most):
    rate = rng.choice([0.02, 0.5, 0.9, 1.0])
    return list(itertools.accumulate((min(1.0, rate * rng.uniform(0.7, 1.1)) for _ in range(most)), lambda a, b: a * b))


def prices(rng):
    steps, drafting = (
        costs(rng.choice([stairs, slope])(rng)),
        costs(np.cumsum(np.random.default_rng(0).random(16)) / 20),
    )
    return Prices(steps, drafting, *rng.choice([(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)]))


def rate_of(picks, requests, rows, prices):
    """Ids a second that are counted on of an allocation, in plain words."""
    gained = longest = 0
    for pick, choices in zip(picks, requests, strict=True):
        if pick.drafts:
            choice = next(each for each in choices if each.drafter == pick.drafter)
            gained += sum(choice.survival[: pick.drafts])
            longest = max(longest, pick.drafts * choice.costly)
    drafts = sum(pick.drafts for pick in picks)
    seconds = prices.steps.seconds(rows + drafts) + prices.drafting.seconds(longest) + prices.always
    sure = (SURE if drafts else 1) * (DEAR if longest else 1)
    return (rows + gained) * sure / (seconds + prices.waiting * (drafts > 0))


def allocations(requests, room):
    ways = [
        [NO_PICK, *(Pick(each.drafter, count + 1) for each in choices for count in range(len(each.survival)))]
        for choices in requests
    ]
    return (picks for picks in itertools.product(*ways) if sum(pick.drafts for pick in picks) <= room)


@pytest.mark.parametrize("seed", range(400))
def test_no_allocation_is_better(seed):
    rng = random.Random(seed)
    count = rng.randrange(1, 4)
    rows = rng.randrange(count if count < 3 else 9, MAX_ROWS + 1)
    most = rng.choice([2, 5, 15]) if count < 3 else 4
    names = [("suffix", False), ("mtp", True), ("grammar", False)]
    requests = [
        [
            Choice(name, survival(rng, rng.randrange(1, most + 1)), costly)
            for name, costly in names
            if rng.random() < 0.7
        ]
        for _ in range(count)
    ]
    given = prices(rng)
    verdict = choose(requests, rows, given)
    best = max(rate_of(picks, requests, rows, given) for picks in allocations(requests, MAX_ROWS - rows))
    assert sum(pick.drafts for pick in verdict.picks) <= MAX_ROWS - rows
    assert verdict.rate == pytest.approx(best)
    assert rate_of(verdict.picks, requests, rows, given) == pytest.approx(best)


def flat(per_row=0.0):
    return Prices(costs([1 + per_row * row for row in range(MAX_ROWS)]), costs([0.0] * MAX_ROWS))


def test_all_that_a_bucket_holds_is_filled_and_no_more():
    given = Prices(costs([1.0] * 8 + [1.9] * 8), costs([0.0] * MAX_ROWS))
    (pick,) = choose([[Choice("suffix", [0.7**place for place in range(1, 16)])]], 1, given).picks
    assert pick == Pick("suffix", 7)


def test_what_never_holds_is_not_drafted_even_where_rows_cost_nothing():
    verdict = choose([[Choice("suffix", [0.0] * 15)]], 1, flat())
    assert verdict.picks == [NO_PICK]


def test_no_first_descent_hides_what_is_further_on():
    """One draft more does not pay, seven do."""
    given = Prices(costs([1.0] + [1.9] * 15), costs([0.0] * MAX_ROWS))
    (pick,) = choose([[Choice("suffix", [0.8**place for place in range(1, 16)])]], 1, given).picks
    assert pick.drafts == 15


def test_requests_alike_have_shares_alike():
    chances = [0.8**place for place in range(1, 16)]
    for count in range(2, 9):
        shares = [pick.drafts for pick in choose([[Choice("suffix", chances)]] * count, count, flat()).picks]
        assert sum(shares) == MAX_ROWS - count
        assert max(shares) - min(shares) <= 1


def test_a_costly_drafter_is_worth_its_time_for_several_before_it_is_for_one():
    chances = [0.4]
    given = Prices(costs([1.0] * MAX_ROWS), costs([0.5] * MAX_ROWS))
    assert choose([[Choice("mtp", chances, costly=True)]], 1, given).picks == [NO_PICK]
    several = choose([[Choice("mtp", [0.9], costly=True)]] * 4, 4, given).picks
    assert several == [Pick("mtp", 1)] * 4


def test_a_full_step_has_no_drafts():
    assert choose([[Choice("suffix", [1.0] * 15)]] * 16, 16, flat()).picks == [NO_PICK] * 16


def test_waiting_turns_off_what_gains_less():
    choices = [Choice("suffix", [0.3])]
    steps, none = costs([1.0] * MAX_ROWS), costs([0.0] * MAX_ROWS)
    assert choose([choices], 1, Prices(steps, none, waiting=0.2)).picks[0].drafts == 1
    assert choose([choices], 1, Prices(steps, none, waiting=0.4)).picks[0].drafts == 0
    assert choose([choices], 1, Prices(steps, none, always=0.4)).picks[0].drafts == 1
