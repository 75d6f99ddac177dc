"""The real `openai` client, unchanged, over TCP and over a Unix socket."""

import asyncio
import contextlib
from pathlib import Path

import fakes
import httpx2
import openai
import pytest
from apiserver import NAME, ids, script, serving, text

SAY = [{"role": "user", "content": "hi"}]
PROMPT = ids("<|user|>hi\n<|assistant|>")
ASKED = {"model": NAME, "messages": SAY, "max_tokens": 20, "seed": 7}


def oracle(count, choice=0):
    return text(fakes.expected(PROMPT, 7, choice, count, script()))


@contextlib.contextmanager
def connected(server, unix, **options):
    transport = httpx2.HTTPTransport(uds=str(unix)) if unix else None
    url = "http://daemon/v1" if unix else f"{server.url}/v1"
    with (
        httpx2.Client(transport=transport) as http,
        openai.OpenAI(base_url=url, api_key="any", http_client=http, max_retries=0, **options) as client,
    ):
        yield client


@pytest.fixture(params=["tcp", "unix"])
def call(request, folder, run, tmp_path):
    """Run a blocking function of a client in a thread, against a server with this script."""
    unix = tmp_path / "http.sock" if request.param == "unix" else None

    def caller(work, engine=None, **options):
        async def scenario():
            async with serving(folder, engine or script(), unix=str(unix or ""), **options) as server:

                def blocking():
                    with connected(server, unix) as client:
                        work(client)

                await asyncio.to_thread(blocking)

        run(scenario())

    return caller


def test_chat(call):
    def work(client):
        answer = client.chat.completions.create(**ASKED, n=2)
        assert [choice.message.content for choice in answer.choices] == [oracle(20, 0), oracle(20, 1)]
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.total_tokens == len(PROMPT) + 40
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        assert answer.fwd["receipt"]["seed"] == 7

    call(work)


def test_chat_as_a_stream(call):
    def work(client):
        stream = client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
        *chunks, last = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == oracle(20)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == "length"
        assert (last.choices, last.usage.completion_tokens) == ([], 20)

    call(work)


def test_the_stream_helper(call):
    def work(client):
        with client.chat.completions.stream(**ASKED, logprobs=True, top_logprobs=2) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == oracle(9)
        assert len(final.choices[0].logprobs.content) == 10
        assert len(final.choices[0].logprobs.content[0].top_logprobs) == 2

    call(work, script(eos_at=9))


def test_completions(call):
    def work(client):
        answer = client.completions.create(
            model=NAME, prompt=[ids("ab"), ids("c")], max_tokens=1, echo=True, logprobs=1
        )
        assert [choice.logprobs.token_logprobs[0] for choice in answer.choices] == [None, None]
        assert [len(choice.logprobs.tokens) for choice in answer.choices] == [3, 2]
        chunks = list(client.completions.create(model=NAME, prompt="hi", max_tokens=9, seed=7, stream=True))
        said = text(fakes.expected(ids("hi"), 7, 0, 9, script()))
        assert "".join(chunk.choices[0].text for chunk in chunks) == said

    call(work)


def test_models(call):
    def work(client):
        assert [model.id for model in client.models.list()] == [NAME]
        assert client.models.retrieve(NAME).owned_by == "fwd"

    call(work)


def test_extra_fields(call):
    def work(client):
        extension = {"drafter": "off", "priority": "background"}
        answer = client.chat.completions.create(**ASKED, extra_body={"top_k": 3, "ignore_eos": True, "fwd": extension})
        assert answer.choices[0].message.content == oracle(20)

    call(work)


def test_errors_become_the_clients_own(call):
    def work(client):
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**{**ASKED, "temperature": 3})
        assert (bad.value.param, bad.value.code, bad.value.type) == (
            "temperature",
            "invalid_value",
            "invalid_request_error",
        )
        assert bad.value.request_id
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(**{**ASKED, "model": "gpt-9"})
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model=NAME, prompt=[20] * 5000)
        assert long.value.code == "context_length_exceeded"

    call(work)


def test_an_error_in_a_stream_is_raised(call):
    def work(client):
        stream = client.completions.create(model=NAME, prompt=[20], stream=True)
        with pytest.raises(openai.APIError) as poisoned:
            list(stream)
        assert poisoned.value.code == "poisoned"

    call(work, script(poison=(20,)))


def test_keys(call, tmp_path):
    keys: Path = tmp_path / "keys"
    keys.write_text("0" * 64)

    def work(client):
        with pytest.raises(openai.AuthenticationError):
            client.models.list()

    call(work, keys=str(keys))
