"""What a request says to the prefix cache, and what the answer says of it."""

import fakes
import pytest
from apiserver import script, serving

from fwd.front import service
from fwd.protocol.values import Timing

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
TOLD = Timing(cached_tokens=2, cache_miss="differs", differs_at=2, queue_ms=1.5)
BODIES = {CHAT: {"messages": [{"role": "user", "content": "x"}]}, COMPLETE: {"prompt": [20, 21, 22, 23]}}


def about(body):
    return body["fwd"]["cached_tokens"], body["fwd"]["cache_miss"], body["fwd"]["cache_differs_at"]


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_what_is_said_to_the_cache_reaches_the_engine_again_after_a_death(folder, run, tmp_path, path):
    async def scenario():
        faults = (fakes.Fault("kill", after=2),)
        async with serving(folder, script(faults=faults, lives=str(tmp_path / "lives"))) as server:
            common = {**BODIES[path], "max_tokens": 5}
            for more in ({}, {"prompt_cache_key": "mine", "cache_prompt": True}, {"cache_prompt": False}):
                assert (await server.post(path, common | more))[0] == 200
            again = [stream.resubmit() for stream in server.seen]
            assert [(one.cache_key, one.cache) for one in again] == [("", True), ("mine", True), ("", False)]

    run(scenario())


@pytest.mark.parametrize("more", [{"prompt_cache_key": "x" * 257}, {"cache_prompt": "no"}, {"prompt_cache_key": 5}])
def test_nonsense_is_refused(folder, run, more):
    async def scenario():
        async with serving(folder, script("x")) as server:
            status, body, _ = await server.post(COMPLETE, {"prompt": "x", **more})
            assert (status, body["error"]["param"]) == (400, next(iter(more)))

    run(scenario())


@pytest.mark.parametrize("stop", [None, "stop"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_tells_what_the_cache_did(folder, run, stop, stream):
    async def scenario():
        async with serving(folder, script("ab stop ", cached=TOLD)) as server:
            asked = {"prompt": [20, 21, 22, 23], "max_tokens": 100, "n": 2, "stop": stop}
            if stream:
                *_, last, done = await server.stream(COMPLETE, asked | {"stream_options": {"include_usage": True}})
                assert done == "[DONE]"
            else:
                _, last, _ = await server.post(COMPLETE, asked)
            assert about(last) == (2, "differs", 2)
            assert last["fwd"]["timings"]["queue_ms"] == 3.0
            assert last["usage"]["prompt_tokens"] == 4
            assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}

    run(scenario())


def test_a_cache_that_missed_nothing_is_told_by_null(folder, run):
    async def scenario():
        async with serving(folder, script(cached=Timing(cached_tokens=3))) as server:
            _, body, _ = await server.post(COMPLETE, {"prompt": [20, 21, 22, 23], "max_tokens": 2})
            assert about(body) == (3, None, None)

    run(scenario())


@pytest.mark.parametrize("kind", ["hang", "kill"])
def test_an_engine_that_says_nothing_delays_no_complete_answer(folder, run, monkeypatch, kind):
    monkeypatch.setattr(service, "SETTLE", 0.01 if kind == "hang" else 50.0)

    async def scenario():
        async with serving(folder, script("ab stop ", always=fakes.Fault(kind, after=7))) as server:
            asked = {"prompt": "x", "max_tokens": 100, "stop": "stop"}
            status, body, _ = await server.post(COMPLETE, asked)
            assert (status, body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == (200, "ab ", "stop")
            assert about(body) == (0, None, None)
            await server.keeper.stop()

    run(scenario())
