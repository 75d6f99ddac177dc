"""Everything a client can get wrong: one clear line in OpenAI's shape, nothing opened, the daemon serving on."""

import json
import random

import pytest
from apiserver import NAME, script, serving

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
SAY = [{"role": "user", "content": "hi"}]
DEEP = "[" * 5000 + "]" * 5000

BAD_FIELDS = [
    *(("temperature", value) for value in (-0.1, 2.1, "1", [], True)),
    *(("top_p", value) for value in (0, 1.1)),
    *(("top_k", value) for value in (-2, 2**31, 1.5)),
    *(("min_p", value) for value in (-0.1, 1.1)),
    *(("repetition_penalty", value) for value in (0, 11)),
    *(("presence_penalty", value) for value in (-3, 3)),
    *(("frequency_penalty", value) for value in (-3, 3)),
    *(("n", value) for value in (0, -1, 129, "2")),
    *(("max_tokens", value) for value in (-1, 0, 2**40, "5")),
    *(("min_tokens", value) for value in (-1, 6)),
    *(("seed", value) for value in (2**63, -(2**63) - 1, 10**30, 0.5, "7")),
    *(("stop", value) for value in ("", ["a", ""], ["x"] * 17, 5, [5], "y" * 1025)),
    *(("stop_token_ids", value) for value in ([-1], [2**31], list(range(33)), "1")),
    *(("logit_bias", value) for value in ({"x": 1}, {"-1": 1}, {"5": 101}, {"5": "1"}, {"9999": 1}, [1])),
    *(("stream", value) for value in ("yes", 1)),
    ("stream_options", "usage"),
    *(("fwd", value) for value in ("off", [])),
    *((name, [1]) for name in ("allowed_token_ids", "bad_words")),
    *(("prompt_logprobs", value) for value in (0, 1)),
    *(("truncate_prompt_tokens", value) for value in (0, 5)),
    *(("thinking_token_budget", value) for value in (0, 5)),
    ("use_beam_search", True),
    *(("typical_p", value) for value in (0.0, 0.5)),
    *(("model", value) for value in (5, "m" * 257)),
]
BAD_CHAT = [
    *(("messages", value) for value in ([], "hi", [1], {}, None)),
    *(("max_completion_tokens", value) for value in (0, -1)),
    *(("top_logprobs", value) for value in (1, 21, -1)),
    *(("logprobs", value) for value in (1, "yes")),
    *(("tool_choice", value) for value in ("required", {"type": "function", "function": {"name": "f"}}, 5)),
    ("tools", "f"),
    ("audio", {"voice": "x"}),
    ("modalities", ["text", "audio"]),
    ("chat_template", "{{ 1 }}"),
    ("chat_template_kwargs", {"messages": "x"}),
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("documents", [{"text": "x"}]),
    ("web_search_options", {"search_context_size": "low"}),
    ("echo", True),
    ("verbosity", "high"),
]
BAD_COMPLETION = [
    *(("prompt", value) for value in ("", [], [[]], [[1], []], ["a", 1], [[1], "a"], [1.5], [-1], [2**31], None, 5)),
    *(("logprobs", value) for value in (-1, 21, True)),
    *(("best_of", value) for value in (0, 2, 129)),
    ("suffix", "x"),
    ("prompt_embeds", "x"),
    ("echo", "yes"),
]
INNER = [
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [*SAY, {"role": "user", "content": [{"type": "image_url"}]}]}, "messages.1.content"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content"),
    ({"messages": [*SAY, 5]}, "messages.1"),
    ({"fwd": {"drafter": "magic"}}, "fwd.drafter"),
    ({"fwd": {"max_draft": 2**31 + 1}}, "fwd.max_draft"),
    ({"fwd": {"priority": "urgent"}}, "fwd.priority"),
    ({"fwd": {"speed": 9}}, "fwd"),
    ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ({"stop": ["a", 5]}, "stop.1"),
    ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs"),
]


