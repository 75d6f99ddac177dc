"""A context of a million tokens is a matter of memory, not of code."""

import random
import sys
import time
import tracemalloc
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import checkpoints
import numpy as np
import pytest
import torch
from harness import ended, idle, run, serving

from fwd.engine.device import cpu
from fwd.engine.loop import Loop
from fwd.engine.plan import plan
from fwd.engine.request import Drawn, Prefilled
from fwd.engine.space import Space
from fwd.engine.step import CPU, Step, new_tables
from fwd.kernels.sizes import MAX_ROWS
from fwd.models import cache
from fwd.models.config import read_spec, run_spec
from fwd.protocol.frames import close_all, pack
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Limits, Sampling, TopLogprobs

SEED = 20261124
ANSWER = 32
MILLION = 1 << 20
RUNGS = (8192, 65_536, 524_288)  # tokens of the conversation at which it is answered on its way up
WIDTH = 32  # numbers of a key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("long")
    checkpoints.make("long", path)
    return path


def planned(folder, context):
    spec = run_spec(read_spec(folder), "float32")
    return plan(spec, cpu(1 << 40), context=context, max_seqs=1)


def request(ids, seed=SEED):
    limits = Limits(max_tokens=ANSWER)
    return Submit(id=1, prompt=pack_ids(ids), sampling=Sampling(temperature=0.8), limits=limits, seed=seed)


class Books:
    """A runner that fills the buffers of each launch and has no model; `written` counts entries of block tables."""

    ahead = deferred = False

    def __init__(self, sizes):
        self.written = 0
        known = [new_tables(sizes, 1, CPU) for _ in range(2)]
        self._prefill, self._decode = (
            Step(sizes, rows, 4, of) for rows, of in zip((sizes.chunk, MAX_ROWS), known, strict=True)
        )
        for table in chain(*known):
            table.lines = table.lines.view(Counted)
            table.lines.books = self

    def copy(self, copies):
        pass

    def prefill(self, chunk):
        return Prefilled(self._drawn(self._prefill.prefill(chunk).drawing), [], True)

    def launch(self, spans):
        self.drawn = self._drawn(self._decode.decode(spans, [0])[1])

    def collect(self):
        return [[token] for token in self.drawn]

    def _drawn(self, drawing):
        return [Drawn(7, 0.0, TopLogprobs(), True) for _ in drawing]


class Counted(np.ndarray):
    books = None

    def __setitem__(self, index, value):
        super().__setitem__(index, value)
        self.books.written += np.size(value)


class Sink:
    """A channel without a peer."""

    def send(self, *messages):
        pass


class Work(NamedTuple):
    """What the host does for some steps."""

    calls: int
    written: int


def work_of(loop, books, steps):
    calls, before = 0, books.written

    def count(_frame, event, _argument):
        nonlocal calls
        calls += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        for _ in range(steps):
            loop._step()
            loop._flush()
    finally:
        sys.setprofile(None)
    return Work(calls, books.written - before)


def peak_of(loop, steps):
    """Bytes that Python and numpy hold at once for a step."""
    tracemalloc.start()
    peaks = []
    for _ in range(steps):
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        loop._step()
        loop._flush()
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    return max(peaks)


