"""`/v1/completions`: prompts in all forms, echo, columns, and scoring as lm-eval does it."""

import fakes
import pytest
from apiserver import NAME, ids, script, serving, text

URL = "/v1/completions"


def request(prompt="hi", **options):
    return {"model": NAME, "prompt": prompt, "max_tokens": 5, "seed": 7, **options}


def oracle(prompt, count=5, choice=0):
    return text(fakes.expected(ids(prompt), 7, choice, count, script()))


def texts(body):
    return [choice["text"] for choice in body["choices"]]


def joined(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["text"] for choice in choices)


@pytest.mark.parametrize(
    "prompt", ["hi", ids("hi"), ["hi"], [ids("hi")]], ids=["text", "ids", "list of text", "list of ids"]
)
def test_the_forms_of_a_prompt(folder, run, prompt):
    async def scenario():
        async with serving(folder, script()) as server:
            status, body, _ = await server.post(URL, request(prompt))
            assert status == 200
            assert body["id"].startswith("cmpl-")
            assert body["object"] == "text_completion"
            assert body["choices"] == [
                {"index": 0, "text": oracle("hi"), "logprobs": None, "finish_reason": "length"},
            ]
            assert body["usage"]["prompt_tokens"] == 2
            assert body["fwd"]["receipt"]["seed"] == 7

    run(scenario())


@pytest.mark.parametrize("prompts", [["one", "two", "six"], [ids("one"), ids("two"), ids("six")]])
def test_many_prompts_with_many_choices(folder, run, prompts):
    async def scenario():
        async with serving(folder, script()) as server:
            wanted = [oracle(prompt, choice=choice) for prompt in ("one", "two", "six") for choice in range(2)]
            _, body, _ = await server.post(URL, request(prompts, n=2))
            assert texts(body) == wanted
            assert [choice["index"] for choice in body["choices"]] == list(range(6))
            assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (9, 30)
            *chunks, done = await server.stream(URL, request(prompts, n=2))
            assert [joined(chunks, index) for index in range(6)] == wanted
            assert done == "[DONE]"

    run(scenario())


