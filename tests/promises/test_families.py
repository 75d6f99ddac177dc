"""Promises 1 and 2 for families with experts and with latents: whatever is beside a request, its bytes are the same."""

import random

import checkpoints
import pytest
import quantised
from harness import Cell, ended, kill, record, run, serving, submissions, tokens_more
from msgspec.structs import replace

TOKENS = 24
SEED = 20261201
CELLS = (
    Cell("gpt-oss", "float32"),
    Cell("gpt-oss-mxfp4", "bfloat16", "fp8"),
    Cell("qwen3-moe-mixed", "bfloat16"),
    Cell("deepseek", "float32"),
    Cell("deepseek-yarn", "bfloat16", "fp8"),
    Cell("glm4-moe-lite", "bfloat16"),
)
MORE = (
    Cell("gpt-oss", "bfloat16"),
    Cell("gpt-oss-mxfp4", "float32"),
    Cell("qwen3-moe-int4", "bfloat16"),
    Cell("deepseek-fp8", "bfloat16"),
    Cell("llama-nvfp4", "bfloat16", "fp8"),
    Cell("qwen3-moe", "float32", "bfloat16"),
    Cell("deepseek-odd", "bfloat16"),
    Cell("glm4-moe-lite", "float32", "fp8"),
    Cell("kimi-k25", "bfloat16"),
)


LAYOUTS = {"fp8": "fp8-deepseek", "int4": "awq", "nvfp4": "nvfp4-compressed"}


def write(kind, folder):
    """A random checkpoint of a kind, whose last word may be a format."""
    family, _, form = kind.rpartition("-")
    if form not in {*LAYOUTS, "mxfp4"}:
        checkpoints.make(kind, folder)
        return
    source, plain = (folder.with_name(f"{folder.name}-{name}") for name in ("source", "plain"))
    checkpoints.make(family, source)
    if form == "mxfp4":
        quantised.quantise_gpt_oss(source, folder, plain)
    else:
        quantised.quantise(source, LAYOUTS[form], folder, plain)


def requests():
    return submissions(seed=SEED, count=16, vocab=checkpoints.VOCAB, tokens=TOKENS)


async def alone(service):
    """What each request gives when nothing else runs and nothing is cached."""
    records = []
    for request in requests():
        stream = service.open(replace(request, cache=False))
        await ended(stream)
        records.append(record(stream))
    return records


async def together(service, rng, most, kills=0):
    """The same with up to `most` of them at once that arrive at random tokens; the engine dies `kills` times."""
    order = list(enumerate(requests()))
    rng.shuffle(order)
    deaths = set(rng.sample(range(8, 16), kills))
    streams = {}
    for place, (index, request) in enumerate(order):
        while sum(not stream.done for stream in streams.values()) >= most:
            await tokens_more(list(streams.values()), 1)
        streams[index] = service.open(request)
        await tokens_more(list(streams.values()), rng.choice([0, 0, 1, 5, 20]))
        if place in deaths:
            kill(service)
            await tokens_more(list(streams.values()), 1)
    await ended(*streams.values())
    return [record(streams[index]) for index in range(16)]


async def check(folder, cell, rounds):
    """The requests alone, then together once for each of `rounds`: how many at once at most, and kills."""
    rng = random.Random(f"{SEED} {cell}")
    async with serving(folder, dtype=cell.dtype, kv_dtype=cell.kv_dtype) as service:
        undisturbed = await alone(service)
        assert len({tuple(ids) for ids, *_ in undisturbed}) == 16
        for most, kills in rounds:
            assert await together(service, rng, most, kills) == undisturbed, f"up to {most} at once, {kills} kills"
        assert sum(service.supervisor.active.restarts.values()) == sum(kills for _, kills in rounds)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_same_seed_same_bytes(cell, tmp_path):
    write(cell.kind, tmp_path)
    run(check(tmp_path, cell, [(16, 1)]))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cell", CELLS + MORE, ids=str)
def test_same_seed_same_bytes_at_every_number_and_through_twenty_kills(cell, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.LIMIT", 3000)
    write(cell.kind, tmp_path)
    run(check(tmp_path, cell, [*((most, 0) for most in range(1, 17)), *[(16, 2)] * 10]))