def body_of(path, **options):
    base = {"messages": SAY} if path == CHAT else {"prompt": "hi"}
    return {"model": NAME, "max_tokens": 5, **base, **options}


@pytest.fixture
def refused(folder, run):
    """Post each body to one server; every one must be refused as the caller says, and the next good one served.

    With `inside` the param may be a path that begins with the one given.
    """

    def check(cases, *, inside=False, **config):
        async def scenario():
            async with serving(folder, script("x"), **config) as server:
                for path, body, status, param in cases:
                    data = body if isinstance(body, bytes) else json.dumps(body).encode()
                    headers = {"Content-Type": "application/json"}
                    async with server.session.post(server.url + path, data=data, headers=headers) as response:
                        answer = await response.json()
                        assert response.status == status, (body, answer)
                    assert set(answer) == {"error"}, body
                    error = answer["error"]
                    assert set(error) == {"message", "type", "param", "code"}
                    assert (error["param"].partition(".")[0] if inside else error["param"]) == param, (body, error)
                    assert error["message"]
                    assert "\n" not in error["message"]
                    assert "Traceback" not in error["message"]
                assert not list(server.service.streams)
                assert (await server.post(CHAT, body_of(CHAT)))[0] == 200

        run(scenario())

    return check


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_a_bad_value_is_named(refused, path):
    refused([(path, body_of(path, **{name: value}), 400, name) for name, value in BAD_FIELDS], inside=True)


def test_a_bad_chat_value_is_named(refused):
    cases = [(CHAT, body_of(CHAT, **{name: value}), 400, name) for name, value in BAD_CHAT if name != "messages"]
    refused(cases, inside=True)


def test_bad_messages_are_named(refused):
    params = ["messages", "messages", "messages.0", "messages", "messages"]
    values = [value for name, value in BAD_CHAT if name == "messages"]
    cases = [(CHAT, body_of(CHAT, messages=value), 400, param) for value, param in zip(values, params, strict=True)]
    refused([*cases, (CHAT, {"model": NAME}, 400, "body")])


def test_a_bad_completion_value_is_named(refused):
    refused([(COMPLETE, body_of(COMPLETE, **{name: value}), 400, name) for name, value in BAD_COMPLETION], inside=True)


def test_a_value_inside_is_named_by_its_path(refused):
    refused([(CHAT, body_of(CHAT, **options), 400, param) for options, param in INNER])


@pytest.mark.parametrize("path", [CHAT, COMPLETE, "/tokenize", "/detokenize"])
def test_a_body_that_is_no_json_object(refused, path):
    bodies = [b"", b"{", b"{}x", b"nope", b'{"model":NaN}', b'{"prompt":"\xff"}', b"[]", b"5", b'"x"', b"null", b"\0"]
    refused([(path, body, 400, "body") for body in bodies])


def test_values_that_change_nothing_are_served(folder, run):
    neutral = {"use_beam_search": False, "typical_p": 1, "bad_words": [], "grammar": "", "response_format": None}

    async def scenario():
        async with serving(folder, script("x")) as server:
            for path in (CHAT, COMPLETE):
                assert (await server.post(path, body_of(path, **neutral)))[0] == 200

    run(scenario())


def test_numbers_beyond_floats(refused):
    for number in (b"1e999", b"-1e999"):
        body = b'{"prompt":"x","temperature":%s}' % number
        refused([(COMPLETE, body, 400, "temperature")])


def test_a_body_that_is_nested_too_deeply(refused):
    body = f'{{"messages":[{{"role":"user","content":"x","x":{DEEP}}}]}}'.encode()
    refused([(CHAT, body, 400, "body")])


def test_a_lone_surrogate(refused):
    refused([(COMPLETE, b'{"prompt":"\\ud800"}', 400, "body")])