def test_a_stream_ends_with_a_finish_reason(folder, run):
    async def scenario():
        async with serving(folder, script()) as server:
            *chunks, done = await server.stream(URL, request())
            assert joined(chunks) == oracle("hi")
            assert chunks[-1]["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]
            assert "fwd" in chunks[-1]
            assert len({chunk["id"] for chunk in chunks}) == 1
            assert done == "[DONE]"

    run(scenario())


@pytest.mark.parametrize("prompt", ["déjà ", ids("déjà ")])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_gives_the_prompt_first(folder, run, prompt, stream):
    async def scenario():
        async with serving(folder, script("vu", eos_at=2)) as server:
            if stream:
                *chunks, _ = await server.stream(URL, request(prompt, echo=True, n=2))
                answers = [joined(chunks, index) for index in range(2)]
            else:
                _, body, _ = await server.post(URL, request(prompt, echo=True, n=2))
                answers = texts(body)
            assert answers == ["déjà vu"] * 2

    run(scenario())


def test_echo_alone_runs_nothing_but_the_prompt(folder, run):
    async def scenario():
        async with serving(folder, script("x")) as server:
            _, body, _ = await server.post(URL, request("hi", echo=True, max_tokens=0))
            assert texts(body) == ["hi"]
            assert body["usage"]["completion_tokens"] == 0
            assert body["choices"][0]["finish_reason"] == "length"

    run(scenario())


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_a_text_is_scored_as_lm_eval_does(folder, run, count, stream):
    async def scenario():
        engine = script("xyz")
        prompts = [ids("context text"), ids("b")]
        async with serving(folder, engine) as server:
            body = request(prompts, echo=True, logprobs=1, max_tokens=count, temperature=0)
            if stream:
                *chunks, _ = await server.stream(URL, body)
                found = [merged(chunks, index) for index in range(2)]
            else:
                _, whole, _ = await server.post(URL, body)
                found = [choice["logprobs"] for choice in whole["choices"]]
            for prompt, columns in zip(prompts, found, strict=True):
                number = fakes.key(prompt, 7, 0)
                scores = [fakes.score(number, -place) for place in range(1, len(prompt))]
                scores += [fakes.score(number, place) for place in range(count)]
                assert columns["tokens"] == list(text(prompt) + "xyz"[:count])
                assert columns["token_logprobs"] == [None, *scores]
                assert columns["text_offset"] == list(range(len(prompt) + count))
                assert columns["top_logprobs"][0] is None
                for name, score, top in zip(columns["tokens"][1:], scores, columns["top_logprobs"][1:], strict=True):
                    assert top == {name: score}

    run(scenario())


def merged(chunks, index):
    columns: dict[str, list] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index and choice["logprobs"]:
                for name, column in choice["logprobs"].items():
                    columns.setdefault(name, []).extend(column)
    return columns


def test_columns_spell_every_token_apart(folder, run):
    async def scenario():
        async with serving(folder, script("é!é")) as server:
            _, body, _ = await server.post(URL, request("ab", logprobs=2))
            columns = body["choices"][0]["logprobs"]
            assert columns["tokens"] == [r"bytes:\xc3", r"bytes:\xa9", "!", r"bytes:\xc3", r"bytes:\xa9"]
            assert columns["text_offset"] == [0, 0, 1, 2, 2]
            assert [len(top) for top in columns["top_logprobs"]] == [2] * 5
            assert columns["top_logprobs"][2] == {
                "!": columns["token_logprobs"][2],
                '"': columns["token_logprobs"][2] - 1,
            }

    run(scenario())


def test_logprobs_of_zero_tell_the_token_itself(folder, run):
    async def scenario():
        async with serving(folder, script("ab")) as server:
            _, body, _ = await server.post(URL, request(logprobs=0, max_tokens=2))
            columns = body["choices"][0]["logprobs"]
            assert [list(top) for top in columns["top_logprobs"]] == [["a"], ["b"]]

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_of_prompt_and_answer(folder, run, stream):
    async def scenario():
        async with serving(folder, script("xy")) as server:
            body = request(["ab", "c"], return_token_ids=True, max_tokens=2)
            if stream:
                *chunks, _ = await server.stream(URL, body)
                choices = [choice for chunk in chunks for choice in chunk["choices"]]
                made = [choice["token_ids"] for choice in choices if choice["index"] == 1 and "token_ids" in choice]
                assert [token for tokens in made for token in tokens] == ids("xy")
                assert sorted(c["prompt_token_ids"] for c in choices if "prompt_token_ids" in c) == [
                    ids("ab"),
                    ids("c"),
                ]
            else:
                _, whole, _ = await server.post(URL, body)
                assert [choice["token_ids"] for choice in whole["choices"]] == [ids("xy")] * 2
                assert [choice["prompt_token_ids"] for choice in whole["choices"]] == [ids("ab"), ids("c")]

    run(scenario())


def test_special_tokens_in_a_text_are_text(folder, run):
    async def scenario():
        async with serving(folder, script("x")) as server:
            _, body, _ = await server.post(URL, request("<|end|>", return_token_ids=True))
            assert body["choices"][0]["prompt_token_ids"] == ids("<|end|>")

    run(scenario())


def test_tokenize_and_detokenize(folder, run):
    async def scenario():
        async with serving(folder, script("x", context=99)) as server:
            status, body, _ = await server.post("/tokenize", {"prompt": "né", "return_token_strs": True})
            assert (status, body) == (
                200,
                {"tokens": ids("né"), "count": 3, "max_model_len": 99, "token_strs": ["n", "\ufffd", "\ufffd"]},
            )
            _, body, _ = await server.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
            assert text(body["tokens"]) == "<|user|>hi\n<|assistant|>"
            _, body, _ = await server.post("/detokenize", {"tokens": [*ids("né"), 0]})
            assert body == {"prompt": "né<|end|>"}

    run(scenario())


def test_models(folder, run):
    async def scenario():
        async with serving(folder, script("x", context=99)) as server:
            status, body, _ = await server.get("/v1/models")
            assert status == 200
            (card,) = body["data"]
            created = card.pop("created")
            assert isinstance(created, int)
            assert card == {"id": NAME, "object": "model", "owned_by": "fwd", "max_model_len": 99}
            status, body, _ = await server.get(f"/v1/models/{NAME}")
            assert (status, body) == (200, {**card, "created": created})

    run(scenario())
