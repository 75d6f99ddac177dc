"""Promise 1 with a cache: a prefix hit, a preemption, a shared prefill or an eviction gives the bytes of a cold run,
for every cache layout of the real models and every KV dtype."""

import random
import sys
from pathlib import Path

import careless_engine
import checkpoints
import pytest
from harness import Cell, ended, idle, kill, record, run, serving, small_pool, submissions, tokens_more
from msgspec.structs import replace

from fwd.protocol.ids import pack_ids, unpack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Limits

TOKENS = 24
CONTEXT = 272
SEED = 5
KINDS = ("llama3-rope", "qwen3-sliding", "qwen2-sliding")
KV = (("float32", "auto"), ("bfloat16", "auto"), ("float32", "bfloat16"), ("float32", "fp8"))
CELLS = (  # each layout, each KV dtype
    Cell("llama3-rope", "float32"),
    Cell("llama3-rope", "bfloat16"),
    Cell("qwen3-sliding", "float32", "fp8"),
    Cell("qwen2-sliding", "float32", "bfloat16"),
    Cell("gpt-oss", "bfloat16", "fp8"),
    Cell("deepseek-yarn", "bfloat16"),
    Cell("deepseek-yarn", "float32", "fp8"),
)
MORE = tuple(cell for kind in KINDS for kv in KV if (cell := Cell(kind, *kv)) not in CELLS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {cell.kind: tmp_path_factory.mktemp(cell.kind) for cell in CELLS}
    for kind, path in made.items():
        checkpoints.make(kind, path)
    return made


def firsts(rng, count):
    return submissions(rng.randrange(1 << 30), count, checkpoints.VOCAB, TOKENS)


def relatives(rng, first, answer):
    """The same again, another answer to it, the next turn, a prompt that leaves it; and what the cache has of each."""
    prompt = list(unpack_ids(first.prompt))
    cut = rng.randrange(1, len(prompt) + 1)
    turn, branch = ([rng.randrange(checkpoints.VOCAB) for _ in range(rng.randrange(2, 40))] for _ in range(2))
    if cut < len(prompt):
        branch[0] = (prompt[cut] + 1) % checkpoints.VOCAB
    return [
        (first, len(prompt)),
        (replace(first, choice=first.choice + 1, seed=rng.randrange(99)), len(prompt)),
        (replace(first, prompt=pack_ids([*prompt, *answer, *turn])), len(prompt) + len(answer)),
        (replace(first, prompt=pack_ids([*prompt[:cut], *branch])), cut),
    ]


async def one_by_one(service, requests):
    """Each of them with nothing beside it, and its answer prefilled again."""
    streams = []
    for request in requests:
        streams.append(service.open(request))
        await ended(streams[-1])
        await idle(service)
    return streams


def cached(stream):
    return stream.finished.timing.cached_tokens


async def cold(service, requests):
    streams = await one_by_one(service, [replace(request, cache=False) for request in requests])
    assert not any(map(cached, streams))
    return [record(stream) for stream in streams]


async def families(service, rng):
    """First turns and their relatives without a cache: (first, relatives with what is known of each, records)."""
    found = []
    for first in firsts(rng, 3):
        ((answer, *_),) = await cold(service, [first])
        family = relatives(rng, first, answer)
        found.append((first, family, await cold(service, [request for request, _ in family])))
    return found


async def crowded(service, rng, requests, *, killed):
    """All of them in an order of chance, in two classes, each beside another choice that shares its prefill."""
    order = rng.sample(range(len(requests)), len(requests))
    streams = {}
    for place, index in enumerate(order):
        request = replace(requests[index], priority=rng.choice(["interactive", "background"]))
        streams[index], _ = service.open_all([request, replace(request, choice=77)])
        await tokens_more(list(streams.values()), rng.choice([0, 0, 0, 1, 5]))
        if killed and place == len(order) // 2:
            kill(service)
    await ended(*streams.values())
    return [streams[index] for index in range(len(requests))]


@pytest.mark.parametrize("cell", [*CELLS, *(pytest.param(cell, marks=pytest.mark.soak) for cell in MORE)], ids=str)
def test_the_cache_changes_no_byte(folders, cell):
    """The pages hold one context, so that the crowd waits, preempts and evicts."""
    kind, dtype, kv_dtype = cell
    rng = random.Random(f"{SEED} {kind} {dtype} {kv_dtype}")
    pool = small_pool(folders[kind], dtype, kv_dtype, CONTEXT)

    async def work():
        async with serving(folders[kind], dtype=dtype, **pool) as service:
            size, known = service.info().page_size, await families(service, rng)
            for first, family, records in known:
                _, *streams = await one_by_one(service, [first, *(request for request, _ in family)])
                assert [record(stream) for stream in streams] == records
                for stream, (_, common) in zip(streams, family, strict=True):
                    assert cached(stream) == min(common, len(stream.prompt) - 1) // size * size
            requests = [request for _, family, _ in known for request, _ in family]
            streams = await crowded(service, rng, requests, killed=kv_dtype == "fp8")
            assert any(map(cached, streams))
            assert [record(stream) for stream in streams] == [one for *_, records in known for one in records]

    run(work())


def test_a_cache_of_pages_that_decode_steps_made_is_noticed(folders):
    """Were it not, the test above would prove nothing."""
    rng = random.Random(SEED)
    command = (sys.executable, str(Path(careless_engine.__file__)))

    async def work():
        async with serving(folders["llama3-rope"], dtype="float32", command=command) as service:
            known = await families(service, rng)
            turns = [await one_by_one(service, [first, family[2][0]]) for first, family, _ in known]
            return [record(turn) for _, turn in turns], [records[2] for *_, records in known]

    warm, undisturbed = run(work())
    assert warm != undisturbed


def test_the_end_of_a_prompt_stays_known_behind_its_answer(tmp_path):
    """One sequence in a cache that is full: a retry goes on from the prompt, whose end the answer's window has left."""
    checkpoints.make("long", tmp_path)
    ids = random.Random(SEED).choices(range(checkpoints.VOCAB), k=992)

    async def work():
        async with serving(tmp_path, max_seqs=1, context=1024) as service:
            turns = [Submit(prompt=pack_ids(ids[:length]), limits=Limits(max_tokens=32)) for length in (256, 992, 992)]
            return [cached(stream) for stream in await one_by_one(service, turns)]

    assert run(work()) == [0, 256, 976]
