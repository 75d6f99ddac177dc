"""`prediction` and `fwd.drafter`: what reaches the engine, what is refused, and what an answer says of them."""

import openai
import pytest
from apiserver import ids, script, serving
from test_openai_client import NAME, SAY, call  # noqa: F401  # a fixture

from fwd.front.bounds import MAX_DRAFT
from fwd.kernels.sizes import MAX_ROWS
from fwd.protocol.ids import unpack_ids
from fwd.protocol.values import Timing

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
SPOKEN = Timing(
    steps=10,
    drafted={"suffix:prediction": 12, "suffix": 3},
    accepted={"suffix:prediction": 7, "suffix": 1},
    holds=[1, 0, 4],
)


def asked(path, **options):
    own = {"messages": SAY} if path == CHAT else {"prompt": "hi"}
    return {**own, "max_tokens": 10, "seed": 7, **options}


def content(value):
    return {"prediction": {"type": "content", "content": value}}


def test_the_front_knows_the_rows_of_a_step():
    assert MAX_DRAFT == MAX_ROWS - 1


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_it_reaches_the_engine_as_ids(folder, run, path):
    texts = [
        ("a likely text", "a likely text"),
        ([{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}], "in parts"),
        ("<|end|> is text", "<|end|> is text"),
        ("", ""),
        ([], ""),
    ]

    async def scenario():
        async with serving(folder, script()) as server:
            for given, text in texts:
                status, body, _ = await server.post(path, asked(path, n=2, **content(given)))
                assert status == 200
                assert body["fwd"]["notes"] == []
                assert [list(unpack_ids(one.submit.prediction)) for one in server.seen] == [ids(text)] * 2
                server.seen.clear()

    run(scenario())


def test_it_changes_no_token(folder, run):
    async def scenario():
        async with serving(folder, script()) as server:
            bodies = [(await server.post(COMPLETE, asked(COMPLETE, **more)))[1] for more in ({}, content("x"))]
            assert bodies[0]["choices"] == bodies[1]["choices"]

    run(scenario())


@pytest.mark.parametrize("length", [4096, 4097, 400_000])
def test_one_that_is_longer_than_the_context_is_cut(folder, run, length):
    async def scenario():
        async with serving(folder, script()) as server:
            _, body, _ = await server.post(
                COMPLETE, asked(COMPLETE, **content("ab" * (length // 2) + "c" * (length % 2)))
            )
            (one,) = server.seen
            assert list(unpack_ids(one.submit.prediction)) == ids("ab" * 2048)
            cut = ["prediction: longer than the context, so only its first 4096 tokens are used"]
            assert body["fwd"]["notes"] == cut * (length > 4096)

    run(scenario())


MALFORMED = [
    ({"prediction": "text"}, "prediction"),
    ({"prediction": {"content": "x"}}, "prediction"),
    ({"prediction": {"type": "file", "content": "x"}}, "prediction.type"),
    ({"prediction": {"type": "content"}}, "prediction"),
    (content(3), "prediction.content"),
    (content([{"type": "image_url", "text": "x"}]), "prediction.content.0.type"),
    (content([{"type": "text"}]), "prediction.content.0"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_a_malformed_one_is_refused(folder, run, path):
    async def scenario():
        async with serving(folder, script()) as server:
            for field, param in MALFORMED:
                status, body, _ = await server.post(path, asked(path, **field))
                assert (status, body["error"]["code"], body["error"]["param"]) == (400, "invalid_value", param)
            assert server.seen == []

    run(scenario())


def test_a_drafter_that_is_not_there_is_refused(folder, run):
    async def scenario():
        async with serving(folder, script(drafters=("suffix", "model"))) as server:
            status, body, _ = await server.post(CHAT, asked(CHAT, fwd={"drafter": "eagle"}))
            assert (status, body["error"]["param"]) == (400, "fwd.drafter")
            assert body["error"]["message"] == (
                "no drafter 'eagle' is loaded here: use one of auto, off, suffix, model"
            )
            for name in ("auto", "off", "suffix", "model"):
                assert (await server.post(CHAT, asked(CHAT, fwd={"drafter": name})))[0] == 200

    run(scenario())


def test_max_draft_is_no_more_than_a_step_holds(folder, run):
    async def scenario():
        async with serving(folder, script()) as server:
            for most, taken in ((-1, -1), (0, 0), (15, 15), (16, 15), (64, 15), (2**31, 15)):
                _, body, _ = await server.post(CHAT, asked(CHAT, fwd={"max_draft": most}))
                assert server.seen[-1].submit.draft.max_draft == taken
                assert body["fwd"]["max_draft"] == (None if taken < 0 else taken)
                said = [f"max_draft: {most} is taken as 15, the most that a step has room for"]
                assert body["fwd"]["notes"] == said * (most > taken)

    run(scenario())


def test_the_usage_and_the_report_count_drafts(folder, run):
    async def scenario():
        async with serving(folder, script(cached=SPOKEN)) as server:
            _, body, _ = await server.post(CHAT, asked(CHAT))
            details = {"accepted_prediction_tokens": 7, "rejected_prediction_tokens": 5}
            assert body["usage"]["completion_tokens_details"] == details
            assert body["fwd"]["drafted"] == {"suffix:prediction": 12, "suffix": 3}
            assert body["fwd"]["accepted"] == {"suffix:prediction": 7, "suffix": 1}
            assert body["fwd"]["accept_length"] > 1
            assert body["fwd"]["speculative_decoding"] == {
                "mean_acceptance_length": 2.6,
                "draft_acceptance_rate": 0.533,
                "acceptance_histogram": [1, 0, 4],
                "num_spec_steps": 5,
                "num_accepted_draft_tokens": 8,
                "num_draft_tokens": 15,
            }
            _, several, _ = await server.post(CHAT, asked(CHAT, n=2))
            assert several["fwd"]["speculative_decoding"] is None
            *_, last, _ = await server.stream(COMPLETE, asked(COMPLETE, stream_options={"include_usage": True}))
            assert last["usage"]["completion_tokens_details"] == details
            _, body, _ = await server.post(COMPLETE, asked(COMPLETE, max_tokens=3))
            details = {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 5}
            assert body["usage"]["completion_tokens_details"] == details

    run(scenario())


def test_the_openai_client_reads_them(call):  # noqa: F811  # the fixture
    def work(client):
        given = {"type": "content", "content": [{"type": "text", "text": "likely"}]}
        answer = client.chat.completions.create(model=NAME, messages=SAY, max_tokens=10, prediction=given)
        details = answer.usage.completion_tokens_details
        assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (7, 5)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=NAME, messages=SAY, prediction={"type": "content", "content": 3})
        assert refused.value.param == "prediction.content"

    call(work, script(cached=SPOKEN))
