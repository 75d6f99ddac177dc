"""The queue: what waits is what is counted, and the wait that is asked for grows with it and is bounded."""

import asyncio
import random

import pytest
from fakes import Script
from hypothesis import given
from hypothesis import strategies as st
from rig import keeping, stream

from fwd.errors import DeadlineError
from fwd.front.queue import DEFAULT_RATE, LATEST, SMOOTHING, SOONEST, Pace, Queue, queue_tokens, retry_after
from fwd.front.roster import SUSPECT_AFTER, Roster
from fwd.front.streams import Stream
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Cancel, Finished, PromptLogprobs, Submit, Tokens
from fwd.protocol.values import Prefilling, Timing

RATES = st.floats(0, 1e9)
COUNTS = st.integers(0, 10**10)


@given(COUNTS, COUNTS, RATES)
def test_the_wait_grows_with_the_backlog(less, more, rate):
    assert retry_after(min(less, more), rate) <= retry_after(max(less, more), rate)


@given(COUNTS, RATES, RATES)
def test_the_wait_shrinks_with_the_rate(tokens, slow, fast):
    assert retry_after(tokens, max(slow, fast)) <= retry_after(tokens, min(slow, fast))


@given(COUNTS, RATES)
def test_the_wait_is_bounded_and_enough(tokens, rate):
    seconds = retry_after(tokens, rate)
    assert SOONEST <= seconds <= LATEST
    assert isinstance(seconds, int)
    assert seconds == LATEST or seconds * rate >= tokens * (1 - 1e-12)


@pytest.mark.parametrize(
    ("tokens", "rate", "seconds"),
    [(0, 100, 1), (1, 100, 1), (100, 100, 1), (101, 100, 2), (5999, 100, 60), (10**9, 100, 60), (1, 0, 60), (0, 0, 60)],
)
def test_waits(tokens, rate, seconds):
    assert retry_after(tokens, rate) == seconds


def test_the_pace_is_the_stated_one_until_it_is_measured():
    pace = Pace()
    pace.observe(1.0, 0, busy=False)
    pace.observe(2.0, 5000, busy=True)  # the work began somewhere in between
    assert pace.rate == DEFAULT_RATE
    pace.observe(4.0, 5400, busy=True)
    assert pace.rate == 200
    pace.observe(5.0, 5400, busy=False)
    pace.observe(500.0, 5400, busy=True)  # idle time is no slowness
    assert pace.rate == 200


def test_the_pace_follows_within_the_smoothing():
    pace = Pace()
    pace.observe(0, 0, busy=True)
    pace.observe(1, 100, busy=True)
    for second in range(2, 2 + round(3 * SMOOTHING)):
        pace.observe(second, 100 + 300 * (second - 1), busy=True)
    assert 280 < pace.rate < 300


def test_another_engine_counts_from_zero():
    pace = Pace()
    pace.observe(0, 0, busy=True)
    pace.observe(1, 700, busy=True)
    pace.restart()
    pace.observe(2, 10, busy=True)
    pace.observe(3, 5, busy=True)
    assert pace.rate == 700


def choices(first, count, length):
    """Choices of one prompt."""
    prompt = pack_ids(range(length))
    return [Stream(Submit(id=first + each, prompt=prompt, choice=each, seed=1)) for each in range(count)]


def test_a_prompt_counts_once_and_until_the_first_of_its_choices_begins():
    queue, (first, second, third) = Queue(), choices(1, 3, 50)
    assert queue_tokens([first.submit, second.submit, third.submit]) == 50
    for each in (first, second, third):
        queue.enter(each)
    assert queue.tokens == 50
    queue.leave(first)  # it was cancelled
    assert queue.tokens == 50
    second.begun = True
    queue.leave(second)
    assert queue.tokens == 0
    queue.leave(third)
    queue.leave(first)
    assert queue.tokens == 0


def test_what_was_given_counts_too():
    queue, one = Queue(), stream(1, [1] * 7, emitted=pack_ids([2] * 5))
    assert queue_tokens([one.submit]) == 12
    queue.enter(one)
    assert queue.tokens == 12
    queue.leave(one)
    assert queue.tokens == 0


