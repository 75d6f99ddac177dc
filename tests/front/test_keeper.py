"""One engine kept alive: whatever happens to the process, every stream is what the oracle says."""

import errno
import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from census import children, is_alive, open_descriptors, resident_bytes
from fakes import Fault, Script, answer, command, expected, key, score, token, top
from rig import Watched, assert_answered, keeping, stream

from fwd.errors import DeadlineError, EngineError, ModelError, PoisonedError
from fwd.front import process as process_module
from fwd.front.keeper import FIRST_STARTS, MAX_BACKOFF, Keeper
from fwd.front.process import EngineProcess
from fwd.front.streams import Stream
from fwd.protocol.messages import Cancel, Finished, Load, Submit
from fwd.protocol.values import SPILL, EngineInfo, Limits, Sampling

POISON = 3999
QUICK = {"ping_interval": 0.02, "hang_timeout": 0.4}


@pytest.fixture
def lives(tmp_path):
    return str(tmp_path / "lives")


@pytest.fixture
def sent(monkeypatch):
    """What was sent to each engine process, in the order of their lives."""
    log: dict[int, list] = {}
    send = EngineProcess.send

    def recorded(self, message):
        log.setdefault(self.pid, []).append(message)
        send(self, message)

    monkeypatch.setattr(EngineProcess, "send", recorded)
    return log


def let_go(script):
    """Let the load end."""
    Path(script.hold).touch()


def submitted(log):
    return [[message.id for message in life if isinstance(message, Submit)] for life in log.values()]


async def play(script: Script, streams: list[Stream], **settings) -> Watched:
    async with keeping(script, **settings) as keeper:
        for one in streams:
            keeper.submit(one)
        await keeper.drained()
    return keeper


def test_from_start_to_ready(run, tmp_path):
    script = Script(hold=str(tmp_path / "go"), loading=3)

    async def main():
        async with keeping(script) as keeper:
            await keeper.reach("loading")
            assert keeper.info is None
            early = stream(1)
            keeper.submit(early)
            let_go(script)
            await keeper.reach("ready")
            await keeper.drained()
            assert_answered(script, early)
            assert keeper.progress.total == 3
            assert keeper.info.architecture == "FakeForCausalLM"
            assert keeper.info.pid == keeper.process.pid
        assert keeper.states == [
            ("loading", "the model is loading"),
            ("ready", ""),
            ("stopping", "the daemon is stopping"),
        ]

    run(main())


def test_streams_side_by_side(run):
    script = Script(per_frame=(1, 3, 2), eos_at=30)
    streams = [stream(n, range(n), limits=Limits(max_tokens=n * 4, stop_ids=(0, 17))) for n in range(1, 20)]
    run(play(script, streams))
    assert_answered(script, *streams)
    assert {one.finished.reason for one in streams} == {"stop", "length"}


def test_min_tokens_holds_stop_ids_back(run):
    script = Script(text=(5, 6, 7))
    one = stream(1, limits=Limits(max_tokens=20, min_tokens=4, stop_ids=(5,)))
    run(play(script, [one]))
    assert one.emitted.tolist() == [6, 6, 7, 6, 6, 7, 5]
    assert one.finished.stop_id == 5


def test_log_probabilities_survive_deaths(run, lives):
    script = Script(faults=(Fault("kill", 3), Fault("kill", 7), Fault("exit", 1)), lives=lives, per_frame=(2,))
    one = stream(9, range(1500), 30, sampling=Sampling(logprobs=2), prompt_logprobs=1)
    run(play(script, [one]))
    number = key(range(1500), 9, 0)
    assert_answered(script, one)
    assert one.logprobs.tolist() == [score(number, index) for index in range(30)]
    assert one.top == [top(script, number, index, token(script, number, index), 2) for index in range(30)]
    assert one.prompt_logprobs.tolist() == [score(number, -place) for place in range(1, 1500)]
    assert one.prompt_top == [top(script, number, -place, place, 1) for place in range(1, 1500)]


def test_a_prompt_can_be_scored_without_a_token(run):
    one = stream(9, range(600), 0, prompt_logprobs=0)
    run(play(Script(), [one]))
    assert len(one.prompt_logprobs) == 599
    assert one.emitted.tolist() == []


