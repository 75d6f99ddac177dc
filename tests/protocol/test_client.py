"""The public clients, blocking and on asyncio, against a daemon on a fake engine."""

import asyncio
import threading

import pytest
from census import open_descriptors
from fakes import Script, expected
from rig import LETTERS, serving

import fwd
from fwd.errors import (
    BadRequestError,
    ContextLengthError,
    EngineError,
    ForbiddenError,
    NotRunningError,
    PoisonedError,
)
from fwd.front import local
from fwd.protocol.client import AsyncClient, Client
from fwd.protocol.ids import pack_ids
from fwd.protocol.local import Accepted
from fwd.protocol.messages import PromptLogprobs, Submit, Tokens
from fwd.protocol.requests import prompt_message, submit_message
from fwd.protocol.values import Draft, Limits, Sampling

PACED = Script(vocab=127, low=32, pace="ping")
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def uds(tmp_path):
    return tmp_path / "fwd.sock"


def text_of(prompt, seed, n):
    return bytes(expected(prompt, seed, 0, n, LETTERS)).decode()


def ids_of(events):
    return [token for event in events if isinstance(event, Tokens) for token in event.ids]


def test_the_public_names():
    assert fwd.Client is Client
    assert fwd.AsyncClient is AsyncClient
    with pytest.raises(AttributeError, match="Klient"):
        fwd.Klient  # noqa: B018


def test_blocking(uds):
    before = open_descriptors()
    with serving(uds) as daemon, Client(uds) as client:
        assert "".join(client.generate("abc", seed=4, max_tokens=30)) == text_of(b"abc", 4, 30)
        assert "".join(client.generate(CHAT, seed=5, max_tokens=9)) == text_of(b"user: hi\n", 5, 9)
        accepted, *events, finished = client.submit([50, 51], seed=6, max_tokens=25, logprobs=1, prompt_logprobs=0)
        assert accepted == Accepted(tag=3, id=3, seed=6, prompt_tokens=2)
        assert isinstance(events[0], PromptLogprobs)
        assert ids_of(events) == expected([50, 51], 6, 0, 25, LETTERS)
        assert finished.reason == "length"
        assert client.status().state == "ready"
        assert client.status().pid > 0
        assert client.requests() == []
        assert daemon.call(lambda: daemon.service.tokens_out) == 64
    assert open_descriptors() == before


def test_several_requests_are_read_in_turns(uds):
    with serving(uds), Client(uds) as client:
        streams = [client.generate("abc", seed=seed, max_tokens=40) for seed in range(5)]
        firsts = [next(stream) for stream in streams]
        texts = [first + "".join(stream) for first, stream in zip(firsts, streams, strict=True)]
    assert texts == [text_of(b"abc", seed, 40) for seed in range(5)]


def test_closing_an_iterator_cancels_its_request(uds):
    with serving(uds, PACED) as daemon, Client(uds) as client:
        stream = client.generate("abc", max_tokens=4000)
        next(stream)
        assert [request.id for request in client.requests()] == [1]
        stream.close()
        daemon.wait(daemon.idle())
        assert client.requests() == []
        assert "".join(client.generate("abc", seed=1, max_tokens=3)) == text_of(b"abc", 1, 3)


def test_cancel_by_another_connection(uds):
    with serving(uds, PACED), Client(uds) as client, Client(uds) as other:
        events = client.events("abc", max_tokens=4000)
        accepted = next(events)
        other.cancel(accepted.id)
        assert list(events)[-1].reason == "cancelled"
        other.cancel(accepted.id)


def test_errors_come_as_they_are_named(uds, monkeypatch):
    script = Script(vocab=127, low=32, poison=(99,))
    with serving(uds, script), Client(uds) as client:
        with pytest.raises(ContextLengthError, match="4096"):
            list(client.submit([50], max_tokens=5000))
        with pytest.raises(BadRequestError, match="vocabulary"):
            list(client.submit([500]))
        with pytest.raises(PoisonedError):
            list(client.submit([99]))
        assert "".join(client.generate("ab", seed=1, max_tokens=3)) == text_of(b"ab", 1, 3)
        monkeypatch.setattr(local, "peer_uid", lambda _: 54321)
        with Client(uds) as stranger, pytest.raises(ForbiddenError, match="54321"):
            stranger.stop()


def test_stop_waits_until_the_daemon_is_gone(uds):
    with serving(uds, PACED) as daemon, Client(uds) as client, Client(uds) as other:
        events = other.events("abc", max_tokens=4000)
        next(events)
        client.stop()
        with pytest.raises(EngineError, match="closed the connection"):
            list(events)
        assert daemon.stopped.is_set()


def test_no_daemon(uds, tmp_path):
    before = open_descriptors()
    with pytest.raises(NotRunningError, match="fwd serve"):
        Client(uds)
    with pytest.raises(NotRunningError, match="too long"):
        Client(tmp_path / ("x" * 200))
    uds.touch()
    with pytest.raises(NotRunningError, match="refused"):
        Client(uds)
    assert open_descriptors() == before


def test_asyncio(uds, run):
    async def main():
        async with AsyncClient(uds) as client:
            chunks = [client.generate("abc", seed=seed, max_tokens=40) for seed in range(5)]
            texts = await asyncio.gather(*(collect(stream) for stream in chunks))
            assert ["".join(pieces) for pieces in texts] == [text_of(b"abc", seed, 40) for seed in range(5)]
            events = await collect(client.submit([50], seed=1, max_tokens=9))
            assert ids_of(events) == expected([50], 1, 0, 9, LETTERS)
            status, requests = await asyncio.gather(client.status(), client.requests())
            assert (status.state, requests) == ("ready", [])
            with pytest.raises(ContextLengthError):
                await collect(client.submit([50], max_tokens=5000))

    before = open_descriptors()
    with serving(uds):
        run(main())
    assert open_descriptors() == before


