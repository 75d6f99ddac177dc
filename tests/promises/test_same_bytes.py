"""Promises 1 and 2: same seed, same bytes, whatever happens beside a request or to the engine; no stream is lost."""

import random

import checkpoints
import pytest
from census import open_descriptors, resident_bytes
from harness import Cell, ended, kill, record, run, serving, submissions, tokens_more
from msgspec.structs import replace

TOKENS = 64


FULL, NARROW, SLIDING = CELLS = (
    Cell("llama3-rope", "float32"),
    Cell("llama3-rope", "bfloat16"),
    Cell("qwen3-sliding", "bfloat16", "fp8"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {cell.kind: tmp_path_factory.mktemp(cell.kind) for cell in CELLS}
    for kind, path in made.items():
        checkpoints.make(kind, path)
    return made


def serving_cell(folders, cell):
    return serving(folders[cell.kind], dtype=cell.dtype, kv_dtype=cell.kv_dtype)


@pytest.fixture(scope="module")
def alone(folders):
    """What each request gives when nothing else runs and nothing is cached, by cell."""
    known = {}

    async def work(cell):
        async with serving_cell(folders, cell) as service:
            records = []
            for request in requests():
                stream = service.open(replace(request, cache=False))
                await ended(stream)
                records.append(record(stream))
            return records

    def of(cell):
        if cell not in known:
            known[cell] = run(work(cell))
        return known[cell]

    return of


def requests():
    return submissions(seed=11, count=16, vocab=checkpoints.VOCAB, tokens=TOKENS)


async def settled(service):
    """Nothing is held any more: all pages are free."""
    keeper = service.supervisor.active
    while (
        keeper.pong.running
        or keeper.pong.waiting
        or keeper.pong.pages_free + keeper.pong.pages_cached < keeper.pong.pages_total
    ):
        await ended(service.open(requests()[1]))


@pytest.mark.parametrize(("cell", "seed"), [(FULL, 1), (SLIDING, 2)], ids=str)
def test_beside_fifteen_others_arriving_at_random(folders, alone, cell, seed):
    rng = random.Random(seed)
    order = list(enumerate(requests()))
    rng.shuffle(order)

    async def work():
        async with serving_cell(folders, cell) as service:
            streams = {}
            for index, request in order:
                streams[index] = service.open(request)
                await tokens_more(list(streams.values()), rng.choice([0, 0, 1, 5, 30]))
            await ended(*streams.values())
            return [record(streams[index]) for index in range(16)]

    assert run(work()) == alone(cell)


async def survive(cell, folders, kills, seed):
    """Kill the engine `kills` times at random tokens while the requests run, as often round as that takes."""
    rng = random.Random(seed)
    rounds = []
    async with serving_cell(folders, cell) as service:
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


@pytest.mark.parametrize(("cell", "kills"), [(FULL, 6), (SLIDING, 4)], ids=str)
def test_kills_lose_double_and_change_nothing(folders, alone, cell, kills):
    rounds, restarts, resumes = run(survive(cell, folders, kills, seed=3))

    assert restarts == {"signal SIGKILL": kills}
    assert resumes >= kills
    for records in rounds:
        assert records == alone(cell)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_two_hundred_kills(folders, alone, cell, monkeypatch):
    monkeypatch.setattr("harness.LIMIT", 3000)
    rounds, restarts, _ = run(survive(cell, folders, 200, seed=4))

    assert restarts == {"signal SIGKILL": 200}
    for records in rounds:
        assert records == alone(cell)