class World:
    """A roster, an engine that may be there, and random events in an order that can happen."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.roster = Roster()
        self.streams = []
        self.connected = False

    def live(self):
        return [one for one in self.streams if not one.done]

    def add(self):
        group = choices(len(self.streams) + 1, self.rng.choice([1, 1, 3]), self.rng.randrange(1, 90))
        self.streams += group
        for one in group:
            self.roster.add(one)

    def link(self):
        if self.connected:
            self.roster.disconnect()
        else:
            self.roster.connect(lambda _: None)
        self.connected = not self.connected

    def reader(self, one):
        reason = self.rng.choice(["cancelled", "stop"])
        end = self.roster.cancel if reason == "cancelled" else self.roster.close
        end(one, Finished(id=one.id, reason=reason))

    def engine(self, one):
        """A word of the engine on a stream that it has."""
        if self.roster.is_running(one):
            self.rng.choice([self.token, self.score, self.prefill, self.finish])(one)

    def token(self, one):
        self.roster.append(Tokens(id=one.id, start=len(one.emitted), ids=[1]))

    def score(self, one):
        self.roster.append_prompt(PromptLogprobs(id=one.id, start=1, logprobs=[]))

    def prefill(self, one):
        self.roster.show_prefills([Prefilling(id=one.id, done=1, total=len(one.prompt))])

    def finish(self, one):
        result = Finished(id=one.id, reason=self.rng.choice(["length", "cancelled"]))
        self.roster.finish(one.id, self.rng.choice([result, DeadlineError("x")]))

    def act(self):
        if self.rng.random() < 0.2:
            self.add()
        if self.rng.random() < 0.1:
            self.link()
        if live := self.live():
            self.rng.choice([self.reader, self.engine, self.engine, self.engine])(self.rng.choice(live))

    def bounds(self):
        """The least and the most that may be counted: prompts of which no choice has begun, and all that wait."""
        waiting = [one for one in self.live() if not one.begun]
        begun = {id(one.submit.prompt) for one in self.streams if one.begun}
        prompts = {id(one.submit.prompt): len(one.prompt) for one in waiting}
        least = sum(tokens for prompt, tokens in prompts.items() if prompt not in begun)
        return least, sum(prompts.values()) + sum(len(one.emitted) for one in waiting)


@pytest.mark.parametrize("seed", range(40))
def test_the_count_holds_through_everything(seed):
    world = World(seed)
    for _ in range(400):
        world.act()
        least, most = world.bounds()
        assert least <= world.roster.queue.tokens <= most
    for one in world.live():
        world.roster.cancel(one, Finished(id=one.id, reason="cancelled"))
    assert world.roster.queue.tokens == 0


def test_a_death_puts_everything_back_in_line():
    roster, sent = Roster(), []
    group, other = choices(1, 2, 30), stream(9, [1] * 5)
    for one in (*group, other):
        roster.add(one)
    assert roster.queue.tokens == 35
    roster.connect(sent.append)
    roster.append(Tokens(id=1, start=0, ids=[7, 7]))
    roster.append(Tokens(id=9, start=0, ids=[7]))
    assert roster.queue.tokens == 0
    roster.disconnect()
    assert roster.queue.tokens == 30 + 2 + 5 + 1
    assert not any(one.begun for one in (*group, other))


def test_a_suspect_that_waits_again_counts_again():
    roster, sent, (one, two) = Roster(), [], (stream(1, [1] * 10), stream(2, [1] * 10))
    for each in (one, two):
        roster.add(each)
    for _ in range(SUSPECT_AFTER):
        roster.connect(sent.append)
        roster.disconnect()
    roster.connect(sent.append)
    roster.append(Tokens(id=1, start=0, ids=[5]))  # acquitted: it waits while the other is tried
    assert sent[-1] == Cancel(id=1)
    roster.finish(1, Finished(id=1, reason="cancelled"))
    assert roster.queue.tokens == 11 + 10
    roster.append(Tokens(id=2, start=0, ids=[5]))
    assert roster.queue.tokens == 11
    assert sent[-1].id == 1


def test_a_complete_answer_ends_with_the_engine_s_account_of_it():
    roster, sent, one = Roster(), [], stream(1)
    roster.connect(sent.append)
    roster.add(one)
    roster.append(Tokens(id=1, start=0, ids=[5]))
    roster.close(one, Finished(id=1, reason="stop"))
    assert sent[-1] == Cancel(id=1)
    assert not one.done
    roster.finish(1, Finished(id=1, reason="cancelled", timing=Timing(cached_tokens=3)))
    assert one.finished == Finished(id=1, reason="stop", timing=Timing(cached_tokens=3))


@pytest.mark.parametrize("what", ["away", "dies", "cancelled", "fails", "given up"])
def test_a_complete_answer_waits_for_no_engine(what):
    roster, sent, one = Roster(), [], stream(1)
    if what != "away":
        roster.connect(sent.append)
    roster.add(one)
    roster.close(one, Finished(id=1, reason="stop"))
    if what == "dies":
        roster.disconnect()
    elif what == "cancelled":
        roster.cancel(one, DeadlineError("late"))
    elif what == "fails":
        roster.finish(1, DeadlineError("late"))
    elif what == "given up":
        roster.fail_all(DeadlineError("late"))
    assert one.finished == Finished(id=1, reason="stop")
    assert one.error is None
    assert len(roster) == 0
    assert roster.queue.tokens == 0


def test_the_keeper_learns_pace_and_prefills(run):
    async def main():
        async with keeping(Script(pace="ping", chunk=2)) as keeper:
            await keeper.reach("ready")
            keeper.submit(one := stream(1, [5] * 40))
            assert keeper.queue.tokens == 40
            await keeper.until(lambda: one.prefilling is not None)
            assert keeper.queue.tokens == 0
            assert one.begun
            assert one.prefilling.total == 40
            await keeper.until(lambda: one.prefilling is None)
            await keeper.until(lambda: keeper.pace.rate != DEFAULT_RATE)
            await asyncio.wait_for(one.wait_end(), 30)

    run(main())


def test_what_the_engine_holds_unread_counts_once_a_prompt():
    async def main():
        roster, prompt = Roster(), pack_ids(range(500))
        roster.connect(lambda _: None)
        for number, ids in enumerate((prompt, prompt, pack_ids(range(300))), 1):
            roster.add(Stream(Submit(id=number, prompt=ids, seed=0)))
        roster.show_prefills([Prefilling(id=n, done=100, total=total) for n, total in ((1, 500), (2, 500), (3, 300))])
        return roster.unread

    assert asyncio.run(main()) == 400 + 200
