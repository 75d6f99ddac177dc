"""The loop on a mock model: whatever arrives, is cancelled or preempted, each stream is as if alone."""

import random
import socket
import threading

import mock_engine
import pytest
from grammars import GRAMMARS, engine
from guesser import Guesser
from mock_runner import FULL, MockRunner, oracle

from fwd.engine.loop import Loop
from fwd.engine.space import Space
from fwd.protocol.frames import Channel
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import (
    Cancel,
    Failed,
    Finished,
    Ping,
    Pong,
    PromptLogprobs,
    Submit,
    Tokens,
    from_engine,
    to_engine,
)
from fwd.protocol.values import Limits

PAGE, CHUNK = 4, 8


class Front:
    """The front's end of a loop that runs in a thread."""

    def __init__(self, pages=64, max_seqs=16, **runner):
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours, from_engine)
        self.space = Space((FULL,), (pages,), PAGE, chunk=CHUNK, key=b"key")
        self.runner = MockRunner(PAGE, CHUNK, **runner)
        self.loop = Loop(Channel(theirs, to_engine), self.runner, self.space, max_seqs=max_seqs, chunk=CHUNK)
        self.error = None
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            self.loop.run()
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.loop._channel.close()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.channel.close()
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert self.error is None
        self.loop._scheduler._stop_refill()
        self.space.check()
        assert self.space.main.available == self.space.main.total

    def collect(self, requests):
        """Read until all of `requests` ended: output, result and prompt scores by id."""
        output = {request.id: [] for request in requests}
        scores = {request.id: [] for request in requests}
        results = {}
        while len(results) < len(requests):
            message = self.channel.receive(20)
            assert message is not None, "the loop stands still"
            match message:
                case Tokens():
                    given = len(next(r for r in requests if r.id == message.id).emitted) // 4
                    assert message.start == given + len(output[message.id])
                    output[message.id] += message.ids
                case PromptLogprobs():
                    assert message.start == 1 + len(scores[message.id])
                    scores[message.id] += message.logprobs
                case Finished() | Failed():
                    results[message.id] = message
        return output, results, scores


def submit(number, prompt, seed=0, tokens=8, emitted=(), **fields):
    limits = Limits(max_tokens=tokens, stop_ids=fields.pop("stop_ids", ()))
    return Submit(id=number, prompt=pack_ids(prompt), emitted=pack_ids(emitted), seed=seed, limits=limits, **fields)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_one_request_gives_the_oracle(length, tokens):
    prompt = list(range(length))
    with Front() as front:
        request = submit(1, prompt, seed=5, tokens=tokens)
        front.channel.send(request)
        output, results, _ = front.collect([request])

        assert output[1] == oracle(prompt, 5, tokens)
        assert results[1].reason == "length"


@pytest.mark.parametrize("seed", range(40))
def test_random_arrivals_resumes_and_preemptions_change_nothing(seed):
    """Half of the requests arrive with a part of their output known, and the pool holds only a few of them at once."""
    rng = random.Random(seed)
    requests = []
    for number in range(1, 25):
        prompt = [rng.randrange(97) for _ in range(rng.randrange(1, 40))]
        tokens, stops = rng.randrange(1, 30), tuple(rng.sample(range(97), rng.randrange(3)))
        answer = oracle(prompt, number, tokens, stops)
        known = rng.randrange(len(answer) + 1) if rng.random() < 0.5 else 0
        requests.append(
            submit(
                number,
                prompt,
                number,
                tokens,
                answer[:known],
                stop_ids=stops,
                priority=rng.choice(["interactive", "background"]),
            )
        )
    with Front(pages=rng.randrange(18, 60), max_seqs=rng.randrange(1, 17), ahead=seed % 2 == 0) as front:
        for request in requests:
            front.channel.send(request)
        output, results, _ = front.collect(requests)

        for request in requests:
            prompt, emitted = list(request.prompt.cast("i")), list(request.emitted.cast("i"))
            answer = oracle(prompt, request.seed, request.limits.max_tokens, request.limits.stop_ids)
            assert emitted + output[request.id] == answer
            assert results[request.id].reason == ("stop" if answer[-1] in request.limits.stop_ids else "length")


@pytest.mark.parametrize("seed", range(60))
def test_two_classes_in_a_full_pool_always_find_work(seed):
    """A background request that decodes gives way to an interactive prompt, and is replayed."""
    rng = random.Random(seed)
    requests = [
        submit(number, [number] * rng.randrange(1, 24), number, 24, priority=rng.choice(["interactive", "background"]))
        for number in range(1, 9)
    ]
    with Front(pages=12, max_seqs=4, ahead=seed % 2 == 0) as front:
        front.channel.send(*requests)
        output, _, _ = front.collect(requests)

        for request in requests:
            assert output[request.id] == oracle(request.prompt.cast("i"), request.id, 24)


