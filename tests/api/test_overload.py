"""A thousand long requests at once: each is answered with its own bytes, or told at once when to come again."""

import asyncio
import gc
import random

import aiohttp
import fakes
import pytest
from apiserver import events, script, serving, text
from census import open_descriptors, resident_bytes

from fwd.front.queue import LATEST, SOONEST, Queue

COMPLETE = "/v1/completions"
REQUESTS = 1000
SOCKETS = 200  # of the client; as many again are the server's
LONG = 2000
LIMIT = 60_000
SEED = 20261124


def wanted(number):
    """The prompt of a request; every one begins differently."""
    return [16 + (number * 7919 + place * 31) % 100 for place in range(LONG + number % 500)]


async def ask(server, session, number):
    """The text of an answer, or None for one that was refused well."""
    stream = number % 2 == 0
    body = {"prompt": wanted(number), "max_tokens": 1 + number % 20, "seed": number, "stream": stream}
    async with session.post(server.url + COMPLETE, json=body) as response:
        if response.status == 429:
            assert (await response.json())["error"]["code"] == "queue_full"
            assert SOONEST <= int(response.headers["Retry-After"]) <= LATEST
            return None
        assert response.status == 200, await response.text()
        if not stream:
            return (await response.json())["choices"][0]["text"]
        *chunks, done = [event for event in events(await response.read()) if not isinstance(event, str) or "[" in event]
        assert done == "[DONE]"
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)


async def wave(server, engine, order):
    """Ask everything at once; how many were served."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=SOCKETS)) as session:
        answers = await asyncio.gather(*(ask(server, session, number) for number in order))
    for number, answer in zip(order, answers, strict=True):
        if answer is not None:
            assert answer == text(fakes.expected(wanted(number), number, 0, 1 + number % 20, engine))
    await server.idle()
    gc.collect()
    return sum(answer is not None for answer in answers)


@pytest.fixture
def filled(monkeypatch):
    """The queue's tokens after every entry."""
    seen, enter = [], Queue.enter

    def noted(queue, stream):
        enter(queue, stream)
        seen.append(queue.tokens)

    monkeypatch.setattr(Queue, "enter", noted)
    return seen


def test_a_thousand_long_requests(folder, run, filled):
    order = random.Random(SEED).sample(range(REQUESTS), REQUESTS)
    engine = script(chunk=512)

    async def scenario():
        async with serving(folder, engine, ping_interval=0.02, hang_timeout=30.0, max_queue=LIMIT) as server:
            served = await wave(server, engine, order)
            assert LIMIT // (LONG + 500) <= served < REQUESTS
            assert server.service.shed["queue_full"] == REQUESTS - served
            held, resident = open_descriptors(), resident_bytes()
            for _ in range(2):
                await wave(server, engine, order)
            assert open_descriptors() <= held
            assert resident_bytes() < resident + (32 << 20)
            assert server.keeper.restarts == {}
            assert server.keeper.queue.tokens == 0

    run(scenario())
    assert max(filled) <= LIMIT


def test_a_thousand_long_requests_and_a_dying_engine(folder, run, tmp_path, filled):
    order = random.Random(SEED).sample(range(REQUESTS), REQUESTS)
    faults = tuple(fakes.Fault("kill", after=100) for _ in range(3))
    engine = script(chunk=512, faults=faults, lives=str(tmp_path / "lives"))

    async def scenario():
        async with serving(folder, engine, ping_interval=0.02, hang_timeout=30.0, max_queue=LIMIT) as server:
            assert await wave(server, engine, order) > 0
            assert server.keeper.restarts == {"signal SIGKILL": 3}
            assert server.keeper.queue.tokens == 0

    run(scenario())
