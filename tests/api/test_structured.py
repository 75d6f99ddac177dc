"""Structured output: each way of asking is the grammar of every choice, or a 400 that names the field."""

import asyncio
import io
import json
import re

import pytest
from apiserver import NAME, script, serving

from fwd.front.grammars import TOO_MUCH

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
AS_TEXT = 'json_schema:{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'
OBJECT = 'json_schema:{"type":"object"}'
ODD = ["a b", "c|d", "(e)", "\n", '"', "é", "/", "\\n"]
ASKED = [
    ({}, ""),
    ({"response_format": {"type": "text"}}, ""),
    ({"response_format": {"type": "json_object"}}, OBJECT),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, AS_TEXT),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, AS_TEXT),
    ({"response_format": {"type": "grammar", "grammar": 'root ::= "a"'}}, 'lark:root ::= "a"'),
    ({"guided_json": SCHEMA}, AS_TEXT),
    ({"guided_json": json.dumps(SCHEMA, separators=(",", ":"))}, AS_TEXT),
    ({"guided_regex": "[a-z]+"}, "regex:[a-z]+"),
    ({"guided_choice": ODD}, "regex:" + "|".join(map(re.escape, ODD))),
    ({"guided_grammar": 'start: "a"'}, 'lark:start: "a"'),
    ({"structured_outputs": {"json": SCHEMA}}, AS_TEXT),
    ({"structured_outputs": {"regex": "a*", "choice": None, "json_object": False}}, "regex:a*"),
    ({"structured_outputs": {"json_object": True}}, OBJECT),
    ({"json_schema": SCHEMA}, AS_TEXT),
    ({"grammar": 'start: "a"'}, 'lark:start: "a"'),
    ({"grammar": "", "guided_choice": None, "guided_json": None, "response_format": None}, ""),
    ({"structured_outputs": {}}, ""),
    ({"structured_outputs": {"json": None, "disable_fallback": False}}, ""),
    *(({name: {}}, "json_schema:{}") for name in ("guided_json", "json_schema")),
    ({"structured_outputs": {"json": {}}}, "json_schema:{}"),
    ({"structured_outputs": {"json_object": False, "regex": None}}, ""),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "json_schema:{}"),
    ({"grammar": "", "json_schema": {}}, "json_schema:{}"),
    ({"guided_json": True}, "json_schema:true"),
    ({"guided_choice": ["", "a"]}, "regex:|a"),
]
REFUSED = [
    ({"response_format": {"type": kind}}, "response_format") for kind in ("json", "regex", "structural_tag", 5, None)
]
REFUSED += [({"response_format": value}, "response_format") for value in ("json_object", ["x"], 5)]
REFUSED += [({name: [1]}, name) for name in ("guided_regex", "guided_grammar", "grammar", "json_schema", "guided_json")]
REFUSED += [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format.json_schema"),
    ({"guided_choice": "x"}, "guided_choice"),
    ({"guided_choice": [1]}, "guided_choice"),
    *(({name: each}, name) for name in ("guided_json", "json_schema") for each in (0, False, "", [])),
    *(({name: each}, name) for name in ("guided_regex", "guided_grammar") for each in (0, False, "", {}, [])),
    *(({"grammar": each}, "grammar") for each in (0, False, {}, [])),
    *(({"guided_choice": each}, "guided_choice") for each in (0, False, "", {}, [])),
    *(({"response_format": each}, "response_format") for each in (0, False, "", {}, [])),
    *(({"structured_outputs": each}, "structured_outputs") for each in (0, False, "", [])),
    *(
        ({"structured_outputs": {way: each}}, f"structured_outputs.{way}")
        for way in ("regex", "choice", "grammar")
        for each in (0, False, "", {}, [])
    ),
    *(({"structured_outputs": {"json": each}}, "structured_outputs") for each in (False, "")),
    *(({"structured_outputs": {"json": each}}, "structured_outputs.json") for each in (0, [])),
    *(({"structured_outputs": {"json_object": each}}, "structured_outputs.json_object") for each in (0, "", {}, "x")),
    ({"structured_outputs": {"whitespace_pattern": ""}}, "structured_outputs.whitespace_pattern"),
    ({"response_format": {"type": "grammar", "grammar": ""}}, "response_format"),
    ({"structured_outputs": {"regex": "a", "json": {}, "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a", "structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": "x"}, "structured_outputs"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"grammar": "start: nothing"}, "grammar"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_grammar": "root ::= nothing"}, "guided_grammar"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
]
HOSTILE = [
    ({"guided_json": {"type": "integer", "multipleOf": 9999991}}, "guided_json"),
    (
        {"response_format": {"type": "json_schema", "schema": {"type": "integer", "multipleOf": 9999991}}},
        "response_format",
    ),
    ({"guided_regex": "a" * (4 << 20)}, "guided_regex"),
    ({"guided_regex": "(" * 100_000}, "guided_regex"),
    ({"structured_outputs": {"regex": "(" * 50_000}}, "structured_outputs"),
    ({"guided_json": {"$ref": "#"}}, "guided_json"),
]


def body_of(path, **options):
    base = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return {"model": NAME, "max_tokens": 5, **base, **options}


async def send(server, data):
    headers = {"Content-Type": "application/json"}
    async with server.session.post(server.url + COMPLETE, data=io.BytesIO(data), headers=headers) as response:
        return response.status, await response.json()


def test_each_way_of_asking_is_a_grammar(folder, run):
    async def scenario():
        async with serving(folder, script("x")) as server:
            for path in (CHAT, COMPLETE):
                for options, grammar in ASKED:
                    status, body, _ = await server.post(path, body_of(path, n=2, **options))
                    assert status == 200, (options, body)
                    assert [stream.submit.grammar for stream in server.seen[-2:]] == [grammar] * 2
            kinds = {grammar for _, grammar in ASKED if grammar}
            assert server.service._trials.tried == len(kinds)

    run(scenario())


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_what_cannot_be_understood_or_compiled_is_named(folder, run, path):
    async def scenario():
        async with serving(folder, script("x")) as server:
            for options, param in REFUSED:
                status, body, _ = await server.post(path, body_of(path, **options))
                assert status == 400, options
                assert body["error"]["param"].removesuffix(".regex") == param.removesuffix(".regex"), options
                assert "\n" not in body["error"]["message"]
            assert not list(server.service.streams)

    run(scenario())


def test_hostile_grammars_are_refused_beside_a_stream_that_has_every_byte(folder, run):
    deep = b'{"prompt":"x","guided_json":' + b'{"items":' * 100_000 + b"{}" + b"}" * 100_001

    async def scenario():
        async with serving(folder, script("x", pace="ping"), max_body=8 << 20, ping_interval=0.01) as server:
            beside = asyncio.create_task(server.stream(CHAT, body_of(CHAT, max_tokens=40)))
            for options, param in HOSTILE:
                status, body = await send(server, json.dumps(body_of(COMPLETE, **options)).encode())
                assert (status, body["error"]["param"]) == (400, param)
                assert "multipleOf" not in str(options) or body["error"]["message"] == TOO_MUCH
            status, body = await send(server, deep)
            assert (status, body["error"]["message"]) == (400, "the body is nested too deeply")
            found = [each["choices"][0]["delta"].get("content") or "" for each in (await beside)[:-1]]
            assert "".join(found) == "x" * 40

    run(scenario())