@pytest.mark.parametrize("seed", range(10))
def test_cancelled_requests_free_their_pages_and_touch_no_other(seed):
    rng = random.Random(seed)
    requests = [submit(n, [n] * rng.randrange(1, 30), n, tokens=20) for n in range(1, 13)]
    cancelled = set(rng.sample(range(1, 13), 6))
    with Front(pages=30, ahead=seed % 2 == 0) as front:
        for request in requests:
            front.channel.send(request)
            if request.id in cancelled:
                front.channel.send(Cancel(id=request.id))
        front.channel.send(Cancel(id=999))
        output, results, _ = front.collect(requests)

        for request in requests:
            answer = oracle([request.id] * (len(request.prompt) // 4), request.id, 20)
            assert output[request.id] == answer[: len(output[request.id])]
            ended = results[request.id].reason
            assert ended == "cancelled" if len(output[request.id]) < 20 else ended in {"length", "cancelled"}
            assert ended == "length" or request.id in cancelled


@pytest.mark.parametrize("ahead", [False, True])
def test_at_most_one_further_step_runs_for_a_cancelled_request(ahead):
    front = Front(ahead=ahead)
    sent = []

    def cancel():
        if len(front.runner.launches) == 3 and not sent:
            front.channel.send(Cancel(id=1))
            sent.append(len(front.runner.launches))

    front.runner.before = cancel
    with front:
        request = submit(1, [1], tokens=50)
        front.channel.send(request)
        _, results, _ = front.collect([request])

        assert results[1].reason == "cancelled"
        launches = [launch for launch in front.runner.launches if launch[1] in (1, (1,))]
        assert len(launches) <= sent[0] + 1


@pytest.mark.parametrize("ahead", [False, True])
def test_a_row_that_is_not_finite_ends_its_own_request_only(ahead):
    with Front(ahead=ahead, fail=lambda request: request.id == 2) as front:
        requests = [submit(n, [n, n], n) for n in (1, 2, 3)]
        front.channel.send(*requests)
        output, results, _ = front.collect(requests)

        assert results[2].code == "non_finite_logits"
        assert output[1] == oracle([1, 1], 1, 8)
        assert output[3] == oracle([3, 3], 3, 8)


def test_a_running_stream_waits_for_at_most_one_chunk():
    with Front(pages=200) as front:
        decoding, long = submit(1, [1], tokens=30), submit(2, [2] * 20 * CHUNK, tokens=1)
        front.channel.send(decoding, long)
        front.collect([decoding, long])

        kinds = [launch[0] for launch in front.runner.launches if launch[1]]  # 0: an ended answer, prefilled when idle
        first, last = kinds.index("decode"), max(i for i, kind in enumerate(kinds) if kind == "prefill")
        assert all(kinds[i] != kinds[i + 1] for i in range(first, last))


def test_replay_takes_as_many_rows_as_fit():
    answer = oracle([1], 0, 40)
    with Front() as front:
        request = submit(1, [1], tokens=40, emitted=answer[:32])
        front.channel.send(request)
        output, _, _ = front.collect([request])

        assert output[1] == answer[32:]
        assert [launch[2] for launch in front.runner.launches[:3]] == [1, 16, 16]


def test_prompt_scores_come_once_per_token_and_max_tokens_zero_draws_nothing():
    prompt = list(range(20))
    with Front() as front:
        request = submit(1, prompt, tokens=0, prompt_logprobs=0)
        front.channel.send(request)
        output, results, scores = front.collect([request])

        assert scores[1] == [-float(token) for token in prompt[1:]]
        assert output[1] == []
        assert results[1].reason == "length"


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_stream_whose_end_was_lost_ends_at_once(reason):
    """The engine died after the last token was journaled and before `Finished`."""
    answer = oracle([1], 0, 5)
    stops = (answer[-1],) if reason == "stop" else ()
    assert answer.index(answer[-1]) == 4
    with Front() as front:
        request = submit(1, [1], tokens=5 if reason == "length" else 9, emitted=answer, stop_ids=stops)
        front.channel.send(request)
        output, results, _ = front.collect([request])

        assert output[1] == []
        assert results[1].reason == reason


def test_ping_tells_steps_and_pages():
    with Front() as front:
        front.channel.send(Ping(seq=7))
        pong = front.channel.receive(20)

        assert pong == Pong(seq=7, pages_free=64, pages_total=64)


def test_drafts_that_a_grammar_forbids_are_no_rows_of_a_step():
    guesser = Guesser(random.Random(3), "liar")
    told, spans = [], []
    guesser.measured = lambda rows, drafts, seconds: told.append((rows, drafts))
    made = engine(speculator=guesser, seqs=3)
    made.runner.launch = lambda each, launch=made.runner.launch: (spans.append(each), launch(each))[1]
    for number in range(3):
        made.handle(mock_engine.submit(number, [number], tokens=8, grammar=GRAMMARS["digits"][0], seed=number))
    made.idle()
    assert told == [
        (sum(span.reach - span.start for span in each), sum(len(span.drafts) for span in each)) for each in spans
    ]
    assert any(rows == len(each) for (rows, _), each in zip(told, spans, strict=True))
