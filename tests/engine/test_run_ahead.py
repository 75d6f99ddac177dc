"""Running ahead: a step is launched before the one before it is read, and nobody can tell from what is read."""

import pytest
from mock_engine import CHUNK, PAGE, Engine, submit
from mock_runner import FULL, STATE, oracle, sliding

from fwd.engine.space import Space
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Cancel, Finished, Tokens
from fwd.protocol.values import Limits

EVERYTHING = (FULL, sliding(5), STATE)
UNITS = (64, 64, 64)


def engine(ahead=True, **sizes):
    return Engine(EVERYTHING, UNITS, ahead=ahead, **sizes)


def decoded(engine):
    """Steps by the requests in them."""
    return [launch[1] for launch in engine.runner.launches if launch[0] == "decode"]


def said(engine):
    """What each reader is told, in order, without times."""
    told = [message for message in engine.messages if isinstance(message, Tokens | Finished)]
    return {
        each.id: [
            m if isinstance(m, Tokens) else (m.reason, m.stop_id, m.timing.steps) for m in told if m.id == each.id
        ]
        for each in told
    }


@pytest.mark.parametrize("tokens", [1, 2, 3, 30])
def test_a_step_is_launched_before_the_one_before_it_is_read_and_none_in_vain(tokens):
    here = engine()
    output, timing = here.ask(1, [5, 6], tokens)

    assert output == oracle([5, 6], 0, tokens)
    assert here.runner.most == min(2, tokens - 1)
    assert len(decoded(here)) == timing.steps == tokens - 1


def test_a_token_that_ends_the_answer_costs_one_row_in_vain():
    answer = oracle([5, 6], 0, 30)
    stop = answer[12]
    here = engine()
    output, timing = here.ask(1, [5, 6], 30, limits=Limits(max_tokens=30, stop_ids=(stop,)))
    here.idle()

    steps = answer.index(stop)
    assert output == answer[: steps + 1]
    assert timing.steps == steps
    assert len(decoded(here)) == steps + 1


def test_who_ends_does_not_hold_up_the_others():
    here = engine()
    here.handle(submit(1, [1], 6), submit(2, [2], 20))
    here.idle()

    assert here.output == {1: oracle([1], 0, 6), 2: oracle([2], 0, 20)}
    assert here.runner.most == 2
    assert len(decoded(here)) <= 20


def test_a_prompt_that_arrives_is_read_after_one_more_step():
    here = engine()
    here.handle(submit(1, [1], 40))
    while len(decoded(here)) < 8:
        here.step()
    before = len(here.runner.launches)
    here.handle(submit(2, [2] * 3 * CHUNK, 4))
    here.idle()

    kinds = [launch[0] for launch in here.runner.launches[before:]]
    assert kinds[0] == "prefill"
    assert kinds[:5] == ["prefill", "decode", "prefill", "decode", "prefill"]
    assert here.output == {1: oracle([1], 0, 40), 2: oracle([2] * 3 * CHUNK, 0, 4)}


def test_a_request_that_is_refused_for_lack_of_pages_does_not_stop_it():
    here = Engine((FULL,), (10,), ahead=True)
    here.handle(submit(1, [1] * 2 * PAGE, 20))
    while len(decoded(here)) < 2:
        here.step()
    here.handle(submit(2, [2] * 9 * PAGE, 1))
    for _ in range(8):
        here.step()

    assert here.scheduler.waiting == 1
    assert len(here.loop._flight) == 1
    here.idle()
    assert here.output == {1: oracle([1] * 2 * PAGE, 0, 20), 2: oracle([2] * 9 * PAGE, 0, 1)}


def test_what_a_cancelled_request_held_is_free_at_once_and_nobody_reads_its_rows():
    here = engine()
    here.handle(submit(1, [1], 40), submit(2, [2], 40))
    while len(decoded(here)) < 8:
        here.step()
    launched = len(decoded(here))
    here.handle(Cancel(id=1), submit(3, [3] * CHUNK, 20))
    here.idle()

    assert sum(1 in step for step in decoded(here)[launched:]) == 0
    assert here.output[1] == oracle([1], 0, 40)[: len(here.output[1])]
    assert here.output[2] == oracle([2], 0, 40)
    assert here.output[3] == oracle([3] * CHUNK, 0, 20)


def test_everything_may_be_cancelled_with_a_step_in_flight():
    here = engine()
    here.handle(submit(1, [1], 40, cache=False))
    while not here.loop._flight:
        here.step()
    here.handle(Cancel(id=1))

    assert not here.scheduler
    assert here.loop.busy
    here.idle()
    assert not here.loop._flight
    assert all(pool.free == pool.total for pool in here.space.pools)


def test_readers_are_told_the_same_with_it_and_without():
    told = []
    for ahead in (False, True):
        here = engine(ahead, seqs=3)
        for number in range(1, 8):
            here.handle(
                submit(
                    number,
                    [number] * (5 * number),
                    9 + number,
                    emitted=pack_ids(oracle([number] * (5 * number), 0, number)),
                )
            )
            for _ in range(4):
                here.step()
        here.idle()
        told.append(said(here))

    assert told[0] == told[1]


def test_a_state_that_is_given_back_under_a_row_in_flight_is_noticed(monkeypatch):
    """A planted mistake: the record that the row in flight leaves is given back."""
    commit = Space.commit
    monkeypatch.setattr(Space, "commit", lambda self, request, end, _ahead=0: commit(self, request, end))
    here = engine()

    with pytest.raises((AssertionError, ValueError)):
        here.ask(1, [5, 6], 30)


def test_the_host_part_of_a_step_is_measured():
    here = engine()
    assert here.loop._pong(1).host_us == 0
    here.ask(1, [5, 6], 30)

    assert 0 < here.loop._pong(1).host_us < 1e6
