"""`fwd.sock`: clients cannot harm each other or the daemon, and only its own user administers it."""

import asyncio
import errno
import socket
import threading

import pytest
from census import open_descriptors
from fakes import Fault, Script, answer, expected
from msgspec.structs import replace
from rig import LETTERS, MODEL, serving

from fwd.config import Config
from fwd.front import local
from fwd.protocol.frames import Channel
from fwd.protocol.ids import pack_ids
from fwd.protocol.local import (
    Accepted,
    Done,
    Prompt,
    Requests,
    RequestsQuery,
    Status,
    StatusQuery,
    Stop,
    Text,
    from_daemon,
)
from fwd.protocol.messages import Cancel, Failed, Finished, Hello, Ping, PromptLogprobs, Submit, Tokens
from fwd.protocol.values import Limits, Sampling, Timing

PACED = Script(vocab=127, low=32, pace="ping")
BAD = {
    "garbage": b"\x05\0\0\0\xff\xc1\xc1\xc1\xc1",
    "too long": b"\xff\xff\xff\xff",
    "unknown tag": b"\x02\0\0\0\x91\x7f",
    "a message for engines": b"\x03\0\0\0\x92\x05\1",
    "wrong type": b"\x03\0\0\0\x92\x04\xa0",
}


@pytest.fixture
def uds(tmp_path):
    return tmp_path / "fwd.sock"


def dial(daemon, *, greet=True):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(daemon.uds))
    channel = Channel(sock, from_daemon)
    assert isinstance(channel.receive(30), Hello)
    if greet:
        channel.send(Hello())
    return channel


def until(channel, *kinds):
    """The messages up to the first of one of `kinds`, that one included."""
    messages = []
    while not messages or not isinstance(messages[-1], kinds):
        message = channel.receive(30)
        assert message is not None
        messages.append(message)
    return messages


def submit(tag, prompt=(40, 41), max_tokens=20, **fields):
    return Submit(id=tag, prompt=pack_ids(prompt), seed=tag, limits=Limits(max_tokens=max_tokens), **fields)


def ids_of(messages):
    return [token for message in messages if isinstance(message, Tokens) for token in message.ids]


def test_raw_ids_are_relayed(uds):
    with serving(uds) as daemon:
        channel = dial(daemon)
        request = submit(5, range(30, 90), 700, sampling=Sampling(logprobs=1), prompt_logprobs=2)
        channel.send(request)
        accepted, *events, finished = until(channel, Finished)
        channel.close()
    assert accepted == Accepted(tag=5, id=1, seed=5, prompt_tokens=60)
    assert ids_of(events) == answer(LETTERS, request)[0]
    assert [score for event in events if isinstance(event, PromptLogprobs) for score in event.top]
    assert {event.id for event in events} == {finished.id} == {1}
    assert all(len(event.logprobs) == len(event.top) == len(event.ids) for event in events if isinstance(event, Tokens))


def test_text(uds):
    with serving(uds) as daemon:
        channel = dial(daemon)
        channel.send(Prompt(id=1, body=memoryview(b"abc"), seed=3, limits=Limits(max_tokens=9)))
        accepted, *texts, finished = until(channel, Finished)
        channel.close()
    assert accepted.prompt_tokens == 3
    assert "".join(text.text for text in texts) == bytes(expected(b"abc", 3, 0, 9, LETTERS)).decode()
    assert sum(text.tokens for text in texts) == 9
    assert finished.reason == "length"


def test_an_answer_ends_at_a_stop_string(uds):
    script = Script(text=tuple(b"one two three "), vocab=127)
    with serving(uds, script) as daemon:
        channel = dial(daemon)
        channel.send(Prompt(id=1, body=memoryview(b"x"), stops=("o th", "zzz")))
        _, *texts, finished = until(channel, Finished)
        daemon.wait(daemon.idle())
        assert daemon.call(lambda: daemon.service.tokens_out) < 4000
        channel.close()
    assert "".join(text.text for text in texts) == "one tw"
    assert sum(text.tokens for text in texts) == len("one two th")
    assert finished.reason == "stop"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_frame_ends_its_own_connection_only(uds, name):
    with serving(uds, PACED) as daemon:
        rude, polite = dial(daemon), dial(daemon)
        polite.send(request := submit(1))
        rude.send(submit(2, max_tokens=4000))
        until(rude, Accepted)
        rude.sock.sendall(BAD[name])
        refusal = until(rude, Failed)[-1]
        with pytest.raises((EOFError, ConnectionResetError)):
            until(rude, Finished)
        events = until(polite, Finished)
        assert daemon.wait(daemon.idle()) is None
        rude.close()
        polite.close()
    assert refusal.code == "bad_frame"
    assert ids_of(events) == answer(PACED, request)[0]


