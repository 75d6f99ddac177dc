"""Promise 4 on the real engine: more than it can take is refused with a time to come again, and harms nobody."""

import asyncio
import os
import random
from pathlib import Path

import checkpoints
import pytest
from harness import ended, record, run, serving
from msgspec.structs import replace

from fwd.errors import OverloadedError
from fwd.front.queue import LATEST, SOONEST
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Limits, Sampling

pytestmark = pytest.mark.soak
REQUESTS = 1000
LIMIT = 20_000
SEED = 20261124


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    checkpoints.make("llama", path)
    return path


def request(number):
    rng = random.Random(number)
    return Submit(
        prompt=pack_ids([rng.randrange(checkpoints.VOCAB) for _ in range(rng.randrange(200, 480))]),
        sampling=Sampling(temperature=1.0, logprobs=1),
        limits=Limits(max_tokens=rng.randrange(1, 30)),
        seed=number,
        priority=rng.choice(["interactive", "background"]),
    )


async def wave(service, numbers):
    """Open everything at once; the streams that were admitted, by number."""
    admitted, waits, queue = {}, [], service.supervisor.active.queue
    for number in numbers:
        try:
            admitted[number] = service.open(request(number))
        except OverloadedError as error:
            waits.append(error.retry_after)
        assert queue.tokens <= LIMIT
        await asyncio.sleep(0)
    assert all(SOONEST <= seconds <= LATEST for seconds in waits)
    await ended(*admitted.values())
    assert queue.tokens == 0
    return admitted


def resident(service):
    """Bytes that the engine holds."""
    pages = Path(f"/proc/{service.supervisor.active.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_requests_at_once(folder):
    numbers = random.Random(SEED).sample(range(REQUESTS), REQUESTS)

    async def flooded():
        async with serving(folder, ping_interval=0.05) as service:
            service.config = replace(service.config, max_queue=LIMIT)
            first = await wave(service, numbers)
            held = resident(service)
            again = await wave(service, numbers)
            assert resident(service) < held * 1.05 + (8 << 20)
            assert service.supervisor.active.restarts == {}
            return {number: record(stream) for number, stream in (first | again).items()}

    async def alone(served):
        async with serving(folder) as service:
            found = {}
            for number in served:
                stream = service.open(request(number))
                await ended(stream)
                found[number] = record(stream)
            return found

    records = run(flooded())
    assert LIMIT // 480 <= len(records) < REQUESTS
    assert records == run(alone(records))