def host_work(folder, prompt):
    """For the last whole chunks of a prompt, and for decode steps after it: calls, entries written, bytes held."""
    sizes = planned(folder, MILLION)
    books, space = Books(sizes), Space(sizes.groups, sizes.units, sizes.page_size, chunk=sizes.chunk, key=b"key")
    loop = Loop(Sink(), books, space, max_seqs=1, chunk=sizes.chunk)
    loop._handle(request(conversation(prompt)))
    for _ in range(prompt // sizes.chunk - 4):
        loop._step()
        loop._flush()
    prefill = work_of(loop, books, 4)
    loop._step()  # here the ids get room for more
    return prefill, work_of(loop, books, 2 * sizes.page_size - 8), peak_of(loop, 4)


def conversation(tokens):
    return random.Random(SEED).choices(range(checkpoints.VOCAB), k=tokens)


def test_the_host_does_the_same_for_a_step_at_a_thousand_and_at_a_million_tokens(folder):
    host_work(folder, 1024)  # what is done once is done
    *short, little = host_work(folder, 1024)
    *long, much = host_work(folder, MILLION - 64)

    for work, least in zip(long, short, strict=True):
        assert work.written == least.written
        assert work.calls <= least.calls + 32  # now and then something is collected meanwhile
    assert much < little + 1024


def anonymous(service):
    """Bytes of resident memory of the engine that belong to no file."""
    lines = Path(f"/proc/{service.supervisor.active.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


class Turn(NamedTuple):
    """One answer on the way up; `resident` bytes after it, and the most on the way."""

    length: int
    stream: object
    progress: list
    resident: int
    peak: int


async def answer(service, ids, seed=SEED):
    keeper, submit = service.supervisor.active, request(ids, seed)
    frame, fds = pack(submit)
    close_all(fds)
    assert (len(frame) < 1024, len(fds)) == (len(ids) * 4 > 65_536, len(ids) * 4 > 65_536)
    stream, known, peak = service.open(submit), len(keeper.pongs), 0
    while not stream.done:
        await stream.wait(len(stream.emitted)) if stream.emitted else await keeper.ask()
        peak = max(peak, anonymous(service))
    await ended(stream)
    assert stream.error is None
    progress = [pong.prefilling[0] for pong in keeper.pongs[known:] if pong.prefilling]
    await idle(service)
    return Turn(len(ids), stream, progress, anonymous(service), peak)


async def climb(folder, context):
    async with serving(folder, dtype="float32", max_seqs=1, context=context) as service:
        ids, loaded = conversation(context), anonymous(service)
        lengths = [*(rung for rung in RUNGS if rung <= context // 2), context - ANSWER]
        turns = [await answer(service, ids[:length]) for length in lengths]
        turns.append(await answer(service, ids[: context - ANSWER], seed=1))
        info = service.info()
        assert (info.kv_bytes, info.memory) == (planned(folder, context).kv_bytes, planned(folder, context).items)
        return info, loaded, turns


def bare_read_ms(tokens):
    """Milliseconds to score as many keys and to add up as many values, on one thread."""
    torch.set_num_threads(1)
    keys, values, query = torch.ones(tokens, WIDTH), torch.ones(tokens, WIDTH), torch.ones(WIDTH)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        (keys @ query).softmax(0) @ values
        times.append((time.perf_counter() - began) * 1e3)
    return sorted(times)[len(times) // 2]


def show(info, loaded, turns):
    lines = [f"planned: {info.memory}"]
    for turn in turns:
        timing = turn.stream.finished.timing
        lines.append(
            f"{turn.length} tokens, {timing.cached_tokens} cached: prefill {timing.prefill_ms / 1e3:.1f} s, decode "
            f"{timing.decode_ms / timing.steps:.2f} ms a token (bare read {bare_read_ms(turn.length):.2f}); resident "
            f"{(turn.resident - loaded) / 1e6:.1f} MB over the loaded engine, at most {(turn.peak - loaded) / 1e6:.1f}"
        )
    sys.stderr.write("\n".join(["", *lines, ""]))


def grown(info, first, last):
    """Bytes of the plan that a conversation touches from one turn to a later one: KV, prefix index, and its ids."""
    whole = info.kv_bytes + info.memory["prefix_index"] + 4 * info.context
    return whole * (last.length - first.length) / info.context


@pytest.mark.timeout(10_800)
@pytest.mark.parametrize("context", [16_384, pytest.param(MILLION, marks=pytest.mark.soak)])
def test_a_conversation_that_fills_the_context(folder, context, monkeypatch):
    monkeypatch.setattr("harness.LIMIT", 10_000)
    info, loaded, turns = run(climb(folder, context))
    show(info, loaded, turns)
    first, last = turns[0], turns[-2]

    assert last.length + ANSWER == info.context == context
    assert len({step.done for step in last.progress}) > 3
    for turn, before in zip(turns, [0, *(turn.length for turn in turns[:-1])], strict=True):
        timing, done = turn.stream.finished.timing, [step.done for step in turn.progress]
        assert len(turn.stream.emitted) == ANSWER
        assert timing.cached_tokens == min(before, turn.length - 1) // info.page_size * info.page_size
        assert done == sorted(done)
        assert all(step.total == turn.length and step.done >= timing.cached_tokens for step in turn.progress)

    expected = grown(info, first, last)
    for resident in (last.resident, turns[-1].resident):
        assert resident - first.resident == pytest.approx(expected, rel=0.02, abs=5 << 20)
    most = info.kv_bytes + info.memory["prefix_index"] + info.memory["workspace"] + 4 * context
    most += 24 * context + (2 << 20)  # what the suffix drafter knows of this text, and of earlier answers
    assert last.peak - loaded < 1.02 * most


def test_the_arena_is_what_is_planned(folder):
    sizes = planned(folder, MILLION)
    layers = cache.new_cache(sizes.spec.cache, sizes.units, sizes.page_size, sizes.kv).layers
    arenas = {layer.keys.untyped_storage().data_ptr(): layer.keys.untyped_storage().nbytes() for layer in layers}
    assert list(arenas.values()) == [sizes.kv_bytes]
    assert sizes.kv_bytes == sum(size for name, size in sizes.items.items() if name.startswith("kv_"))