def test_a_foreign_version_and_a_missing_hello_are_refused(uds):
    with serving(uds) as daemon:
        for first in (Hello(version=2), StatusQuery(), submit(1)):
            channel = dial(daemon, greet=False)
            channel.send(first)
            assert until(channel, Failed)[-1].code == "bad_frame"
            with pytest.raises((EOFError, ConnectionResetError)):
                channel.receive(30)
            channel.close()


def test_a_request_behind_which_the_connection_breaks_at_once(uds):
    with serving(uds) as daemon:
        channel = dial(daemon)
        channel.send(submit(1, max_tokens=4000), Hello(version=2))
        assert until(channel, Failed)[-1].code == "bad_frame"
        channel.close()
        daemon.wait(daemon.idle())


def test_messages_that_are_refused_leave_the_connection_open(uds):
    refused = {"context_length_exceeded": submit(1, max_tokens=4096), "invalid_value": submit(2, [500])}
    with serving(uds) as daemon:
        channel = dial(daemon)
        for code, message in refused.items():
            channel.send(message)
            failed = until(channel, Failed)[-1]
            assert (failed.code, failed.tag) == (code, message.id)
        channel.send(Prompt(id=3, body=memoryview(b"\xff")), Prompt(id=4, kind="chat", body=memoryview(b"[]")))
        assert [until(channel, Failed)[-1].param for _ in range(2)] == ["body", "body"]
        channel.send(StatusQuery())
        assert isinstance(channel.receive(30), Status)
        channel.close()


def test_the_body_of_a_prompt_is_bounded(uds):
    with serving(uds, config=Config(model="fake", max_body=100_000)) as daemon:
        channel = dial(daemon)
        channel.send(Prompt(id=4, body=memoryview(b"x" * 100_001)))
        failed = until(channel, Failed)[-1]
        assert (failed.code, failed.tag) == ("body_too_large", 4)
        assert "100000" in failed.message
        channel.close()


def test_templates_that_do_not_end_hold_up_chats_only(uds):
    begun, going_on = threading.Semaphore(0), threading.Event()

    def render(*_, **__):
        begun.release()
        going_on.wait(60)
        return [50]

    with serving(uds) as daemon:
        daemon.service.prompts.template.encode = render
        channel = dial(daemon)
        chat = memoryview(b'{"messages":[{"role":"user","content":"x"}]}')
        channel.send(*(Prompt(id=tag, kind="chat", body=chat, limits=Limits(max_tokens=1)) for tag in range(1, 50)))
        try:
            assert begun.acquire(timeout=30)
            assert daemon.wait(asyncio.wait_for(asyncio.to_thread(lambda: 5), 30)) == 5
        finally:
            going_on.set()
        assert [until(channel, Finished)[-1].reason for _ in range(49)] == ["length"] * 49
        channel.close()


@pytest.mark.parametrize("where", ["Generation", "relay"])
def test_a_bug_is_answered_and_leaves_nothing_running(uds, monkeypatch, where):
    requests = {"Generation": Prompt(id=5, body=memoryview(b"x")), "relay": submit(5, max_tokens=4000)}
    monkeypatch.setattr(local, where, None)
    with serving(uds, PACED) as daemon:
        channel = dial(daemon)
        channel.send(requests[where])
        failed = until(channel, Failed)[-1]
        assert (failed.code, failed.message, failed.tag) == ("internal_error", "internal error", 5)
        daemon.wait(daemon.idle())
        channel.send(StatusQuery())
        assert channel.receive(30).requests == 0
        channel.close()


def test_a_bug_in_an_admin_message_is_answered(uds, monkeypatch):
    with serving(uds) as daemon:
        monkeypatch.setattr(daemon.service, "status", lambda: 1 / 0)
        channel = dial(daemon)
        channel.send(StatusQuery())
        failed = channel.receive(30)
        assert (failed.code, failed.id, failed.tag) == ("internal_error", 0, None)
        channel.close()


def test_closing_the_connection_cancels_its_requests(uds):
    with serving(uds, PACED) as daemon:
        leaving, staying = dial(daemon), dial(daemon)
        staying.send(request := submit(1))
        leaving.send(submit(2, max_tokens=4000), Prompt(id=3, body=memoryview(b"x"), limits=Limits(max_tokens=4000)))
        until(leaving, Tokens, Text)
        leaving.close()
        assert ids_of(until(staying, Finished)) == answer(PACED, request)[0]
        daemon.wait(daemon.idle())
        staying.close()