FAULTS = {
    "kill": "signal SIGKILL",
    "exit": "exit 1",
    "garbage": "protocol",
    "oversized": "protocol",
    "unknown": "protocol",
    "gap": "protocol",
    "double": "protocol",
    "half": "protocol",
    "close": "hung",
    "hang": "hung",
    "stand": "hung",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_is_survived(run, lives, kind):
    script = Script(faults=(Fault(kind, 20), Fault(kind, 1)), lives=lives, per_frame=(1, 4))
    streams = [stream(n, [n]) for n in range(1, 5)]

    async def main():
        keeper = await play(script, streams, **QUICK)
        assert keeper.restarts == {FAULTS[kind]: 2}

    run(main())
    assert_answered(script, *streams)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_tokens(run, lives, seed):
    choose = random.Random(seed)
    script = Script(
        faults=tuple(Fault("kill", choose.randint(1, 60)) for _ in range(12)),
        lives=lives,
        per_frame=tuple(choose.randint(1, 5) for _ in range(7)),
    )
    streams = [
        stream(n, range(n), choose.randint(1, 120), sampling=Sampling(logprobs=0 if n % 2 else -1)) for n in range(1, 9)
    ]

    async def main():
        keeper = await play(script, streams)
        assert keeper.died() >= 3
        assert keeper.resumes == sum(one.resumes for one in streams) > 0

    run(main())
    assert_answered(script, *streams)


def test_killed_from_outside_at_random_tokens(run):
    choose = random.Random(7)
    script = Script(pace="ping")
    streams = [stream(n, [n], 60) for n in range(1, 5)]

    async def main():
        async with keeping(script, ping_interval=0.002) as keeper:
            for one in streams:
                keeper.submit(one)
            for target in sorted(choose.sample(range(1, 55), 8)):
                await choose.choice(streams).wait(target)
                await keeper.reach("ready")
                os.kill(keeper.process.pid, signal.SIGKILL)
            await keeper.drained()
            assert keeper.died() >= 4

    run(main())
    assert_answered(script, *streams)


def test_killed_while_it_loads(run, tmp_path):
    script = Script(hold=str(tmp_path / "go"))
    one = stream(1)

    async def main():
        async with keeping(script) as keeper:
            keeper.submit(one)
            for _ in range(FIRST_STARTS - 1):
                await keeper.reach("loading")
                os.kill(keeper.process.pid, signal.SIGKILL)
                await keeper.reach("restarting")
            let_go(script)
            await keeper.drained()
            assert one.resumes == 0

    run(main())
    assert_answered(script, one)


def test_a_stopped_process_is_replaced(run):
    script = Script(pace="ping")
    one = stream(1, max_tokens=30)

    async def main():
        async with keeping(script, **QUICK) as keeper:
            keeper.submit(one)
            await one.wait(5)
            os.kill(keeper.process.pid, signal.SIGSTOP)
            await keeper.reach("restarting")
            assert "hung" in keeper.reason
            await keeper.drained()
            assert keeper.restarts == {"hung": 1}

    run(main())
    assert_answered(script, one)


def test_an_idle_engine_is_no_hung_engine(run):
    async def main():
        async with keeping(Script(), ping_interval=0.005, hang_timeout=0.5) as keeper:
            await keeper.until(lambda: keeper.pong.seq > 150)
            assert keeper.died() == 0

    run(main())


def test_a_load_that_fails_is_told_in_the_engine_s_words(run, lives):
    script = Script(faults=(Fault("bad_model"),), lives=lives)
    one = stream(1)

    async def main():
        async with keeping(script) as keeper:
            keeper.submit(one)
            await keeper.reach("failed")
            assert isinstance(keeper.error, ModelError)
            assert keeper.reason == "model.safetensors: the tensor lm_head is missing"
            assert keeper.died() == 1

    run(main())
    assert isinstance(one.error, ModelError)


@pytest.mark.parametrize(("kind", "reason"), [("vanish", "exit 1"), ("stall", "load timeout"), ("version", "version")])
def test_starts_that_fail_are_tried_three_times(run, lives, kind, reason):
    script = Script(always=Fault(kind), lives=lives)

    async def main():
        async with keeping(script, load_timeout=0.3) as keeper:
            await keeper.reach("failed")
            assert reason in keeper.reason
            assert keeper.died() == FIRST_STARTS

    run(main())
    assert Path(lives).stat().st_size <= FIRST_STARTS


def test_a_third_start_may_succeed(run, lives):
    script = Script(faults=(Fault("vanish"), Fault("vanish")), lives=lives)
    one = stream(1)
    run(play(script, [one]))
    assert_answered(script, one)


def test_an_interpreter_that_cannot_be_started(run, monkeypatch):
    async def main():
        async with keeping(Script()) as keeper:
            keeper._command = ["/nonexistent/engine"]
            await keeper.reach("failed")
            assert "No such file" in keeper.reason

    run(main())


def test_once_it_ran_it_is_started_until_it_runs_again(run, lives):
    faults = (Fault("kill", 5), Fault("bad_model"), Fault("vanish"), Fault("vanish"), Fault("version"), None)
    script = Script(faults=faults, lives=lives)
    one = stream(1)

    async def main():
        keeper = await play(script, [one])
        reasons = [reason for state, reason in keeper.states if state == "restarting"]
        assert reasons[1] == "model.safetensors: the tensor lm_head is missing"
        assert "exit 1" in reasons[2]

    run(main())
    assert_answered(script, one)


def test_the_back_off_grows_is_bounded_and_ends_with_progress(run, lives):
    async def main():
        async with keeping(Script(faults=(None, Fault("kill", 1)), lives=lives)) as keeper:
            await keeper.reach("ready")
            waits = []
            for attempts in (1, 2, 3, 4, 8, 20, 5000):
                keeper._attempts = attempts
                waits.append(Keeper._backoff(keeper))
            assert waits[0] == 0.0
            assert waits == sorted(waits)
            assert waits[-1] == MAX_BACKOFF
            one = stream(1)
            keeper.submit(one)
            await keeper.drained()
            assert keeper._attempts == 0

    run(main())


def test_a_poisonous_request_fails_alone(run):
    script = Script(poison=(POISON,))
    one = stream(1, [POISON])

    async def main():
        keeper = await play(script, [one])
        assert keeper.died() == 3

    run(main())
    assert isinstance(one.error, PoisonedError)
    assert one.error.code == "poisoned"


@pytest.mark.parametrize("place", [0, 5, 10])
def test_a_poisonous_request_among_others(run, place):
    script = Script(poison=(POISON,), per_frame=(2,))
    streams = [stream(n, [n, POISON] if n == place + 1 else [n], 40) for n in range(1, 12)]

    async def main():
        keeper = await play(script, streams)
        assert keeper.died() <= 4

    run(main())
    bad = streams.pop(place)
    assert isinstance(bad.error, PoisonedError)
    assert_answered(script, *streams)


def test_two_poisonous_requests(run):
    script = Script(poison=(POISON,))
    streams = [stream(n, [n, POISON] if n in {2, 4} else [n]) for n in range(1, 7)]
    run(play(script, streams))
    assert [one.id for one in streams if isinstance(one.error, PoisonedError)] == [2, 4]
    assert_answered(script, *(one for one in streams if one.id not in {2, 4}))


def test_a_poisonous_request_that_comes_late(run):
    script = Script(poison=(POISON,), pace="ping")
    streams = [stream(n, [n]) for n in range(1, 4)]
    bad = stream(9, [POISON])

    async def main():
        async with keeping(script, ping_interval=0.002) as keeper:
            for one in streams:
                keeper.submit(one)
            await streams[0].wait(10)
            keeper.submit(bad)
            await keeper.drained()

    run(main())
    assert isinstance(bad.error, PoisonedError)
    assert_answered(script, *streams)


def test_suspects_are_tried_in_turn_and_others_wait(run, lives, sent):
    script = Script(faults=(Fault("kill", 0), Fault("kill", 0)), lives=lives, pace="ping")
    suspects, late = [stream(n, [n]) for n in (1, 2, 3)], stream(4)

    async def main():
        async with keeping(script, ping_interval=0.002) as keeper:
            for one in suspects:
                keeper.submit(one)
            await keeper.until(lambda: keeper.died() == 2)
            keeper.submit(late)
            await suspects[0].wait(0)
            assert not late.emitted
            await keeper.drained()

    run(main())
    assert_answered(script, *suspects, late)
    first, second, third = submitted(sent)
    assert first == second == [1, 2, 3]
    assert third == [1, 2, 3, 1, 2, 4]


def test_a_suspect_that_is_cancelled_does_not_pass_its_blame_on(run, lives):
    script = Script(poison=(POISON,), faults=(Fault("kill", 0), Fault("kill", 0)), lives=lives, pace="ping")
    bad, good = stream(1, [1, 2]), stream(2)

    async def main():
        async with keeping(script, ping_interval=0.002) as keeper:
            keeper.submit(bad)
            keeper.submit(good)
            await keeper.until(lambda: bad.stalls == 2 and keeper.is_running(bad))
            os.kill(keeper.process.pid, signal.SIGSTOP)
            keeper.cancel(bad)
            assert not keeper.is_running(good)
            os.kill(keeper.process.pid, signal.SIGKILL)
            await keeper.drained()

    run(main())
    assert bad.finished.reason == "cancelled"
    assert_answered(script, good)


def test_cancel(run, sent):
    script = Script(pace="ping")
    kept, dropped = stream(1), stream(2, max_tokens=4000)

    async def main():
        async with keeping(script, ping_interval=0.002) as keeper:
            keeper.submit(kept)
            keeper.submit(dropped)
            await dropped.wait(10)
            keeper.cancel(dropped)
            assert dropped.done
            await keeper.drained()
            await keeper.until(lambda: not keeper.is_running(dropped) and not keeper.pong.running)

    run(main())
    assert_answered(script, kept)
    assert dropped.finished.reason == "cancelled"
    assert dropped.emitted.tolist() == expected([1, 2, 3], 2, 0, len(dropped.emitted))
    (life,) = sent.values()
    assert Cancel(id=2) in life


def test_cancel_while_the_engine_is_away(run, tmp_path, sent):
    script = Script(hold=str(tmp_path / "go"))
    one, two = stream(1), stream(2)

    async def main():
        async with keeping(script) as keeper:
            keeper.submit(one)
            keeper.submit(two)
            keeper.cancel(one, DeadlineError("too late"))
            let_go(script)
            await keeper.drained()

    run(main())
    assert one.error.code == "deadline_exceeded"
    assert_answered(script, two)
    assert submitted(sent) == [[2]]


def test_other_weights_after_a_restart(run, lives):
    script = Script(hashes=("one", "two"), faults=(Fault("kill", 6),), lives=lives, per_frame=(3,))
    begun, waiting = stream(1), stream(2)

    async def main():
        async with keeping(script, load=Load(model="fake", max_seqs=1)) as keeper:
            keeper.submit(begun)
            keeper.submit(waiting)
            await keeper.drained()
            assert keeper.info.weights_hash == "two"

    run(main())
    assert isinstance(begun.error, EngineError)
    assert "weights" in begun.error.message
    assert_answered(script, waiting)


def test_a_second_engine_is_as_large_as_the_first(run, lives):
    """Sizes that were left to the memory of the moment are fixed by the first start: an open stream must fit again."""
    script = Script(faults=(Fault("kill", 6),), lives=lives, pages=9, context=1000)
    one = stream(1)

    async def main():
        async with keeping(script, load=Load(model="fake")) as keeper:
            keeper.submit(one)
            await keeper.drained()
            await keeper.reach("ready")
            assert keeper.restarts
            assert (keeper.load.context, keeper.load.kv_bytes) == (1000, 9 << 10)
            assert keeper.load.device == "cpu"
            assert (keeper.info.context, keeper.info.kv_bytes) == (1000, 9 << 10)

    run(main())
    assert_answered(script, one)


@pytest.mark.parametrize(("named", "device"), [("NVIDIA H200", "cuda"), ("host", "host"), ("cpu", "cpu")])
def test_a_second_engine_runs_on_the_device_of_the_first(named, device):
    """A GPU that went or came is no reason to go on with other bits."""
    keeper = Keeper(Load(model="fake"))
    keeper.process = SimpleNamespace(send=lambda *_: None)
    keeper._on_ready(EngineInfo(device=named))

    assert keeper.load.device == device


def test_stop_does_not_wait_for_the_back_off(run, monkeypatch):
    monkeypatch.setattr(Watched, "_backoff", lambda _: 1000.0)

    async def main():
        async with keeping(Script()) as keeper:
            await keeper.reach("ready")
            os.kill(keeper.process.pid, signal.SIGKILL)
            await keeper.reach("restarting")
            keeper.submit(stream(1))

    run(main())


def test_an_engine_that_does_not_stop_is_killed(run, monkeypatch):
    monkeypatch.setattr(process_module, "GRACE", 0.1)

    async def main():
        async with keeping(Script()) as keeper:
            await keeper.reach("ready")
            pid = keeper.process.pid
            os.kill(pid, signal.SIGSTOP)
        assert not is_alive(pid)

    run(main())


def test_stop_leaves_streams_to_their_owner(run):
    one = stream(1, max_tokens=4000)

    async def main():
        async with keeping(Script(pace="ping")) as keeper:
            keeper.submit(one)
            await one.wait(0)
        assert not one.done
        keeper.cancel(one)
        assert one.finished == Finished(id=1, reason="cancelled")

    run(main())


def restart(times):
    async def main():
        async with keeping(Script()) as keeper:
            await keeper.reach("ready")
            flat = open_descriptors(), len(children())
            memory = 0
            for turn in range(times):
                one = stream(turn + 1)
                keeper.submit(one)
                await keeper.drained()
                os.kill(keeper.process.pid, signal.SIGKILL)
                await keeper.reach("restarting")
                await keeper.reach("ready")
                memory = memory or (turn > times // 4 and resident_bytes())
            assert (open_descriptors(), len(children())) == flat
            assert keeper.restarts == {"signal SIGKILL": times}
            assert resident_bytes() < memory + (4 << 20)

    return main()


def test_restarts_leave_nothing_behind(run):
    run(restart(10))
    assert not children()


@pytest.mark.soak
def test_a_hundred_restarts_leave_nothing_behind(run):
    run(restart(100))
    assert not children()


FRONT = """
import asyncio, sys
sys.path[:0] = sys.argv[1].split(":")
from fakes import Script
from rig import keeping, stream
async def main():
    async with keeping(Script(pace="ping")) as keeper:
        one = stream(1, max_tokens=4000)
        keeper.submit(one)
        await one.wait(1)
        print(keeper.process.pid, file=sys.stderr)
        await keeper.drained()
asyncio.run(main())
"""


def test_an_engine_never_outlives_the_front():
    path = command(Script())[3]
    front = subprocess.Popen([sys.executable, "-c", FRONT, path], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with front:
        try:
            engine = os.pidfd_open(int(front.stderr.readline()))
        finally:
            front.kill()
    gone, _, _ = select.select([engine], [], [], 30)
    os.close(engine)
    assert gone


def test_the_oracle_is_the_engine(run):
    script = Script()
    one = stream(1, [5], 10)
    run(play(script, [one]))
    assert one.emitted.tolist() == expected([5], 1, 0, 10) == answer(script, one.submit)[0]


def test_a_model_that_is_gone_after_a_death_is_given_up(run, lives):
    """It may be back at the next start; after three refusals in a row nobody waits for it any longer."""
    faults = (Fault("kill", 5), Fault("bad_model"), Fault("kill", 5))
    script = Script(faults=faults, always=Fault("bad_model"), lives=lives)
    one = stream(1)

    async def main():
        async with keeping(script) as keeper:
            keeper.submit(one)
            await keeper.reach("failed")
            assert keeper.died() == 6

    run(main())
    assert isinstance(one.error, ModelError)
    assert len(one.emitted) == 10


def test_a_prompt_that_cannot_be_handed_over_fails_alone(run, monkeypatch):
    """Out of descriptors: the memfd of a long prompt cannot be made."""
    long, short = stream(1, prompt=[5] * SPILL), stream(2)

    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    async def main():
        async with keeping(Script()) as keeper:
            await keeper.reach("ready")
            monkeypatch.setattr(os, "memfd_create", refuse)
            keeper.submit(long)
            keeper.submit(short)
            await keeper.drained()

    run(main())
    assert long.error.code == "queue_full"
    assert_answered(Script(), short)


def test_an_engine_that_cannot_be_watched_is_no_engine(run, monkeypatch):
    """The descriptor of the process could not be had once: the child is killed and another one started."""
    real, calls = os.pidfd_open, []

    def once(pid, *rest):
        calls.append(pid)
        if len(calls) == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(pid, *rest)

    monkeypatch.setattr(os, "pidfd_open", once)
    one = stream(1)

    async def main():
        async with keeping(Script()) as keeper:
            keeper.submit(one)
            await keeper.drained()

    run(main())
    assert_answered(Script(), one)
    assert not is_alive(calls[0])
