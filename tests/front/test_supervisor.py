"""Two engines: streams stay with the one they began on, and a promoted one takes what is new."""

import asyncio
import contextlib
import os
import signal

import pytest
from census import is_alive
from fakes import Fault, Script
from rig import MODEL, Watched, assert_answered, stream

from fwd.errors import BadRequestError
from fwd.front.supervisor import Supervisor
from fwd.protocol.messages import Load

SLOW = Script(pace="ping")
OTHER = Load(model="other")


@contextlib.asynccontextmanager
async def supervising(*scripts):
    """A supervisor whose engines play these scripts one after the other; the first one runs."""
    waiting = iter(scripts)
    engines = Supervisor(lambda load: Watched(next(waiting), load, ping_interval=0.002), MODEL)
    engines.start()
    try:
        yield engines
    finally:
        await engines.stop()


def test_swap(run):
    async def main():
        async with supervising(SLOW, Script(low=1000)) as engines:
            old = stream(1, max_tokens=30)
            engines.submit(old)
            await old.wait(3)
            first = engines.active.process.pid
            os.kill(first, signal.SIGSTOP)
            staged = engines.stage(OTHER)
            await staged.reach("ready")
            swap = asyncio.create_task(engines.promote())
            await asyncio.sleep(0)
            new = stream(2)
            engines.submit(new)
            while not new.done:
                await new.wait(len(new.emitted))
            assert not old.done
            assert engines.second.is_running(old)
            os.kill(first, signal.SIGCONT)
            await swap
            assert_answered(SLOW, old)
            assert_answered(Script(low=1000), new)
            assert engines.active is staged
            assert engines.second is None
            assert not is_alive(first)

    run(main())


def test_a_staged_engine_that_cannot_load_is_discarded(run, tmp_path):
    bad = Script(faults=(Fault("bad_model"),), lives=str(tmp_path / "lives"))

    async def main():
        async with supervising(SLOW, bad, Script()) as engines:
            staged = engines.stage(OTHER)
            await staged.reach("failed")
            assert "lm_head" in staged.reason
            with pytest.raises(BadRequestError, match="already"):
                engines.stage(OTHER)
            await engines.discard()
            one = stream(1, max_tokens=5)
            engines.submit(one)
            await engines.active.drained()
            assert_answered(SLOW, one)
            await engines.stage(OTHER).reach("ready")

    run(main())


def test_the_old_engine_may_die_while_it_finishes(run):
    async def main():
        async with supervising(SLOW, Script()) as engines:
            old = stream(1, max_tokens=30)
            engines.submit(old)
            await old.wait(3)
            first = engines.active.process.pid
            os.kill(first, signal.SIGSTOP)
            await engines.stage(OTHER).reach("ready")
            swap = asyncio.create_task(engines.promote())
            os.kill(first, signal.SIGKILL)
            await swap
            assert_answered(SLOW, old)
            assert old.resumes == 1

    run(main())


def test_cancel_reaches_the_engine_that_has_the_stream(run):
    async def main():
        async with supervising(SLOW, Script()) as engines:
            old = stream(1, max_tokens=4000)
            engines.submit(old)
            await old.wait(3)
            await engines.stage(OTHER).reach("ready")
            swap = asyncio.create_task(engines.promote())
            await asyncio.sleep(0)
            engines.cancel(old)
            engines.cancel(old)
            await swap
            assert old.finished.reason == "cancelled"

    run(main())
