"""What steps take is learnt from steps as they come: late ones, longer contexts and gaps in what is known included."""

import random

import pytest

from fwd.engine.speculate.costs import ENOUGH, FORGET, WINDOW, Costs
from fwd.kernels.sizes import MAX_ROWS


def learnt(times, count=WINDOW, costs=None):
    costs = costs or Costs()
    for _ in range(count):
        for size, seconds in times.items():
            costs.measured(size, seconds)
    return costs


def test_what_was_measured_is_known():
    costs = learnt({1: 1.0, 4: 1.1, 16: 2.0})
    assert [costs.seconds(size) for size in (0, 1, 4, 16)] == pytest.approx([0, 1.0, 1.1, 2.0])


def test_what_was_not_is_thought_to_cost_little_but_no_less_than_fewer_rows():
    costs = learnt({1: 1.0})
    assert 1.0 < costs.seconds(2) < costs.seconds(16) < 1.2
    costs = learnt({1: 1.0, 16: 1.05})
    assert 1.0 < costs.seconds(2) < costs.seconds(8) <= costs.seconds(16) == pytest.approx(1.05)


def test_between_two_that_are_known_one_is_thought_better_than_a_straight_line():
    """So a few are tried, and not all, where each row costs as much as the first."""
    costs = learnt({1: 1.0, 16: 16.0})
    assert costs.seconds(8) == pytest.approx((8 + 1.07) / 2)


def test_fewer_rows_than_any_that_were_measured_may_take_in_proportion():
    """So no drafts are tried, once, where a first step had some."""
    assert learnt({8: 4.0}).seconds(1) == pytest.approx(0.5, rel=0.02)


def test_a_warm_up_is_not_believed_and_a_step_that_was_held_up_changes_nothing():
    costs = Costs()
    for seconds in (50.0, 1.0, 1.0):
        costs.measured(1, seconds)
    assert costs.seconds(1) == 1.0
    rng = random.Random(3)
    for _ in range(500):
        costs.measured(1, rng.uniform(0.98, 1.02) * (30 if rng.random() < 0.2 else 1))
    assert costs.seconds(1) == pytest.approx(1.0, rel=0.03)


def test_each_size_is_tried_a_few_times_at_first():
    costs = learnt({1: 1.0})
    for _ in range(ENOUGH - 1):
        costs.measured(8, 90.0)
        assert costs.seconds(8) < 1.2
    costs.measured(8, 90.0)
    assert costs.seconds(8) == 90.0


def test_a_context_that_grows_is_followed_by_sizes_that_are_not_in_use():
    costs = learnt({1: 1.0, 8: 1.2})
    for step in range(300):
        costs.measured(1, 1.0 + step / 300)
    assert costs.seconds(1) == pytest.approx(2.0, rel=0.05)
    assert costs.seconds(8) == pytest.approx(2.4, rel=0.05)


def test_a_stale_size_does_not_take_others_along():
    costs = learnt({1: 1.0, 8: 9.0})
    for _ in range(400):
        costs.measured(1, 1.0)
    for _ in range(WINDOW):
        costs.measured(8, 1.1)
    assert costs.seconds(8) == pytest.approx(1.1)
    assert costs.seconds(1) == pytest.approx(1.0)


def test_what_is_not_used_is_forgotten_in_the_end():
    costs = learnt({1: 1.0, 8: 9.0})
    for _ in range(FORGET * (WINDOW + 1)):
        costs.measured(1, 1.0)
    assert costs.seconds(8) < 1.2


@pytest.mark.parametrize("seed", range(20))
def test_more_rows_never_take_less(seed):
    rng, costs = random.Random(seed), Costs()
    for _ in range(500):
        costs.measured(rng.randrange(1, MAX_ROWS + 1), rng.uniform(0.5, 2.0) * rng.choice([1, 1, 1, 20]))
        curve = [costs.seconds(size) for size in range(MAX_ROWS + 1)]
        assert curve == sorted(curve)
        assert curve[0] == 0 < curve[1]
