"""Forgetting earlier answers, and the counters of drafters over the lives of engines."""

import asyncio

import pytest
from fakes import Script, command
from rig import LETTERS, keeping, serving
from test_local import dial, submit, until

from fwd.errors import BadRequestError, ConfigError, NotReadyError
from fwd.front.drafts import Drafts
from fwd.front.keeper import Keeper
from fwd.protocol.client import AsyncClient, Client
from fwd.protocol.local import Prompt, RequestsQuery, Status, StatusQuery
from fwd.protocol.messages import DropDrafts, Dropped, Finished, Load
from fwd.protocol.values import DrafterCounts, EngineInfo, Limits, RequestInfo


@pytest.fixture
def uds(tmp_path):
    return tmp_path / "fwd.sock"


def counts(name, drafts, *places):
    return DrafterCounts(name, drafts, drafts * 4, sum(places), list(places), drafts / 10)


def test_counters_never_fall():
    drafts = Drafts()
    assert drafts.counts == []
    drafts.observe([counts("a", 2, 2, 1)])
    drafts.observe([counts("a", 3, 3, 1)])
    drafts.end_life()
    assert drafts.counts == [counts("a", 3, 3, 1)]
    drafts.observe([counts("b", 1, 1), counts("a", 1, 0, 0, 0)])
    assert drafts.counts == [counts("a", 4, 3, 1, 0), counts("b", 1, 1)]
    drafts.end_life()
    drafts.end_life()
    assert drafts.counts == [counts("a", 4, 3, 1, 0), counts("b", 1, 1)]


def test_dropping(uds):
    with serving(uds, Script(vocab=127, low=32, corpus=500)) as daemon, Client(uds) as client:
        assert client.drop_drafts() == 500
        assert client.status().corpus_tokens == 0
        assert client.drop_drafts() == 0
        assert daemon.call(daemon.service.status).state == "ready"


def test_what_is_not_erased_is_not_said_to_be():
    async def scenario():
        drafts, sent = Drafts(), []
        asked = drafts.ask(sent.append)
        drafts.dropped(0, "/state: the log of drafts cannot be erased: Read-only file system")
        assert sent == [DropDrafts()]
        return await asked

    with pytest.raises(ConfigError, match=r"^/state: the log of drafts cannot be erased: Read-only file system$"):
        asyncio.run(scenario())


def test_dropping_beside_other_asks(uds):
    async def scenario():
        async with AsyncClient(uds) as client:
            return await asyncio.gather(client.drop_drafts(), client.status(), client.requests(), client.drop_drafts())

    with serving(uds, Script(vocab=127, low=32, corpus=500)):
        first, status, requests, second = asyncio.run(scenario())
    assert (first, second, requests) == (500, 0, [])
    assert isinstance(status, Status)


def test_answers_to_asks_keep_their_order(uds):
    with serving(uds, Script(vocab=127, low=32, corpus=9)) as daemon:
        channel = dial(daemon)
        channel.send(StatusQuery(), DropDrafts(), StatusQuery(), DropDrafts(), RequestsQuery(), submit(1))
        messages = until(channel, Finished)
        while len([1 for each in messages if not hasattr(each, "id")]) < 5:
            messages += [channel.receive(30)]
        asks = [type(each).__name__ for each in messages if not hasattr(each, "id")]
        assert asks == ["Status", "Dropped", "Status", "Dropped", "Requests"]
        assert [each.tokens for each in messages if isinstance(each, Dropped)] == [9, 0]
        channel.close()


def test_only_its_own_user_may_drop(uds, monkeypatch):
    with serving(uds) as daemon:
        monkeypatch.setattr("fwd.front.local.peer_uid", lambda _: 4711)
        channel = dial(daemon)
        channel.send(DropDrafts())
        assert channel.receive(30).code == "forbidden"
        channel.close()


def test_an_engine_that_dies_has_forgotten_nothing(run):
    async def scenario():
        async with keeping(Script(pace="ping"), ping_interval=3600.0) as keeper:
            await keeper.reach("ready")
            keeper.process.send = lambda _: None  # it does not hear
            asked = asyncio.create_task(keeper.drop_drafts())
            await asyncio.sleep(0)
            keeper.process.kill("test")
            with pytest.raises(NotReadyError, match="died"):
                await asked
        keeper = Keeper(Load(model="x"), command=command(Script()))
        with pytest.raises(NotReadyError, match="starting"):
            await keeper.drop_drafts()

    run(scenario())


def test_a_prediction_from_a_local_client(uds):
    with serving(uds) as daemon, Client(uds) as client:
        accepted, *_ = client.events("hi", prediction="likely", max_tokens=3, max_draft=2**31)
        assert accepted.notes == ("max_draft: 2147483648 is taken as 15, the most that a step has room for",)
        with pytest.raises(BadRequestError, match="outside the vocabulary") as refused:
            list(client.submit([40], prediction=[500]))
        assert refused.value.param == "prediction"
        accepted, *_ = client.submit([40], prediction=[50] * 5000, max_tokens=1)
        assert accepted.notes == ("prediction: longer than the context, so only its first 4096 tokens are used",)
        accepted, *_ = client.submit([40], prediction=[50] * 4096, max_tokens=1)
        assert accepted.notes == ()
        accepted, *_ = client.submit([40], prediction=[50] * 4096 + [500], max_tokens=1)
        assert accepted.notes, "what is not used is not looked at: a gigabyte would hold up everyone"
        with pytest.raises(BadRequestError, match="no drafter 'mtp'"):
            list(client.submit([40], drafter="mtp"))
        channel = dial(daemon)
        channel.send(Prompt(id=4, body=memoryview(b"x"), prediction=memoryview(b"\xff"), limits=Limits(max_tokens=1)))
        failed = channel.receive(30)
        assert (failed.tag, failed.code, failed.param) == (4, "invalid_value", "prediction")
        channel.close()


def test_what_a_step_brings_is_counted(uds):
    script = Script(vocab=127, low=32, per_frame=(5,))
    with serving(uds, script) as daemon, Client(uds) as client:
        for _ in client.submit([40], max_tokens=20, seed=1):
            pass
        found: list[RequestInfo] = []
        daemon.service.observers.append(lambda one: found.append(daemon.service._describe(one, 0.0)))
        list(client.submit([40], max_tokens=20, seed=1))
        (row,) = found
        assert (row.output_tokens, row.commits) == (20, 4)


def test_the_drafters_of_an_engine_are_known(uds):
    script = Script(vocab=127, low=32, drafters=("suffix",), notes=("slow",), drafts=(counts("suffix", 1, 1),))
    with serving(uds, script) as daemon, Client(uds) as client:
        daemon.wait(daemon.keeper.until(lambda: daemon.keeper.pong.drafters != []))
        status = client.status()
        assert isinstance(status.engine, EngineInfo)
        assert (status.engine.drafters, status.engine.draft_notes) == (("suffix",), ("slow",))
        assert status.drafters == [counts("suffix", 1, 1)]
        assert LETTERS.drafters == ()
