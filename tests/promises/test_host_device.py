"""`--device host`: the kernels' own text, executed by the CPU through the whole daemon, against the reference."""

import checkpoints
import numpy as np
import pytest
import torch
from harness import ended, kill, record, run, serving, submissions, tokens_more
from msgspec.structs import replace

from fwd.cli.common import wait_ready
from fwd.cli.private import private_daemon
from fwd.config import Config
from fwd.demo import corpus, tokenizer
from fwd.kernels.rows import Cells, Rows
from fwd.models.load import load
from fwd.protocol.messages import Tokens

PROMPT = "def fibonacci(n):\n"
TOKENS = 24
POSITIONS = 320  # that are teacher-forced
ROWS = 16
PAGE = 16
GAP = 0.06  # of the reference's two best logits, below which the kernels may choose the other: 2⁻⁸ of logits up to 16
DIFFERENCE = 4e-4  # 1 − 2Σxy / (Σx² + Σy²) of all logits of a position: a few roundings to bfloat16 in each layer


def written(device):
    """The answer to one greedy request, streamed."""
    flags = ("demo", "--device", device, "--dtype", "bfloat16", "--http", "none", "--log-level", "error")
    with private_daemon(*flags) as daemon, daemon.connect() as client:
        status = wait_ready(client)
        assert (status.engine.device, status.engine.dtype) == (device, "bfloat16")
        prompt = tokenizer.load(Config().folder).encode(PROMPT).ids
        stream = client.submit(prompt, max_tokens=TOKENS, temperature=0.0)
        return [event.ids for event in stream if isinstance(event, Tokens)]


def test_a_greedy_text_is_the_reference_s():
    host, cpu = written("host"), written("cpu")

    assert [len(ids) for ids in host] == [1] * TOKENS
    assert host == cpu


def held_out(folder):
    """Ids of text that the embedded model has not seen."""
    text = next(source.text for source in corpus.sources() if source.held_out and len(source.text) > 4 * POSITIONS)
    return tokenizer.load(folder).encode(text).ids[:POSITIONS]


def forced(folder, device, ids):
    """Logits [positions, vocab] with each id given, in decode steps of 16 rows, over pages in no order."""
    model = load(folder, device=device, dtype="bfloat16", context=POSITIONS)
    pages = POSITIONS // PAGE
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    cache = model.new_cache((pages,), PAGE, "bfloat16")
    found = []
    for start in range(0, POSITIONS, ROWS):
        positions = torch.arange(start, start + ROWS)
        slots = order[positions // PAGE].long() * PAGE + positions % PAGE
        none = torch.full((ROWS,), -1)
        rows = Rows(positions, torch.zeros(ROWS, dtype=torch.int64), none, (Cells(slots, order.view(1, -1)),))
        found.append(model.logits(model.forward(torch.tensor(ids[start : start + ROWS]), rows, cache)))
    return torch.cat(found).double().numpy()


@pytest.mark.parametrize("kind", ["demo", "qwen3-64"])
def test_teacher_forced_the_same_token_is_best(kind, tmp_path):
    folder = Config().folder if kind == "demo" else tmp_path
    if kind == "demo":
        ids = held_out(folder)
    else:
        checkpoints.make(kind, folder)
        ids = np.random.default_rng(1).integers(checkpoints.VOCAB, size=POSITIONS).tolist()
    ours, theirs = (forced(folder, device, ids) for device in ("host", "cpu"))
    best = np.sort(theirs, axis=1)
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    differences = 1 - 2 * (ours * theirs).sum(axis=1) / ((ours**2).sum(axis=1) + (theirs**2).sum(axis=1))

    assert len(ids) == POSITIONS
    assert (same | (best[:, -1] - best[:, -2] < GAP)).all()
    assert same.mean() > 0.97
    assert differences.max() < DIFFERENCE


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
