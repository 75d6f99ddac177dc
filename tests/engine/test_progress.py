"""Progress of a load: how often it is told, and its rate."""

import pytest
import structlog

from fwd.engine.progress import LOG_SECONDS, SEND_SECONDS, Progress


@pytest.fixture
def told():
    """Steps of a load of 100 bytes, and what the front and the log were told."""
    clock, sent = [10.0], []
    progress = Progress(sent.append, lambda: clock[0])

    def step(seconds, done):
        clock[0] += seconds
        progress(done, 100)

    with structlog.testing.capture_logs() as logged:
        yield step, sent, logged


def test_the_first_and_the_last_are_told_whatever_the_time(told):
    step, sent, logged = told
    for done in (0, 50, 100, 100):
        step(0, done)
    assert [message.done for message in sent] == [0, 100]
    assert [event["done_bytes"] for event in logged] == [0, 100]
    assert {message.total for message in sent} == {100}


def test_the_front_is_told_often_and_the_log_now_and_then(told):
    step, sent, logged = told
    for done in range(100):
        step(SEND_SECONDS / 2, done)
    assert len(sent) == 50
    assert len(logged) == 1
    step(LOG_SECONDS, 99)
    assert len(logged) == 2


def test_the_rate_is_of_what_was_read_since_the_first_call(told):
    step, sent, logged = told
    step(0, 20)
    step(2.0, 60)
    assert sent[-1].rate == 20
    assert logged[0]["mb_per_s"] == 0
