"""Promise 2 against the faults that are not a clean death."""

import signal
import sys
from pathlib import Path

import checkpoints
import poisoned_engine
import pytest
import torch
from harness import ended, kill, record, run, serving

from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Limits, Sampling

TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    checkpoints.make("qwen3", path)
    return path


def request(number, *more):
    return Submit(
        prompt=pack_ids([number, number + 1, *more]),
        sampling=Sampling(temperature=0.8, logprobs=0),
        limits=Limits(max_tokens=TOKENS),
        seed=number,
    )


@pytest.fixture(scope="module")
def undisturbed(folder):
    """What seven requests say when nothing goes wrong."""

    async def work():
        async with serving(folder) as service:
            streams = [service.open(request(number)) for number in range(7)]
            await ended(*streams)
            return [record(stream) for stream in streams]

    return run(work())


def test_a_stopped_engine_is_noticed_and_replaced(folder, undisturbed):
    async def work():
        async with serving(folder, ping_interval=0.1, hang_timeout=2.0) as service:
            streams = [service.open(request(number)) for number in range(6)]
            await streams[0].wait(5)
            kill(service, signal.SIGSTOP)
            await ended(*streams)
            return [record(stream) for stream in streams], service.supervisor.active.restarts

    records, restarts = run(work())

    assert restarts["hung"] >= 1
    assert records == undisturbed[:6]


def test_a_request_that_kills_the_engine_fails_alone(folder, undisturbed):
    command = (sys.executable, str(Path(poisoned_engine.__file__)))

    async def work():
        async with serving(folder, command=command) as service:
            streams = [service.open(request(number)) for number in range(3)]
            poison = service.open(request(3, poisoned_engine.POISON))
            streams += [service.open(request(number)) for number in range(4, 7)]
            await ended(poison, *streams)
            return poison.error, [record(stream) for stream in streams]

    error, records = run(work())

    assert error.code == "poisoned"
    assert records == [*undisturbed[:3], *undisturbed[4:]]


BOUNDS = [
    ({}, {"min_tokens": 2, "stop_ids": (999_999, 2**31 - 1)}),
    ({"repetition_penalty": 0.01, "top_p": 0.9}, {}),
    ({"repetition_penalty": 10.0, "min_p": 1.0, "temperature": 1e-5}, {}),
    ({"logit_bias": dict.fromkeys(range(260), -100.0), "top_k": 1}, {}),
    ({"temperature": 2.0, "top_p": 1e-9, "top_k": 2**31 - 1}, {"min_tokens": TOKENS}),
]


def test_values_at_their_bounds_harm_nobody(folder):
    async def work():
        async with serving(folder) as service:
            for sampling, limits in BOUNDS:
                submit = Submit(
                    prompt=pack_ids([1, 2, 2]),
                    sampling=Sampling(**sampling),
                    limits=Limits(max_tokens=TOKENS, **limits),
                )
                stream = service.open(submit)
                await ended(stream)
                assert service.supervisor.active.restarts == {}, (sampling, limits)
                assert stream.error is None, (sampling, limits)
                assert len(stream.emitted) == TOKENS, (sampling, limits)

    run(work())


def test_a_request_that_is_not_finite_spoils_no_prefix_of_others(tmp_path):
    """A NaN reaches the rows before it in its chunk, as 0 · NaN: their pages must not be found by anybody."""
    model = checkpoints.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[200] = float("inf")
    model.save_pretrained(tmp_path)
    shared = list(range(20, 60))

    async def answers(*prompts):
        async with serving(tmp_path) as service:
            streams = []
            for prompt in prompts:
                submit = Submit(prompt=pack_ids(prompt), limits=Limits(max_tokens=5), seed=1)
                streams.append(service.open(submit))
                await ended(streams[-1])
            return streams

    (alone,) = run(answers([*shared, 9, 8]))
    bad, good = run(answers([*shared, 200, 3], [*shared, 9, 8]))

    assert bad.error.code == "non_finite_logits"
    assert record(good) == record(alone)