def test_cancel(uds):
    with serving(uds, PACED) as daemon:
        channel, other = dial(daemon), dial(daemon)
        for canceller in (channel, other):
            channel.send(submit(1, max_tokens=4000))
            number = until(channel, Accepted)[-1].id
            canceller.send(Cancel(id=number))
            assert until(canceller, Done)
            if canceller is other:
                assert until(channel, Finished)[-1].reason == "cancelled"
            else:
                daemon.wait(daemon.idle())
        other.send(Cancel(id=12345))
        assert until(other, Done) == [Done()]
        channel.close()
        other.close()


def test_only_its_own_user_administers_the_daemon(uds, monkeypatch):
    with serving(uds, PACED) as daemon:
        owner = dial(daemon)
        owner.send(submit(1, max_tokens=4000))
        number = until(owner, Accepted)[-1].id
        monkeypatch.setattr(local, "peer_uid", lambda _: 54321)
        stranger = dial(daemon)
        for forbidden in (Stop(), RequestsQuery(), Cancel(id=number)):
            stranger.send(forbidden)
            assert until(stranger, Failed)[-1].code == "forbidden"
        stranger.send(StatusQuery(), Cancel(id=999))
        assert [type(stranger.receive(30)) for _ in range(2)] == [Status, Done]
        stranger.send(submit(7, max_tokens=4000))
        own = until(stranger, Accepted)[-1].id
        stranger.send(Cancel(id=own))
        until(stranger, Done)
        owner.send(RequestsQuery())
        assert [request.id for request in until(owner, Requests)[-1].requests] == [number]
        owner.close()
        stranger.close()


def test_the_peer_is_who_the_kernel_says():
    left, right = socket.socketpair()
    with left, right:
        assert local.peer_uid(left) == local.os.getuid()


def test_open_requests_of_a_connection_are_bounded(uds, monkeypatch):
    monkeypatch.setattr(local, "MAX_OPEN", 3)
    with serving(uds, PACED) as daemon:
        channel = dial(daemon)
        channel.send(*(submit(tag, max_tokens=4000) for tag in range(1, 5)))
        failed = until(channel, Failed)[-1]
        assert (failed.code, failed.tag) == ("queue_full", 4)
        channel.close()


def test_what_waits_in_the_daemon_is_bounded(uds):
    stands = Script(vocab=127, low=32, always=Fault("stand"))
    with serving(uds, stands, Config(model="fake", max_queue=5)) as daemon:
        channel = dial(daemon)
        for tag in range(MODEL.max_seqs):
            channel.send(submit(tag, max_tokens=4000))
            until(channel, Accepted)
            daemon.wait(daemon.keeper.until(lambda: daemon.keeper.queue.tokens == 0))
        channel.send(*(submit(tag, max_tokens=4000) for tag in range(90, 93)))
        failed = until(channel, Failed)[-1]
        assert (failed.code, failed.tag) == ("queue_full", 92)
        assert "4 tokens wait" in failed.message
        assert "try again in 60 s" in failed.message  # an engine that stands computes nothing
        channel.send(StatusQuery())
        status = until(channel, Status)[-1]
        assert (status.queue_tokens, status.queue_limit) == (4, 5)
        assert daemon.call(lambda: daemon.service.shed["queue_full"]) == 1
        channel.close()


def test_a_prompt_is_refused_before_it_is_encoded(uds):
    stands = Script(vocab=127, low=32, always=Fault("stand"))
    with serving(uds, stands, Config(model="fake", max_queue=1)) as daemon:
        channel = dial(daemon)
        daemon.call(lambda: setattr(daemon.keeper.queue, "tokens", 1))
        daemon.call(lambda: setattr(daemon.service.prompts, "body", None))
        channel.send(Prompt(id=3, body=memoryview(b"hello")))
        failed = until(channel, Failed)[-1]
        assert (failed.code, failed.tag) == ("queue_full", 3)
        daemon.call(lambda: setattr(daemon.keeper.queue, "tokens", 0))
        channel.close()


def test_what_a_prompt_says_of_the_cache_reaches_the_engine(uds):
    with serving(uds) as daemon:
        channel, seen = dial(daemon), []
        daemon.service.observers.append(lambda stream: seen.append(stream.resubmit()))
        channel.send(Prompt(id=1, body=memoryview(b"hi"), limits=Limits(max_tokens=2), cache_key="mine", cache=False))
        until(channel, Finished)
        channel.send(submit(2, max_tokens=2, cache_key="raw"))
        until(channel, Finished)
        channel.close()
    assert [(one.cache_key, one.cache) for one in seen] == [("mine", False), ("raw", True)]


