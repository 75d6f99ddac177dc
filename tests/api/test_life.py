"""Answers over time: clients that go, engines that die, deadlines, pings, states."""

import asyncio
import contextlib
import json
import signal

import fakes
import pytest
from apiserver import NAME, events, ids, script, serving, text, until

from fwd.api import body as bodies
from fwd.errors import DeadlineError, OverloadedError

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
PROMPT = ids("hi")
NEVER = 3600.0
PINGED = {"ping_interval": 0.002, "hang_timeout": 30.0}


def request(**options):
    return {"model": NAME, "prompt": "hi", "max_tokens": 200, "seed": 7, **options}


def oracle(count):
    return text(fakes.expected(PROMPT, 7, 0, count, script()))


def still(**options):
    """An engine that takes requests and never makes a step: everything stays in prefill."""
    return script(pace="ping", **options)


@contextlib.asynccontextmanager
async def sent(server, body, path=COMPLETE, unix=None):
    """A request on a socket of its own, which can be cut off."""
    if unix:
        reader, writer = await asyncio.open_unix_connection(unix)
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(head.encode() + b"\r\n\r\n" + data)
    try:
        yield reader, writer
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def half_sent(server):
    """A request whose body never comes to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99"
    writer.write(head.encode() + b'\r\n\r\n{"prompt":')
    try:
        yield reader
    finally:
        writer.close()


async def opened(server, count=1):
    await until(lambda: len(list(server.service.streams)) == count)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_in_prefill(folder, run, stream, reset):
    async def scenario():
        async with serving(folder, still(), ping_interval=NEVER) as server:
            async with sent(server, request(stream=stream, n=2)) as (_, writer):
                await opened(server, 2)
                assert all(server.keeper.is_running(open_stream) for open_stream in server.service.streams)
                if reset:
                    writer.transport.abort()
            await server.idle()

    run(scenario())


def test_a_client_that_leaves_while_the_model_is_away(folder, run, tmp_path):
    async def scenario():
        fault = fakes.Fault("exit")
        engine = script(faults=(None, fault), lives=str(tmp_path / "lives"), hold=str(tmp_path / "hold"))
        (tmp_path / "hold").touch()
        async with serving(folder, engine) as server:
            (tmp_path / "hold").unlink()
            server.keeper.process.kill("test")
            await until(lambda: server.keeper.state == "restarting")
            async with sent(server, request(stream=True)):
                await opened(server)
                (stream,) = server.service.streams
                assert not server.keeper.is_running(stream)
            await server.idle()
            assert stream.finished.reason == "cancelled"

    run(scenario())


def test_a_client_that_leaves_in_the_middle(folder, run):
    async def scenario():
        async with serving(folder, script(pace="ping"), **PINGED) as server:
            async with sent(server, request(stream=True)) as (reader, _):
                await reader.readuntil(b'"text":"' + oracle(1).encode())
            await server.idle()
            assert (await server.post(COMPLETE, request(max_tokens=2)))[0] == 200

    run(scenario())


def test_a_client_that_reads_nothing_keeps_nobody_waiting(folder, run, tmp_path):
    async def scenario():
        unix = str(tmp_path / "http.sock")  # its buffers in the kernel are small
        async with serving(folder, script("x", context=1 << 20, per_frame=(100,)), unix=unix) as server:
            async with sent(server, request(stream=True, max_tokens=20_000, logprobs=5), unix=unix) as (reader, _):
                reader._transport.pause_reading()
                await opened(server)
                (slow,) = server.service.streams
                await until(lambda: slow.done)
                assert (await server.post(COMPLETE, request(max_tokens=50)))[0] == 200
                await until(lambda: any(server.unsent()))
                assert sum(server.unsent()) < 1 << 20
                reader._transport.resume_reading()
                raw = b""
                while not raw.endswith(b"\r\n0\r\n\r\n"):
                    raw += await reader.read(1 << 20)
                assert raw.startswith(b"HTTP/1.1 200 OK")
                assert raw.count(b'"x"') > 20_000
                assert b"data: [DONE]" in raw[-100:]
            await server.idle()

    run(scenario())


def test_a_request_is_cancelled_by_its_id(folder, run):
    async def scenario():
        async with serving(folder, script(pace="ping"), **PINGED) as server:
            headers = {"X-Request-Id": "mine"}
            asked = asyncio.create_task(server.post(COMPLETE, request(), headers=headers))
            await until(lambda: any(len(stream.emitted) for stream in server.service.streams))
            url = f"{server.url}/v1/requests/cmpl-mine"
            async with server.session.delete(url) as response:
                assert await response.json() == {"id": "cmpl-mine", "object": "request", "cancelled": True}
            status, body, _ = await asked
            assert status == 200
            assert body["choices"][0]["finish_reason"] == "cancelled"
            made = body["usage"]["completion_tokens"]
            assert 0 < made < 200
            assert body["choices"][0]["text"] == oracle(made)
            async with server.session.delete(url) as response:
                assert response.status == 404
            await server.idle()

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline(folder, run, stream):
    async def scenario():
        async with serving(folder, still(), ping_interval=NEVER) as server:
            headers = {"X-Fwd-Deadline-Ms": "5"}
            if stream:
                (last,) = [e for e in await server.stream(COMPLETE, request(), headers=headers) if "error" in e]
                assert last["error"]["code"] == "deadline_exceeded"
            else:
                status, body, found = await server.post(COMPLETE, request(), headers=headers)
                assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
                assert found["x-should-retry"] == "false"
            await server.idle()

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_scored_prompt_is_cancelled_in_prefill(folder, run, stream):
    async def scenario():
        async with serving(folder, still(), ping_interval=NEVER) as server:
            scored = request(prompt="hello", echo=True, logprobs=1)
            ask = server.stream if stream else server.post
            asked = asyncio.create_task(ask(COMPLETE, scored, headers={"X-Request-Id": "mine"}))
            await opened(server)
            async with server.session.delete(f"{server.url}/v1/requests/cmpl-mine") as response:
                assert response.status == 200
            if stream:
                first, last, done = await asked
                assert done == "[DONE]"
            else:
                status, first, _ = await asked
                last = first
                assert status == 200
            assert first["choices"][0]["text"] == "hello"
            assert first["choices"][0]["logprobs"]["token_logprobs"] == [None] * 5
            assert first["choices"][0]["logprobs"]["top_logprobs"] == [None] * 5
            assert last["choices"][0]["finish_reason"] == "cancelled"

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_while_a_prompt_is_scored(folder, run, stream):
    async def scenario():
        async with serving(folder, still(), ping_interval=NEVER) as server:
            scored, headers = request(prompt="hello", echo=True, logprobs=1), {"X-Fwd-Deadline-Ms": "5"}
            if stream:
                (body,) = await server.stream(COMPLETE, scored, headers=headers)
            else:
                _, body, _ = await server.post(COMPLETE, scored, headers=headers)
            assert body["error"]["code"] == "deadline_exceeded"

    run(scenario())


def test_a_body_that_does_not_arrive(folder, run, monkeypatch):
    monkeypatch.setattr(bodies, "READ_SECONDS", 0.01)

    async def scenario():
        async with serving(folder, script()) as server, half_sent(server) as reader:
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert b'"code":"request_timeout"' in await reader.readuntil(b"}}")

    run(scenario())


def test_a_body_that_does_not_arrive_delays_no_stop(folder, run, monkeypatch):
    monkeypatch.setattr(bodies, "READ_SECONDS", NEVER)
    reading, received = asyncio.Event(), bodies._received

    async def noted(*arguments):
        reading.set()
        return await received(*arguments)

    monkeypatch.setattr(bodies, "_received", noted)

    async def scenario():
        outside = contextlib.AsyncExitStack()
        async with asyncio.timeout(30), outside, serving(folder, script()) as server:
            await outside.enter_async_context(half_sent(server))
            await reading.wait()

    run(scenario())


def test_a_deadline_that_is_kept(folder, run):
    async def scenario():
        async with serving(folder, script()) as server:
            status, body, _ = await server.post(COMPLETE, request(), headers={"X-Fwd-Deadline-Ms": "86400000"})
            assert (status, body["choices"][0]["text"]) == (200, oracle(200))

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 1, 57])
def test_an_engine_that_is_killed_is_not_noticed(folder, run, tmp_path, stream, after):
    async def scenario():
        faults = tuple(fakes.Fault("kill", after=after) for _ in range(2))
        async with serving(folder, script(faults=faults, lives=str(tmp_path / "lives"))) as server:
            if stream:
                *chunks, done = await server.stream(COMPLETE, request(n=2, stop=["@"]))
                assert done == "[DONE]"
                answers = [
                    "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)
                    for index in range(2)
                ]
                about = chunks[-1]["fwd"]
            else:
                _, body, _ = await server.post(COMPLETE, request(n=2, stop=["@"]))
                answers, about = [choice["text"] for choice in body["choices"]], body["fwd"]
            wanted = [text(fakes.expected(PROMPT, 7, choice, 200, script())) for choice in range(2)]
            assert answers == wanted
            assert about["resumes"] == sum(server.keeper.restarts.values()) * 2 == 4

    run(scenario())


def test_an_error_in_the_middle_is_an_event_and_no_done(folder, run):
    async def scenario():
        async with (
            serving(folder, script(pace="ping"), **PINGED) as server,
            server.session.post(server.url + COMPLETE, json=request(stream=True, n=2)) as response,
        ):
            begun = await response.content.readuntil(b"\n\n")
            for open_stream in list(server.service.streams)[1:]:
                server.service.supervisor.cancel(open_stream, DeadlineError("too late"))
            *chunks, last = events(begun + await response.read())
            assert last == {
                "error": {
                    "message": "too late",
                    "type": "server_error",
                    "param": None,
                    "code": "deadline_exceeded",
                }
            }
            assert all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])
            await server.idle()

    run(scenario())


def test_a_request_that_kills_the_engine_gets_its_own_error(folder, run):
    async def scenario():
        async with serving(folder, script(poison=(20,))) as server:
            poisoned = asyncio.create_task(server.post(COMPLETE, request(prompt=[20])))
            status, body, _ = await server.post(COMPLETE, request())
            assert (status, body["choices"][0]["text"]) == (200, oracle(200))
            status, body, headers = await poisoned
            assert (status, body["error"]["code"]) == (500, "poisoned")
            assert headers["x-should-retry"] == "false"
            *_, last = await server.stream(COMPLETE, request(prompt=[20]))
            assert last["error"]["code"] == "poisoned"

    run(scenario())


def test_a_bug_in_a_stream_is_an_event_too(folder, run, monkeypatch):
    async def scenario():
        async with serving(folder, script()) as server:
            monkeypatch.setattr("fwd.api.openai.completions.CompletionDialect.closing", lambda *_: 1 / 0)
            *_, last = await server.stream(COMPLETE, request(max_tokens=3))
            assert last == {
                "error": {"message": "internal error", "type": "server_error", "param": None, "code": "internal_error"}
            }

    run(scenario())


def test_pings_while_there_is_nothing_to_say(folder, run):
    async def scenario():
        async with (
            serving(folder, still(), ping_interval=NEVER, keep_alive=0.002) as server,
            server.session.post(server.url + COMPLETE, json=request(stream=True)) as response,
        ):
            assert response.status == 200
            assert [await response.content.readuntil(b"\n\n") for _ in range(3)] == [b": ping\n\n"] * 3
            for open_stream in list(server.service.streams):
                server.service.cancel(open_stream)
            found = [event for event in events(await response.read()) if event != ": ping"]
            assert found[0]["choices"][0]["finish_reason"] == "cancelled"
            assert found[1] == "[DONE]"

    run(scenario())


def test_a_ping_tells_how_far_the_prompt_is(folder, run):
    async def scenario():
        engine = script(pace="ping", chunk=1)
        async with (
            serving(folder, engine, ping_interval=0.005, hang_timeout=30.0, keep_alive=0.002) as server,
            server.session.post(server.url + COMPLETE, json=request(stream=True, prompt=[20] * 99)) as response,
        ):
            told = []
            while len(told) < 3:
                line = await response.content.readuntil(b"\n\n")
                if line != b": ping\n\n":
                    assert (line[:10], line[-5:]) == (b": prefill ", b"/99\n\n")
                    told.append(int(line[10:-5]))
            assert told == sorted(told)
            assert 0 < told[-1] < 99
            (shown,) = (await server.get("/health"))[1]["prefilling"]
            assert shown["done"] >= told[-1]
            (row,) = server.service.requests().requests
            assert (row.state, row.prompt_tokens) == ("prefill", 99)
            assert told[-1] <= row.prefilled < 99
            await until(lambda: not server.keeper.pong.prefilling)
            assert server.service.requests().requests[0].state == "running"

    run(scenario())


def test_a_full_queue_says_when_to_come_back(folder, run):
    async def scenario():
        async with serving(folder, still(), ping_interval=NEVER, max_queue=3) as server:
            async with sent(server, request(n=2)):
                await opened(server, 2)
                assert server.keeper.queue.tokens == len(PROMPT)  # a prompt counts once
                refused = await server.post(COMPLETE, request(n=2))
                assert_shed(*refused, seconds=1)
                assert (await server.get("/health"))[1]["queue"]["tokens"] == len(PROMPT)
                async with sent(server, request(prompt=[20])):
                    await opened(server, 3)
                    assert_shed(*await server.post(COMPLETE, request(prompt=[20])), seconds=1)
                await opened(server, 2)
            await server.idle()
            assert server.keeper.queue.tokens == 0


def assert_shed(status, body, headers, seconds):
    assert (status, body["error"]["code"], body["error"]["type"]) == (429, "queue_full", "rate_limit_error")
    assert int(headers["Retry-After"]) == seconds


def test_the_wait_is_what_must_drain_over_the_measured_rate(folder, run):
    async def scenario():
        async with (
            serving(folder, still(), ping_interval=NEVER, max_queue=100) as server,
            sent(server, request(prompt=[20] * 100)),
        ):
            await opened(server)
            for rate, tokens, seconds in ((10.0, 25, 3), (10.0, 1, 1), (0.5, 29, 58), (0.0, 1, 60), (1e9, 99, 1)):
                server.keeper.pace.rate = rate
                with pytest.raises(OverloadedError) as caught:
                    server.service.check_queue(tokens)
                assert caught.value.retry_after == seconds
            server.keeper.pace.rate = 0.1
            assert_shed(*await server.post(COMPLETE, request(prompt=[20] * 3)), seconds=10)

    run(scenario())


def test_a_full_queue_refuses_before_it_reads(folder, run, monkeypatch):
    async def scenario():
        async with serving(folder, still(), ping_interval=NEVER, max_queue=4) as server:
            async with sent(server, request(prompt=[20] * 9)):  # longer than the queue, and alone in it
                await opened(server)
                monkeypatch.setattr(bodies, "_received", lambda *_: 1 / 0)
                for path, asked in ((CHAT, {"messages": []}), (COMPLETE, request())):
                    assert_shed(*await server.post(path, asked), seconds=1)
                server.service.draining = True
                monkeypatch.undo()
                assert (await server.post(COMPLETE, request()))[1]["error"]["code"] == "not_ready"
            await server.idle()

    run(scenario())


def test_what_the_engine_has_begun_waits_no_more(folder, run):
    async def scenario():
        engine = script(pace="ping", chunk=1)
        async with serving(folder, engine, ping_interval=0.002, hang_timeout=30.0, max_queue=50) as server:
            streaming = request(stream=True, prompt=[20] * 60, max_tokens=500)
            async with sent(server, streaming):
                await until(lambda: server.keeper.pong.prefilling)
                assert server.keeper.queue.tokens == 0
                async with sent(server, streaming | {"prompt": [21] * 50}):
                    await opened(server, 2)
                    await until(lambda: server.keeper.queue.tokens == 0)
            await server.idle()

    run(scenario())


def test_bodies_on_their_way_are_bounded(folder, run):
    async def scenario():
        async with serving(folder, script(), max_body=1024) as server:
            inbox = server.runner.app[bodies.INBOX]
            with inbox.counted() as take:
                take(inbox.most - 10)
                assert_shed(*await server.post(COMPLETE, request()), seconds=1)
            assert inbox.bytes == 0
            assert (await server.post(COMPLETE, request()))[0] == 200
            assert inbox.bytes == 0

    run(scenario())

    run(scenario())


def test_while_the_model_loads(folder, run, tmp_path):
    async def scenario():
        hold = tmp_path / "hold"
        async with serving(folder, script(hold=str(hold)), ready=False) as server:
            await until(lambda: server.keeper.state == "loading")
            assert (await server.get("/live"))[0] == 200
            for path in ("/ready", "/health"):
                status, body, headers = await server.get(path)
                assert (status, body["ready"], body["state"], headers["Retry-After"]) == (503, False, "loading", "1")
                assert body["reason"]
            for path, asked in ((CHAT, {"messages": []}), (COMPLETE, request()), ("/tokenize", {"prompt": "x"})):
                status, body, headers = await server.post(path, asked)
                assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "not_ready", "1")
                assert "loading" in body["error"]["message"]
            assert (await server.get("/v1/models"))[0] == 503
            assert (await server.post(COMPLETE, request(model="gpt-9")))[0] == 404
            hold.touch()
            await server.ready()
            assert (await server.get("/ready"))[:2] == (200, {"ready": True, "state": "ready", "reason": ""})

    run(scenario())


def test_an_engine_that_cannot_be_started(folder, run, tmp_path):
    async def scenario():
        engine = script(always=fakes.Fault("bad_model"), lives=str(tmp_path / "lives"))
        async with serving(folder, engine, ready=False) as server:
            await until(lambda: server.keeper.state == "failed")
            status, body, headers = await server.get("/ready")
            assert (status, body["state"]) == (503, "failed")
            assert "lm_head" in body["reason"]
            assert "Retry-After" not in headers
            status, body, headers = await server.post(COMPLETE, request())
            assert (status, body["error"]["code"], headers["x-should-retry"]) == (500, "engine_failed", "false")

    run(scenario())


def test_while_the_engine_restarts_requests_wait(folder, run, tmp_path):
    async def scenario():
        hold = tmp_path / "hold"
        hold.touch()
        async with serving(folder, script(hold=str(hold))) as server:
            hold.unlink()
            server.keeper.process.kill("test")
            await until(lambda: server.keeper.state == "restarting")
            status, body, _ = await server.get("/ready")
            assert (status, body["state"]) == (503, "restarting")
            asked = asyncio.create_task(server.post(COMPLETE, request()))
            await opened(server)
            hold.touch()
            assert (await asked)[1]["choices"][0]["text"] == oracle(200)
            status, body, _ = await server.get("/health")
            assert (status, body["restarts"]) == (200, {"test": 1})

    run(scenario())


def test_while_the_daemon_stops(folder, run):
    async def scenario():
        async with serving(folder, script(pace="ping"), **PINGED) as server:
            asked = asyncio.create_task(server.post(COMPLETE, request(max_tokens=30)))
            await opened(server)
            server.service.draining = True
            assert (await server.get("/ready"))[1]["state"] == "stopping"
            status, body, headers = await server.post(COMPLETE, request())
            assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "not_ready", "5")
            status, body, _ = await asked
            assert (status, body["choices"][0]["text"]) == (200, oracle(30))

    run(scenario())


def test_health_tells_progress(folder, run):
    async def scenario():
        async with serving(folder, script(pace="ping"), **PINGED) as server:
            asked = asyncio.create_task(server.post(COMPLETE, request(max_tokens=50)))
            await until(lambda: server.keeper.pong.steps > 3 and server.keeper.pong.running)
            status, body, _ = await server.get("/health")
            assert (status, body["ready"], body["model"]) == (200, True, NAME)
            assert body["engine"]["steps"] > 3
            assert body["engine"]["progress_age_s"] < 30
            assert body["queue"] == {"running": 1, "waiting": 0, "tokens": 0, "limit": 1 << 20}
            assert body["engine"]["tokens_per_second"] > 0
            assert body["load"] == {"done_bytes": 1, "total_bytes": 2, "mb_per_s": 0.0}
            await asked

    run(scenario())


def test_sigkill_from_outside(folder, run):
    async def scenario():
        async with serving(folder, script(pace="ping"), **PINGED) as server:
            chat = {"messages": [{"role": "user", "content": "x"}], "seed": 1, "max_tokens": 60}
            asked = asyncio.create_task(server.stream(CHAT, chat))
            await until(lambda: any(len(stream.emitted) > 5 for stream in server.service.streams))
            server.keeper.process.kill(signal.SIGKILL.name)
            *chunks, done = await asked
            prompt = ids("<|user|>x\n<|assistant|>")
            found = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            assert found == text(fakes.expected(prompt, 1, 0, 60, script()))
            assert done == "[DONE]"

    run(scenario())
