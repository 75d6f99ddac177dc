"""`--device host`: the kernels' own text, executed by the CPU through the whole daemon, against the reference."""

import checkpoints
import numpy as np
import pytest
from forced import POSITIONS, Forced, assert_alike, held_out
from harness import ended, kill, record, run, serving, submissions, tokens_more
from msgspec.structs import replace

from fwd.cli.common import wait_ready
from fwd.cli.private import private_daemon
from fwd.config import Config
from fwd.demo import tokenizer
from fwd.protocol.messages import Tokens

PROMPT = "def fibonacci(n):\n"
TOKENS = 24


def written(device, folder):
    """The answer to one greedy request, streamed."""
    flags = (str(folder), "--device", device, "--dtype", "bfloat16", "--http", "none", "--log-level", "error")
    with private_daemon(*flags) as daemon, daemon.connect() as client:
        status = wait_ready(client)
        assert (status.engine.device, status.engine.dtype) == (device, "bfloat16")
        prompt = tokenizer.load(Config().folder).encode(PROMPT).ids
        stream = client.submit(prompt, max_tokens=TOKENS, temperature=0.0)
        return [token for event in stream if isinstance(event, Tokens) for token in event.ids]


def test_a_greedy_text_is_the_reference_s():
    host, cpu = (written(device, Config().folder) for device in ("host", "cpu"))

    assert len(host) == TOKENS
    assert host == cpu


@pytest.mark.parametrize("kind", ["bf16", "qwen3-64"])
def test_teacher_forced_the_same_token_is_best(kind, tmp_path):
    folder = Config().folder
    if kind == "qwen3-64":
        checkpoints.make(kind, folder := tmp_path)
        ids = np.random.default_rng(1).integers(checkpoints.VOCAB, size=POSITIONS).tolist()
    else:
        ids = held_out(folder, POSITIONS)
    assert len(ids) == POSITIONS
    assert_alike(*(Forced(folder, device).logits(ids) for device in ("host", "cpu")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("qwen3-64")
    checkpoints.make("qwen3-64", made)
    return made


def requests():
    return submissions(seed=5, count=4, vocab=checkpoints.VOCAB, tokens=16, longest=80)


async def one_by_one(service):
    records = []
    for request in requests():
        stream = service.open(replace(request, cache=False))
        await ended(stream)
        records.append(record(stream))
    return records


async def together(service, kills):
    """All at once, the engine killed while they run."""
    streams = [service.open(request) for request in requests()]
    for _ in range(kills):
        await tokens_more(streams, 10)
        kill(service)
    await ended(*streams)
    return [record(stream) for stream in streams]


def test_same_seed_same_bytes_alone_beside_others_and_after_kills(folder):
    async def work():
        async with serving(folder, device="host", dtype="bfloat16") as service:
            alone = await one_by_one(service)
            assert await together(service, kills=0) == alone
            assert await together(service, kills=2) == alone
            assert service.supervisor.active.restarts == {"signal SIGKILL": 2}

    run(work())