def test_a_stop_string_keeps_the_account_of_the_engine(uds):
    told = Timing(cached_tokens=1, cache_miss="differs", differs_at=1)
    with serving(uds, Script(vocab=127, low=32, text=tuple(b"one stop two"), cached=told)) as daemon:
        channel = dial(daemon)
        channel.send(Prompt(id=1, body=memoryview(b"hi"), limits=Limits(max_tokens=3000), stops=("stop",)))
        finished = until(channel, Finished)[-1]
        channel.close()
    assert finished.reason == "stop"
    assert replace(finished.timing, steps=0) == told


def test_a_long_prompt_comes_as_a_memfd(uds):
    script = Script(vocab=127, low=32, context=1 << 20)
    before = open_descriptors()
    with serving(uds, script) as daemon:
        channel = dial(daemon)
        channel.send(request := submit(1, [50] * 500_000, 5))
        accepted, *events = until(channel, Finished)
        channel.close()
        daemon.wait(daemon.idle())
    assert accepted.prompt_tokens == 500_000
    assert ids_of(events) == answer(script, request)[0]
    del request, daemon
    assert open_descriptors() == before


def test_a_slow_reader_slows_nobody_and_loses_nothing(uds):
    script = Script(vocab=127, low=32, context=200_000, per_frame=(64,))
    with serving(uds, script) as daemon:
        slow, quick = dial(daemon), dial(daemon)
        slow.send(long := submit(1, max_tokens=150_000, sampling=Sampling(logprobs=5)))
        quick.send(short := submit(2, max_tokens=5_000))
        assert ids_of(until(quick, Finished)) == answer(script, short)[0]
        daemon.wait(daemon.idle())
        assert daemon.call(lambda: daemon.service.tokens_out) == 155_000
        assert ids_of(until(slow, Finished)) == answer(script, long)[0]
        slow.close()
        quick.close()


def test_a_slow_reader_of_text_loses_nothing(uds):
    script = Script(vocab=127, low=32, context=2_000_000, per_frame=(4096,))
    with serving(uds, script) as daemon:
        channel = dial(daemon)
        channel.send(Prompt(id=1, body=memoryview(b"x"), seed=1, limits=Limits(max_tokens=1_500_000)))
        daemon.wait(daemon.keeper.until(lambda: daemon.service.tokens_out == 1_500_000))
        _, *texts, _ = until(channel, Finished)
        channel.close()
    assert "".join(text.text for text in texts) == bytes(expected(b"x", 1, 0, 1_500_000, script)).decode()


def test_tokens_given_before_count_in_the_context(uds):
    with serving(uds) as daemon:
        channel = dial(daemon)
        channel.send(request := submit(1, max_tokens=10, emitted=pack_ids(expected([40, 41], 1, 0, 4, LETTERS))))
        assert ids_of(until(channel, Finished)) == answer(LETTERS, request)[0][4:]
        channel.send(submit(2, emitted=pack_ids([50] * 4095)))
        assert until(channel, Failed)[-1].code == "context_length_exceeded"
        channel.close()


def test_a_daemon_out_of_descriptors_accepts_again_later(uds, monkeypatch):
    accept, refusals = socket.socket.accept, iter(range(2))

    def exhausted(listener):
        if next(refusals, None) is not None:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(local, "PAUSE", 0.01)
    monkeypatch.setattr(socket.socket, "accept", exhausted)
    with serving(uds) as daemon:
        dial(daemon).close()
    assert next(refusals, None) is None


def test_stop(uds):
    with serving(uds) as daemon:
        channel = dial(daemon)
        channel.send(Stop())
        assert channel.receive(30) == Done()
        with pytest.raises((EOFError, ConnectionResetError)):
            channel.receive(30)
        channel.close()


def test_an_engine_message_from_a_client_is_a_bad_frame(uds):
    with serving(uds) as daemon:
        channel = dial(daemon)
        channel.send(Ping(seq=1))
        assert until(channel, Failed)[-1].code == "bad_frame"
        channel.close()


def test_a_deadline_ends_the_request_with_its_own_error(uds):
    limits = Limits(max_tokens=20, deadline_ms=20)
    with serving(uds, PACED, Config(ping_interval=60)) as daemon:
        channel = dial(daemon)
        channel.send(Submit(id=1, prompt=pack_ids((40, 41)), limits=limits))
        *_, failed = until(channel, Failed, Finished)

        assert failed.code == "deadline_exceeded"
        channel.close()
