"""`/v1/chat/completions`, whole and streamed."""

import json

import fakes
import pytest
from apiserver import EOS, FIRST, NAME, ids, script, serving, text

from fwd.api.openai.report import usage
from fwd.protocol.values import Draft

URL = "/v1/chat/completions"
SAY = [{"role": "user", "content": "hi"}]
PROMPT = ids("<|user|>hi\n<|assistant|>")
UTF8 = "naïve 東京 🙂, "


def request(**options):
    return {"model": NAME, "messages": SAY, "max_tokens": 12, "seed": 7, **options}


def oracle(count, *, choice=0, seed=7, prompt=PROMPT):
    return text(fakes.expected(prompt, seed, choice, count, script()))


def joined(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def reason(chunks, index=0):
    (found,) = [
        choice["finish_reason"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index and choice["finish_reason"]
    ]
    return found


def test_a_whole_answer(folder, run):
    async def scenario():
        async with serving(folder, script()) as server:
            status, body, headers = await server.post(URL, request())
            assert status == 200
            assert headers["Content-Type"] == "application/json"
            assert body["id"].startswith("chatcmpl-")
            assert (body["object"], body["model"]) == ("chat.completion", NAME)
            assert body["system_fingerprint"].startswith("fp_")
            (choice,) = body["choices"]
            assert choice == {
                "index": 0,
                "message": {"role": "assistant", "content": oracle(12), "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
            assert body["usage"] == {
                "prompt_tokens": len(PROMPT),
                "completion_tokens": 12,
                "total_tokens": len(PROMPT) + 12,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
            }

    run(scenario())


def test_the_receipt_names_what_the_tokens_depend_on(folder, run):
    async def scenario():
        async with serving(folder, script()) as server:
            _, body, _ = await server.post(URL, request())
            prompts = server.service.prompts
            assert body["fwd"]["receipt"] == {
                "build": "fake",
                "weights_hash": "fake",
                "template_hash": prompts.template.hash,
                "tokenizer_hash": prompts.tokenizer.hash,
                "kernel_set": "fake",
                "dtype": "float32",
                "kv_dtype": "float32",
                "device": "cpu",
                "requant": [],
                "chunk_size": 64,
                "threads": 0,
                "seed": 7,
            }
            assert body["fwd"]["timings"]["ttft_ms"] <= body["fwd"]["timings"]["total_ms"]
            assert body["fwd"]["tokens_per_second"] > 0
            assert body["fwd"]["energy_joules"] is None
            assert (body["fwd"]["drafted"], body["fwd"]["accepted"], body["fwd"]["resumes"]) == ({}, {}, 0)

    run(scenario())


def test_a_stream_is_the_whole_answer_in_chunks(folder, run):
    async def scenario():
        async with serving(folder, script()) as server:
            *chunks, done = await server.stream(URL, request(max_tokens=300))
            assert done == "[DONE]"
            assert joined(chunks) == oracle(300)
            assert reason(chunks) == "length"
            assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert chunks[-1]["choices"][0]["delta"] == {}
            assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
            assert chunks[0]["object"] == "chat.completion.chunk"
            assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)
            assert ["fwd" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
            assert chunks[-1]["fwd"]["receipt"]["seed"] == 7

    run(scenario())


def test_the_headers_of_a_stream(folder, run):
    async def scenario():
        async with (
            serving(folder, script()) as server,
            server.session.post(server.url + URL, json=request(stream=True)) as response,
        ):
            assert response.headers["Content-Type"] == "text/event-stream"
            assert response.headers["Cache-Control"] == "no-cache"
            assert response.headers["X-Accel-Buffering"] == "no"
            await response.read()

    run(scenario())


@pytest.mark.parametrize("continuous", [False, True])
def test_usage_in_a_stream(folder, run, continuous):
    async def scenario():
        async with serving(folder, script()) as server:
            options = {"include_usage": True, "continuous_usage_stats": continuous}
            *chunks, last, _ = await server.stream(URL, request(stream_options=options, n=2))
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 24
            assert last["usage"]["prompt_tokens"] == len(PROMPT)
            assert last["fwd"]["receipt"]["seed"] == 7
            assert not any("fwd" in chunk for chunk in chunks)
            if continuous:
                counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
                assert counts == sorted(counts)
                assert counts[-1] == 24
            else:
                assert all(chunk["usage"] is None for chunk in chunks)

    run(scenario())


def test_choices_are_those_of_the_oracle(folder, run):
    async def scenario():
        async with serving(folder, script()) as server:
            _, body, _ = await server.post(URL, request(n=3))
            wanted = [oracle(12, choice=index) for index in range(3)]
            assert [choice["message"]["content"] for choice in body["choices"]] == wanted
            assert len(set(wanted)) == 3
            assert body["usage"]["prompt_tokens"] == len(PROMPT)
            assert body["usage"]["completion_tokens"] == 36
            *chunks, _ = await server.stream(URL, request(n=3))
            assert [joined(chunks, index) for index in range(3)] == wanted
            assert [reason(chunks, index) for index in range(3)] == ["length"] * 3

    run(scenario())


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
def test_a_seed_comes_back_as_it_went(folder, run, seed):
    async def scenario():
        async with serving(folder, script()) as server:
            _, body, _ = await server.post(URL, request(seed=seed))
            assert body["fwd"]["receipt"]["seed"] == seed
            assert body["choices"][0]["message"]["content"] == oracle(12, seed=seed)

    run(scenario())


def test_a_drawn_seed_gives_the_same_answer_again(folder, run):
    async def scenario():
        async with serving(folder, script()) as server:
            _, first, _ = await server.post(URL, request(seed=None))
            seed = first["fwd"]["receipt"]["seed"]
            assert 0 <= seed < 2**53
            _, second, _ = await server.post(URL, request(seed=seed))
            _, third, _ = await server.post(URL, request(seed=None))
            assert first["choices"] == second["choices"]
            assert third["fwd"]["receipt"]["seed"] != seed

    run(scenario())


@pytest.mark.parametrize("per_frame", [(1,), (2, 5, 1), (40,)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_spans_tokens_and_never_leaks(folder, run, stream, per_frame):
    async def scenario():
        async with serving(folder, script("one two stop three ", per_frame=per_frame)) as server:
            body = request(stop=["stopped", "o stop t"], max_tokens=100)
            if stream:
                *chunks, _ = await server.stream(URL, {**body, "stream_options": {"include_usage": True}})
                answer, ending, usage = joined(chunks), reason(chunks), chunks[-1]["usage"]
            else:
                _, whole, _ = await server.post(URL, body)
                answer, ending = whole["choices"][0]["message"]["content"], whole["choices"][0]["finish_reason"]
                usage = whole["usage"]
            assert (answer, ending) == ("one tw", "stop")
            assert usage["completion_tokens"] == len("one two stop t")
            await server.idle()

    run(scenario())


def test_a_stop_string_is_shown_if_wanted(folder, run):
    async def scenario():
        async with serving(folder, script("abcdef")) as server:
            _, body, _ = await server.post(URL, request(stop="cd", include_stop_str_in_output=True))
            assert body["choices"][0]["message"]["content"] == "abcd"

    run(scenario())


def test_a_partial_stop_string_is_given_at_the_end(folder, run):
    async def scenario():
        async with serving(folder, script("abcdef")) as server:
            *chunks, _ = await server.stream(URL, request(stop="ef!", max_tokens=6))
            assert (joined(chunks), reason(chunks)) == ("abcdef", "length")

    run(scenario())


def test_ends_of_the_model_and_of_the_request(folder, run):
    async def scenario():
        async with serving(folder, script("abcdefgh", eos_at=4)) as server:

            async def said(**options):
                _, body, _ = await server.post(URL, request(max_tokens=8, **options))
                (choice,) = body["choices"]
                return choice["message"]["content"], choice["finish_reason"], body["usage"]["completion_tokens"]

            assert await said() == ("abcd", "stop", 5)
            assert await said(ignore_eos=True) == ("abcdfgh", "length", 8)
            assert await said(stop_token_ids=[FIRST + ord("c")]) == ("ab", "stop", 3)
            assert await said(stop_token_ids=[FIRST + ord("c")], include_stop_str_in_output=True) == ("abc", "stop", 3)
            assert (await said(min_tokens=6))[1:] == ("length", 8)

    run(scenario())


@pytest.mark.parametrize("per_frame", [(1,), (3, 1, 2)])
def test_characters_are_never_broken(folder, run, per_frame):
    async def scenario():
        async with serving(folder, script(UTF8, per_frame=per_frame)) as server:
            length = 3 * len(UTF8.encode())
            *chunks, _ = await server.stream(URL, request(max_tokens=length))
            assert joined(chunks) == UTF8 * 3
            assert "\ufffd" not in json.dumps(chunks, ensure_ascii=False)
            *chunks, _ = await server.stream(URL, request(max_tokens=4))
            assert joined(chunks) == "na\u00efv"[:3]

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_one_item_a_token_with_its_bytes(folder, run, stream):
    async def scenario():
        engine = script("é!", eos_at=5)
        async with serving(folder, engine) as server:
            body = request(logprobs=True, top_logprobs=2, max_tokens=6)
            if stream:
                *chunks, _ = await server.stream(URL, body)
                assert joined(chunks) == "é!é"
                found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
                items = [item for logprobs in found if logprobs for item in logprobs["content"]]
            else:
                _, whole, _ = await server.post(URL, body)
                items = whole["choices"][0]["logprobs"]["content"]
                assert whole["usage"]["completion_tokens"] == 6
            number = fakes.key(PROMPT, 7, 0)
            assert [item["bytes"] for item in items] == [[0xC3], [0xA9], [33], [0xC3], [0xA9], list(b"<|end|>")]
            assert [item["token"] for item in items] == ["\ufffd", "\ufffd", "!", "\ufffd", "\ufffd", "<|end|>"]
            assert [item["logprob"] for item in items] == [fakes.score(number, index) for index in range(6)]
            for item in items:
                first, second = item["top_logprobs"]
                assert first == {key: item[key] for key in ("token", "logprob", "bytes")}
                assert second["logprob"] == item["logprob"] - 1

    run(scenario())


def test_logprobs_without_alternatives(folder, run):
    async def scenario():
        async with serving(folder, script("ab")) as server:
            _, body, _ = await server.post(URL, request(logprobs=True, max_tokens=2))
            assert [item["top_logprobs"] for item in body["choices"][0]["logprobs"]["content"]] == [[], []]

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids(folder, run, stream):
    async def scenario():
        async with serving(folder, script("é", eos_at=3)) as server:
            body = request(return_token_ids=True)
            if stream:
                *chunks, _ = await server.stream(URL, body)
                found = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())]
                prompts = [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk]
            else:
                _, whole, _ = await server.post(URL, body)
                found, prompts = whole["choices"][0]["token_ids"], [whole["prompt_token_ids"]]
            assert found == [*ids("é"), ids("é")[0], EOS]
            assert prompts == [PROMPT]

    run(scenario())


def test_the_prompt_in_ids_is_told_once(folder, run):
    async def scenario():
        async with serving(folder, script()) as server:
            *chunks, _ = await server.stream(URL, request(return_token_ids=True, n=3))
            assert [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk] == [PROMPT]

    run(scenario())


def test_usage_of_every_chunk_is_not_summed_up_each_time(folder, run, monkeypatch):
    asked = []
    monkeypatch.setattr("fwd.api.openai.respond.usage", lambda answer: asked.append(answer) or usage(answer))

    async def scenario():
        async with serving(folder, script()) as server:
            options = {"include_usage": True, "continuous_usage_stats": True}
            *chunks, _ = await server.stream(URL, request(stream_options=options, n=2, max_tokens=100))
            counts = [chunk["usage"]["total_tokens"] for chunk in chunks]
            assert (counts, counts[-1]) == (sorted(counts), len(PROMPT) + 200)
            assert len(asked) == 4

    run(scenario())


def test_what_the_template_is_given(folder, run):
    async def scenario():
        async with serving(folder, script("a")) as server:

            async def prompt(**options):
                _, body, _ = await server.post(URL, request(return_token_ids=True, **options))
                return text(body["prompt_token_ids"])

            tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}] * 2
            assert await prompt() == "<|user|>hi\n<|assistant|>"
            assert await prompt(add_generation_prompt=False) == "<|user|>hi\n"
            assert await prompt(tools=tools) == "<|user|>hi\n[2 tools]<|assistant|>"
            assert await prompt(tools=tools, tool_choice="auto") == "<|user|>hi\n[2 tools]<|assistant|>"
            assert await prompt(tools=tools, tool_choice="none") == "<|user|>hi\n<|assistant|>"
            assert await prompt(chat_template_kwargs={"shout": True}) == "<|user|>hi\n!<|assistant|>"
            parts = [{"type": "text", "text": "yo"}]
            assert await prompt(messages=[{"role": "user", "content": parts}]) == "<|user|>yo\n<|assistant|>"
            begun = [*SAY, {"role": "assistant", "content": "we"}]
            assert await prompt(messages=begun, continue_final_message=True) == "<|user|>hi\n<|assistant|>we"

    run(scenario())


def test_every_parameter_reaches_the_engine(folder, run):
    async def scenario():
        async with serving(folder, script("a")) as server:
            values = {
                "temperature": 0.5,
                "top_p": 0.9,
                "min_p": 0.1,
                "repetition_penalty": 1.5,
                "presence_penalty": -1.0,
                "frequency_penalty": 2.0,
            }
            extension = {"drafter": "off", "max_draft": 3, "priority": "background"}
            options = {"top_k": 5, "logit_bias": {"5": -100, "17": 1.5}, "min_tokens": 2, "stop_token_ids": [9]}
            await server.post(URL, request(**values, **options, fwd=extension, n=2, max_completion_tokens=4))
            first, second = (stream.submit for stream in server.seen)
            assert {name: getattr(first.sampling, name) for name in values} == values
            assert (first.sampling.top_k, first.sampling.logit_bias) == (5, {5: -100.0, 17: 1.5})
            assert (first.limits.max_tokens, first.limits.min_tokens, first.limits.stop_ids) == (4, 2, (EOS, 9))
            assert (first.draft, first.priority) == (Draft(drafter="off", max_draft=3), "background")
            assert (first.choice, second.choice, first.seed, second.seed) == (0, 1, 7, 7)

    run(scenario())


def test_null_and_off_mean_the_default(folder, run):
    async def scenario():
        async with serving(folder, script("a")) as server:
            nothing = dict.fromkeys(("temperature", "top_p", "top_k", "logit_bias", "stop", "n", "fwd", "tools"))
            ignored = {"user": "me", "metadata": {"a": "b"}, "store": True, "priority": 3, "service_tier": "auto"}
            empty = {"functions": [], "modalities": ["text"], "response_format": {"type": "text"}, "suffix": "x"}
            for options in ({}, nothing, ignored, empty, {"top_k": -1}, {"top_k": 0}, {"stop": []}, {"model": None}):
                status, body, _ = await server.post(URL, request(**options))
                assert status == 200, body
            assert len({repr((s.submit.sampling, s.submit.limits, s.submit.draft)) for s in server.seen}) == 1

    run(scenario())


def test_the_answer_takes_all_of_the_context_by_default(folder, run):
    async def scenario():
        async with serving(folder, script("a", context=60)) as server:
            _, body, _ = await server.post(URL, request(max_tokens=None))
            assert body["usage"]["total_tokens"] == 60

    run(scenario())
