"""Promises 1 and 2: same seed, same bytes, whatever happens beside a request or to the engine; no stream is lost."""

import random

import checkpoints
import pytest
from census import open_descriptors, resident_bytes
from harness import ended, kill, record, run, serving, submissions

from fwd.models.load import run_spec
from fwd.models.spec import read_spec

TOKENS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    checkpoints.make("llama3-rope", path)
    return path


@pytest.fixture(scope="module")
def alone(folder):
    """What each request gives when nothing else runs, by dtype."""
    known = {}

    async def work(dtype):
        async with serving(folder, dtype=dtype) as service:
            records = []
            for request in requests():
                stream = service.open(request)
                await ended(stream)
                records.append(record(stream))
            return records

    def of(dtype):
        if dtype not in known:
            known[dtype] = run(work(dtype))
        return known[dtype]

    return of


def requests():
    return submissions(seed=11, count=16, vocab=checkpoints.VOCAB, tokens=TOKENS)


async def tokens_more(streams, count):
    """Wait until `count` further tokens were journaled, or all streams ended."""
    goal = sum(len(stream.emitted) for stream in streams) + count
    while sum(len(stream.emitted) for stream in streams) < goal:
        running = [stream for stream in streams if not stream.done]
        if not running:
            return
        await running[0].wait(len(running[0].emitted))


async def settled(service):
    """Nothing is held any more: all pages are free."""
    keeper = service.supervisor.active
    while (
        keeper.pong.running
        or keeper.pong.waiting
        or keeper.pong.pages_free + keeper.pong.pages_cached < keeper.pong.pages_total
    ):
        await ended(service.open(requests()[1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [1, 2])
def test_beside_fifteen_others_arriving_at_random(folder, alone, dtype, seed):
    rng = random.Random(seed)
    order = list(enumerate(requests()))
    rng.shuffle(order)

    async def work():
        async with serving(folder, dtype=dtype) as service:
            streams = {}
            for index, request in order:
                streams[index] = service.open(request)
                await tokens_more(list(streams.values()), rng.choice([0, 0, 1, 5, 30]))
            await ended(*streams.values())
            return [record(streams[index]) for index in range(16)]

    assert run(work()) == alone(dtype)


def test_in_a_pool_too_small_for_all_of_them(folder, alone):
    """512 tokens of KV for 16 requests: they wait for and preempt each other."""
    spec = run_spec(read_spec(folder), "float32")

    async def work():
        async with serving(folder, dtype="float32", kv_bytes=spec.kv_bytes(512, "float32")) as service:
            pages = service.info().pages
            streams = [service.open(request) for request in requests()]
            await ended(*streams)
            return pages, [record(stream) for stream in streams]

    pages, records = run(work())

    assert pages * 16 < sum(len(request.prompt) // 4 + TOKENS for request in requests())
    assert records == alone("float32")


async def survive(folder, dtype, kills, seed):
    """Kill the engine `kills` times at random tokens while the requests run, as often round as that takes."""
    rng = random.Random(seed)
    rounds = []
    async with serving(folder, dtype=dtype) as service:
        streams, resumes = [], 0
        before, memory = open_descriptors(), resident_bytes()
        for _ in range(kills):
            if not any(not stream.done for stream in streams):
                rounds.append(streams := [service.open(request) for request in requests()])
            await tokens_more(streams, rng.choice([1, 2, rng.randrange(3, 90)]))
            if all(stream.done for stream in streams):
                rounds.append(streams := [service.open(request) for request in requests()])
                await tokens_more(streams, 1)
            kill(service)
        await ended(*streams)
        resumes = service.supervisor.active.resumes
        await settled(service)
        assert open_descriptors() <= before
        assert resident_bytes() - memory < 32 << 20
        restarts = service.supervisor.active.restarts
        return [[record(stream) for stream in streams] for streams in rounds], restarts, resumes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twenty_kills_lose_double_and_change_nothing(folder, alone, dtype):
    rounds, restarts, resumes = run(survive(folder, dtype, 20, seed=3))

    assert restarts == {"signal SIGKILL": 20}
    assert resumes >= 20
    for records in rounds:
        assert records == alone(dtype)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_hundred_kills(folder, alone, dtype, monkeypatch):
    monkeypatch.setattr("harness.LIMIT", 3000)
    rounds, restarts, _ = run(survive(folder, dtype, 200, seed=4))

    assert restarts == {"signal SIGKILL": 200}
    for records in rounds:
        assert records == alone(dtype)