def test_an_unknown_model_lists_the_known(folder, run):
    async def scenario():
        async with serving(folder, script("x")) as server:
            for path in (CHAT, COMPLETE):
                status, body, _ = await server.post(path, body_of(path, model="gpt-9"))
                assert (status, body["error"]["code"]) == (404, "model_not_found")
                assert "'gpt-9'" in body["error"]["message"]
                assert f"'{NAME}'" in body["error"]["message"]
            status, body, _ = await server.get("/v1/models/gpt-9")
            assert (status, body["error"]["code"]) == (404, "model_not_found")

    run(scenario())


def test_a_prompt_longer_than_the_context(folder, run):
    async def scenario():
        async with serving(folder, script("x", context=50)) as server:
            prompt = list(range(16, 76))
            status, body, _ = await server.post(COMPLETE, {"prompt": prompt, "max_tokens": 4})
            assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
            assert "maximum context length is 50 tokens" in body["error"]["message"]
            assert "60 in the prompt" in body["error"]["message"]
            status, body, _ = await server.post(COMPLETE, {"prompt": prompt[:48], "max_tokens": 4})
            assert (status, body["error"]["param"]) == (400, "max_tokens")

    run(scenario())


@pytest.mark.parametrize("prompt", [[20] * 51, [[20], [20] * 51], "x" * 501, ["x", "x" * 501]])
def test_what_cannot_fit_is_refused_before_any_work_on_it(folder, run, monkeypatch, prompt):
    for work in ("fwd.front.service.Service.open_all", "fwd.front.prompts.Prompts.text"):
        monkeypatch.setattr(work, lambda *_: 1 / 0)

    async def scenario():
        async with serving(folder, script("x", context=50)) as server:
            status, body, _ = await server.post(COMPLETE, {"prompt": prompt, "max_tokens": 4})
            assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
            assert body["error"]["param"] == "prompt"
            assert "maximum context length is 50 tokens. However, you requested" in body["error"]["message"]
            assert "51 in the prompt" in body["error"]["message"] or "at least 51" in body["error"]["message"]

    run(scenario())


def test_a_prompt_that_is_scored_may_fill_the_context(folder, run):
    async def scenario():
        async with serving(folder, script("x", context=50)) as server:
            scored = {"prompt": [20] * 50, "max_tokens": 0, "echo": True, "logprobs": 0}
            assert (await server.post(COMPLETE, scored))[0] == 200

    run(scenario())


def test_ids_beyond_the_context_are_not_decoded(folder, run):
    async def scenario():
        async with serving(folder, script("x", context=50)) as server:
            status, body, _ = await server.post("/detokenize", {"tokens": [20] * 51})
            assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
            assert "50 tokens. However, you sent 51 tokens" in body["error"]["message"]
            assert (await server.post("/detokenize", {"tokens": [20] * 50}))[0] == 200

    run(scenario())


def test_a_prompt_id_outside_the_vocabulary(refused):
    refused([(COMPLETE, body_of(COMPLETE, prompt=[5, 272]), 400, "prompt")])
    refused([("/detokenize", {"tokens": [272]}, 400, "tokens"), ("/detokenize", {"tokens": [-1]}, 400, "tokens.0")])


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_the_name_of_a_model_is_bounded(refused, path):
    refused([(path, {"prompt": "x", "tokens": [], "model": "m" * 257}, 400, "model")])


def test_tokenize_needs_one_of_two(refused):
    refused([("/tokenize", {}, 400, "prompt"), ("/tokenize", {"prompt": "x", "messages": SAY}, 400, "prompt")])


def test_more_choices_than_are_ever_open(refused, monkeypatch):
    monkeypatch.setattr("fwd.api.openai.prompts.MAX_OPEN", 8)
    refused(
        [
            (COMPLETE, body_of(COMPLETE, prompt=["x"] * 5, n=2), 400, "n"),
            (COMPLETE, body_of(COMPLETE, prompt=["x"] * 9), 400, "n"),
            (COMPLETE, body_of(COMPLETE, prompt=[[20]] * 9), 400, "n"),
            (COMPLETE, body_of(COMPLETE, prompt=["x"] * 9 + [5]), 400, "prompt"),
        ]
    )


