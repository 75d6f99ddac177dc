"""A real engine under a real supervisor, without HTTP: what the promises are tested on."""

import asyncio
import contextlib
import os
import random
import signal
from pathlib import Path

from fwd.config import Config
from fwd.front.keeper import Keeper
from fwd.front.service import Service
from fwd.front.supervisor import Supervisor
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Limits, Load, Sampling, Submit

LIMIT = 240


def run(work):
    """Run a coroutine with a time limit."""
    return asyncio.run(asyncio.wait_for(work, LIMIT))


@contextlib.asynccontextmanager
async def serving(folder: Path, **load):
    """A `Service` with an engine that loaded `folder`."""
    ready = asyncio.Event()
    timing = {key: load.pop(key) for key in ("ping_interval", "hang_timeout", "command") if key in load}

    def make(message):
        return Keeper(message, on_change=ready.set, **timing)

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


def kill(service, number=signal.SIGKILL):
    """Send a signal to the engine."""
    os.kill(service.supervisor.active.process.pid, number)


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
