"""Promises 1 and 2 while drafting, through the daemon: engines that foresee, guess wrong and die, and what serves."""

import random

import checkpoints
import foreseeing_engine
import pytest
from harness import Cell, ended, kill, record, run, serving, submissions, tokens_more
from msgspec.structs import replace

from fwd.protocol.ids import pack_ids
from fwd.protocol.values import Draft

CELL = Cell("qwen3-sliding", "bfloat16", "fp8")
TOKENS = 48
OFF = Draft("off")


def requests(count=8):
    return submissions(seed=31, count=count, vocab=checkpoints.VOCAB, tokens=TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    checkpoints.make(CELL.kind, path)
    return path


@pytest.fixture(scope="module")
def alone(folder):
    """The streams of the requests, one after the other, without drafts and without a cache."""

    async def work():
        async with serving(folder, dtype=CELL.dtype, kv_dtype=CELL.kv_dtype) as service:
            streams = []
            for request in requests():
                streams.append(service.open(replace(request, cache=False, draft=OFF)))
                await ended(streams[-1])
            return streams

    return run(work())


async def together(folder, asked, rng, kills, **settings):
    """Open all at random tokens and kill the engine while they run."""
    async with serving(folder, dtype=CELL.dtype, kv_dtype=CELL.kv_dtype, **settings) as service:
        streams = []
        for request in asked:
            streams.append(service.open(request))
            await tokens_more(streams, rng.choice([0, 0, 1, 9]))
        for _ in range(kills):
            await tokens_more(streams, rng.choice([1, 2, 25]))
            if any(not stream.done for stream in streams):
                kill(service)
        await ended(*streams)
        return streams


def counted(streams):
    """Drafted and accepted by the engines that ended the streams."""
    timings = [stream.finished.timing for stream in streams]
    return [
        sum(sum(counts.values()) for counts in each)
        for each in zip(*((t.drafted, t.accepted) for t in timings), strict=True)
    ]


@pytest.mark.parametrize(("nature", "kills"), [("oracle", 1), ("fool", 2)])
def test_guesses_and_kills_change_nothing(folder, alone, tmp_path, nature, kills):
    command = foreseeing_engine.command(tmp_path / "answers", nature, alone)
    streams = run(together(folder, requests(), random.Random(nature), kills, command=command))
    drafted, accepted = counted(streams)

    assert list(map(record, streams)) == list(map(record, alone))
    assert drafted > 50
    assert accepted == drafted if nature == "oracle" else 0 < accepted < drafted


def test_what_serves_changes_nothing(folder, alone):
    """The drafters of every daemon, with predictions that are nearly right, at their own choice and at their most."""
    asked = []
    wishes = [Draft(), Draft("suffix", 4), Draft("suffix", 15)]
    for number, (request, stream) in enumerate(zip(requests(), alone, strict=True)):
        likely = stream.emitted.tolist()
        likely[20:22] = [7, 8, 9]
        asked.append(replace(request, prediction=pack_ids(likely), draft=wishes[number % 3]))
    streams = run(together(folder, asked, random.Random(8), kills=1))

    assert list(map(record, streams)) == list(map(record, alone))
    assert counted(streams)[1] > 50