def test_one_bad_prompt_of_many_opens_none(refused):
    refused([(COMPLETE, body_of(COMPLETE, prompt=[[20], [21], [9999]]), 400, "prompt")])


def test_a_body_over_the_limit(refused):
    refused([(CHAT, body_of(CHAT, user="x" * 5000), 413, None)], max_body=4096)


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "99999999999", "²"])
def test_a_bad_deadline(folder, run, value):
    async def scenario():
        async with serving(folder, script("x")) as server:
            status, body, _ = await server.post(CHAT, body_of(CHAT), headers={"X-Fwd-Deadline-Ms": value})
            assert (status, body["error"]["param"]) == (400, "X-Fwd-Deadline-Ms")

    run(scenario())


GOLDEN = {
    "temperature": (
        {"temperature": 3},
        (
            '{"error":{"message":"temperature: expected float <= 2.0","type":"invalid_request_error",'
            '"param":"temperature","code":"invalid_value"}}'
        ),
    ),
    "logit_bias": (
        {"logit_bias": {"x": 1}},
        (
            '{"error":{"message":"logit_bias: expected int, got str","type":"invalid_request_error",'
            '"param":"logit_bias","code":"invalid_value"}}'
        ),
    ),
    "drafter": (
        {"fwd": {"drafter": "magic"}},
        (
            '{"error":{"message":"fwd.drafter: invalid enum value \'magic\'","type":"invalid_request_error",'
            '"param":"fwd.drafter","code":"invalid_value"}}'
        ),
    ),
    "max_tokens": (
        {"max_tokens": 0},
        (
            '{"error":{"message":"max_tokens: expected int >= 1, or 0 together with echo",'
            '"type":"invalid_request_error","param":"max_tokens","code":"invalid_value"}}'
        ),
    ),
    "suffix": (
        {"suffix": "x"},
        (
            '{"error":{"message":"suffix is not supported here: leave it out","type":"invalid_request_error",'
            '"param":"suffix","code":"invalid_value"}}'
        ),
    ),
    "model": (
        {"model": "gpt-9"},
        (
            '{"error":{"message":"no model \'gpt-9\' here: this daemon serves \'fake\'",'
            '"type":"invalid_request_error","param":"model","code":"model_not_found"}}'
        ),
    ),
}


def test_golden_error_bodies(folder, run):
    async def scenario():
        async with serving(folder, script("x")) as server:
            for options, wanted in GOLDEN.values():
                async with server.session.post(server.url + COMPLETE, json=body_of(COMPLETE, **options)) as response:
                    assert await response.text() == wanted

    run(scenario())


VALUES = [None, True, False, 0, 1, -1, 2**31, 2**63, 1.5, -0.0, 1e308, "", "x", "\0", "é" * 99, [], [[]], [None], ["x"]]
VALUES += [{}, {"type": "x"}, {"x": {}}, {"5": 1}, [{}], [{"role": "user"}], [{"role": "user", "content": "x"}], [1, 2]]
FIELDS = sorted({name for name, _ in [*BAD_FIELDS, *BAD_CHAT, *BAD_COMPLETION]})


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("path", [CHAT, COMPLETE, "/tokenize", "/detokenize"])
def test_no_body_is_an_internal_error(folder, run, path, seed):
    draw = random.Random(seed)

    async def scenario():
        async with serving(folder, script("x", context=40)) as server:
            for _ in range(150):
                options = {name: draw.choice(VALUES) for name in draw.sample(FIELDS, draw.choice([1, 1, 2, 5]))}
                body = body_of(path, **options)
                async with server.session.post(server.url + path, json=body) as response:
                    assert response.status in {200, 400, 404}, body
                    await response.read()
            await server.idle()

    run(scenario())
