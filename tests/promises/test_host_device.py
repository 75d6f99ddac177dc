"""`--device host`: the kernels' own text, executed by the CPU through the whole daemon, against the reference."""

import shutil
from functools import cache

import checkpoints
import numpy as np
import pytest
from forced import POSITIONS, Forced, differences
from harness import ended, kill, record, run, serving, submissions, tokens_more
from msgspec.structs import replace
from quantised import quantise

from fwd.cli.common import wait_ready
from fwd.cli.private import private_daemon
from fwd.config import Config
from fwd.demo import corpus, tokenizer
from fwd.protocol.messages import Tokens

PROMPT = "def fibonacci(n):\n"
TOKENS = 24
FEWER = 64  # of a quantised model
GAP = 0.06  # of the reference's two best logits, below which the kernels may choose the other: 2⁻⁸ of logits up to 16
DIFFERENCE = 4e-4  # 1 − 2Σxy / (Σx² + Σy²) of all logits of a position: a few roundings to bfloat16 in each layer


LAYOUTS = {
    "fp8": "fp8-channel",
    "fp8-block": "fp8-modelopt-block",
    "mxfp4": "mxfp4-compressed",
    "nvfp4": "nvfp4-compressed",
    "int4": "int4-compressed",
    "awq": "awq",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of the embedded model in a format, written once."""

    @cache
    def made(kind):
        place = tmp_path_factory.mktemp(kind)
        quantise(Config().folder, LAYOUTS[kind], place / "quantised", place / "plain")
        shutil.rmtree(place / "plain")
        return place / "quantised"

    return made


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


def held_out(folder, count):
    """Ids of text that the embedded model has not seen."""
    text = next(source.text for source in corpus.sources() if source.held_out and len(source.text) > 4 * count)
    return tokenizer.load(folder).encode(text).ids[:count]


def assert_alike(ours, theirs):
    """The same token is best, wherever it is not a close call, and all logits are near."""
    best = np.sort(theirs, axis=1)
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    assert (same | (best[:, -1] - best[:, -2] < GAP)).all()
    assert same.mean() > 0.95
    assert differences(ours, theirs).max() < DIFFERENCE


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


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_embedded_model_in_other_formats(kind, demo):
    ids = held_out(demo(kind), FEWER)
    ours, theirs = (Forced(demo(kind), device) for device in ("host", "cpu"))

    assert_alike(ours.logits(ids), theirs.logits(ids))
    assert ours.greedy(FEWER, ids[0], 12) == theirs.greedy(FEWER, ids[0], 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("qwen3-64")
    checkpoints.make("qwen3-64", made)
    return made


def requests():
    return submissions(seed=5, count=4, vocab=checkpoints.VOCAB, tokens=16, longest=80)


async def one_by_one(folder):
    async with serving(folder, device="host", dtype="bfloat16") as service:
        records = []
        for request in requests():
            stream = service.open(replace(request, cache=False))
            await ended(stream)
            records.append(record(stream))
        return records


async def together(folder, kills):
    """All at once, the engine killed while they run."""
    async with serving(folder, device="host", dtype="bfloat16") as service:
        streams = [service.open(request) for request in requests()]
        for _ in range(kills):
            await tokens_more(streams, 10)
            kill(service)
        await ended(*streams)
        assert service.supervisor.active.restarts == ({"signal SIGKILL": kills} if kills else {})
        return [record(stream) for stream in streams]


def test_same_seed_same_bytes_alone_beside_others_and_after_a_kill(folder):
    alone = run(one_by_one(folder))

    assert run(together(folder, kills=0)) == alone
    assert run(together(folder, kills=2)) == alone