def test_asyncio_closing_cancels(uds, run):
    async def main(daemon):
        async with AsyncClient(uds) as client:
            stream = client.events("abc", max_tokens=4000)
            assert isinstance(await anext(stream), Accepted)
            await stream.aclose()
            await asyncio.to_thread(daemon.wait, daemon.idle())
            reader = asyncio.create_task(collect(client.generate("abc", max_tokens=4000)))
            await asyncio.to_thread(daemon.wait, opened(daemon))
            reader.cancel()
            await asyncio.wait([reader])
            await asyncio.to_thread(daemon.wait, daemon.idle())

    async def opened(daemon):
        await daemon.keeper.until(lambda: daemon.service.requests().requests != [])

    with serving(uds, PACED) as daemon:
        run(main(daemon))


def test_asyncio_the_daemon_goes_away(uds, run):
    async def main(daemon):
        async with AsyncClient(uds) as client:
            stream = client.events("abc", max_tokens=4000)
            await anext(stream)
            daemon.call(daemon.stopped.set)
            with pytest.raises(EngineError, match="closed the connection"):
                await collect(stream)

    with serving(uds, PACED) as daemon:
        run(main(daemon))


def interrupted_once(client, monkeypatch):
    """Ctrl-C at the client's next wait."""
    receive, pending = client._channel.receive, [KeyboardInterrupt()]

    def receive_or_raise():
        if pending:
            raise pending.pop()
        return receive()

    monkeypatch.setattr(client._channel, "receive", receive_or_raise)


def ended(daemon):
    """Wait until a request has ended; the list is of those that did."""
    streams = []
    daemon.call(lambda: daemon.service.observers.append(streams.append))

    async def one():
        await daemon.keeper.until(lambda: bool(streams))
        return streams

    return one


def test_an_interrupted_ask_leaves_later_answers_in_their_place(uds, monkeypatch):
    with serving(uds), Client(uds) as client:
        interrupted_once(client, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            client.status()
        assert client.requests() == []
        assert client.status().state == "ready"


def test_a_request_interrupted_before_it_has_an_id_is_cancelled(uds, monkeypatch):
    with serving(uds, PACED) as daemon, Client(uds) as client:
        over = ended(daemon)
        interrupted_once(client, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            next(client.generate("abc", max_tokens=4000))
        other = client.generate("abc", seed=1, max_tokens=3)
        assert "".join(other) == text_of(b"abc", 1, 3)
        assert client.requests() == []
        assert daemon.wait(over())[0].finished.reason == "cancelled"


def test_asyncio_a_cancelled_ask_leaves_later_answers_in_their_place(uds, run):
    async def main():
        async with AsyncClient(uds) as client:
            asked = [asyncio.create_task(client.status()) for _ in range(3)]
            await asyncio.sleep(0)
            asked[0].cancel()
            assert await client.requests() == []
            assert [(await asked[i]).state for i in (1, 2)] == ["ready", "ready"]

    with serving(uds):
        run(main())


def test_asyncio_a_request_cancelled_before_it_has_an_id(uds, run):
    async def main(daemon):
        over = ended(daemon)
        async with AsyncClient(uds) as client:
            reader = asyncio.create_task(collect(client.events("abc", max_tokens=4000)))
            await asyncio.sleep(0)
            reader.cancel()
            await asyncio.wait([reader])
            (stream,) = await asyncio.to_thread(daemon.wait, over())
            assert stream.finished.reason == "cancelled"
            assert await client.requests() == []

    with serving(uds, PACED) as daemon:
        run(main(daemon))


def test_a_daemon_that_is_gone_is_named(uds):
    with serving(uds), Client(uds) as client:
        client.stop()
        with pytest.raises(EngineError, match="closed the connection"):
            client.status()
        with pytest.raises(EngineError, match="closed the connection"):
            next(client.generate("abc"))


async def collect(stream):
    return [item async for item in stream]


def test_threads_with_a_client_each(uds):
    texts = {}

    def work(seed):
        with Client(uds) as client:
            texts[seed] = "".join(client.generate("abc", seed=seed, max_tokens=100))

    with serving(uds):
        threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert texts == {seed: text_of(b"abc", seed, 100) for seed in range(4)}


def test_options_find_their_place():
    message = prompt_message(
        3, "x", {"temperature": 0.5, "max_tokens": 7, "drafter": "off", "stops": ("a",), "seed": 1}
    )
    assert message.sampling == Sampling(temperature=0.5)
    assert message.limits == Limits(max_tokens=7)
    assert message.draft == Draft(drafter="off")
    assert (message.id, message.stops, message.seed, bytes(message.body)) == (3, ("a",), 1, b"x")
    raw = submit_message(3, [1, 2], {"emitted": [5], "choice": 2, "top_k": 4})
    assert raw == Submit(id=3, prompt=pack_ids([1, 2]), emitted=pack_ids([5]), choice=2, sampling=Sampling(top_k=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "unknown option 'temprature'"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": float("nan")}, "NaN"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"top_k": "many"}, "top_k"),
        ({"seed": 2**70}, "seed"),
        ({"priority": "urgent"}, "priority"),
        ({"drafter": "oracle"}, "drafter"),
    ],
)
def test_options_are_checked_before_they_are_sent(options, message):
    with pytest.raises(BadRequestError, match=message):
        prompt_message(1, "x", options)
    with pytest.raises(BadRequestError, match=message):
        submit_message(1, [1], options)
