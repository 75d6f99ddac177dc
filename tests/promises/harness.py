"""A real engine under a real supervisor, without HTTP: what the promises are tested on."""

import asyncio
import contextlib
import os
import random
import signal
from pathlib import Path
from typing import NamedTuple

from fwd.config import Config
from fwd.engine.device import cpu
from fwd.engine.plan import plan
from fwd.front.keeper import Keeper
from fwd.front.service import Service
from fwd.front.supervisor import Supervisor
from fwd.models.config import read_spec, run_spec
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Load, Ping, Pong, Submit
from fwd.protocol.values import Limits, Sampling

LIMIT = 240
ASKED = 1 << 40  # the keeper's own pings count from one


class Cell(NamedTuple):
    """What is loaded."""

    kind: str
    dtype: str
    kv_dtype: str = "auto"

    def __str__(self) -> str:
        return "-".join(self)


class Watched(Keeper):
    """A keeper that remembers what the engine answered to its pings."""

    def __init__(self, load: Load, **settings) -> None:
        self.pongs: list[Pong] = []
        self._came = asyncio.Event()
        super().__init__(load, **settings)

    def _on_pong(self, pong: Pong) -> None:
        super()._on_pong(pong)
        self.pongs.append(pong)
        self._came.set()

    async def ask(self) -> Pong:
        """The engine's answer to a ping of now."""
        begun = len(self.pongs)
        self.process.send(Ping(seq=ASKED + begun))
        while not (found := [pong for pong in self.pongs[begun:] if pong.seq == ASKED + begun]):
            self._came.clear()
            await self._came.wait()
        return found[0]


def run(work):
    """Run a coroutine with a time limit."""
    return asyncio.run(asyncio.wait_for(work, LIMIT))


@contextlib.asynccontextmanager
async def serving(folder: Path, **load):
    """A `Service` with an engine that loaded `folder`."""
    ready = asyncio.Event()
    timing = {key: load.pop(key) for key in ("ping_interval", "hang_timeout", "command") if key in load}

    def make(message):
        return Watched(message, on_change=ready.set, **timing)

    supervisor = Supervisor(make, Load(model=str(folder), **load))
    task = supervisor.start()
    service = Service(Config(model=str(folder)), supervisor)
    try:
        while supervisor.active.state != "ready":
            assert not task.done(), supervisor.active.error
            ready.clear()
            await ready.wait()
        yield service
    finally:
        await supervisor.stop()


def record(stream):
    """Everything a reader gets from a stream."""
    assert stream.error is None, stream.error
    return stream.emitted.tolist(), stream.logprobs.tolist(), stream.top, stream.finished.reason


async def ended(*streams):
    """Wait until all of `streams` have ended."""
    for stream in streams:
        while not stream.done:
            await stream.wait(len(stream.emitted))


async def tokens_more(streams, count):
    """Wait until `count` further tokens were journaled, or all streams ended."""
    goal = sum(len(stream.emitted) for stream in streams) + count
    while sum(len(stream.emitted) for stream in streams) < goal:
        running = [stream for stream in streams if not stream.done]
        if not running:
            return
        await running[0].wait(len(running[0].emitted))


async def idle(service):
    """The engine's answer once it finds nothing to do any more, refills included: no step passes between two pings."""
    keeper = service.supervisor.active
    before, now = None, await keeper.ask()
    while before is None or now.steps != before.steps:
        before, now = now, await keeper.ask()
    return now


def kill(service, number=signal.SIGKILL):
    """Send a signal to the engine."""
    os.kill(service.supervisor.active.process.pid, number)


def small_pool(folder, dtype, kv_dtype, context, max_seqs=16):
    """What an engine is told so that its pages hold one context only, whatever the number of sequences."""
    device, spec = cpu(1 << 40), run_spec(read_spec(folder), dtype)
    ample = plan(spec, device, context=context, max_seqs=max_seqs, kv_dtype=kv_dtype)
    spare = ample.pages - -(-context // ample.page_size)
    kv_bytes = ample.kv_bytes - spare * ample.groups[0].unit_bytes(ample.page_size, ample.kv)
    return {"context": context, "max_seqs": max_seqs, "kv_dtype": kv_dtype, "kv_bytes": kv_bytes}


def submissions(seed: int, count: int, vocab: int, tokens: int, longest: int = 150):
    """Requests of every kind of sampling; some pairs share prompt and seed and differ in `choice`."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        prompt = [rng.randrange(vocab) for _ in range(rng.choice([1, 2, 63, 64, 65, rng.randrange(3, longest)]))]
        sampling = Sampling(
            temperature=rng.choice([0.0, 0.7, 1.0, 1.6]),
            top_k=rng.choice([0, 0, 5, 40]),
            top_p=rng.choice([1.0, 0.9, 0.5]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, 0.2]),
            logit_bias=rng.choice([{}, {3: 1.5, 9: -100.0}]),
            logprobs=rng.choice([0, 3]),
        )
        request = Submit(
            prompt=pack_ids(prompt),
            sampling=sampling,
            limits=Limits(max_tokens=tokens),
            seed=rng.randrange(-(2**63), 2**63),
            choice=number % 3,
        )
        requests.append(request)
    return requests
