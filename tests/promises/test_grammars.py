"""An answer under a grammar obeys it and is the same, whoever drafts and however often its engine dies."""

import json
from pathlib import Path

import pytest
from harness import ended, kill, record, run, serving, tokens_more
from msgspec.structs import replace

import fwd.demo
from fwd.errors import GrammarError
from fwd.front.prompts import Prompts
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Draft, Limits, Sampling

DEMO = Path(fwd.demo.__file__).parent / "model"
PROMPTS = Prompts.load(DEMO)
FIELDS = {
    "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"},
    "kind": {"enum": ["a kind of tree", "a kind of stone", "nothing of that kind"]},
    "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 5},
    "old": {"type": "boolean"},
}
TIGHT = {"x-guidance": {"whitespace_flexible": False}}
SCHEMA = {"type": "object", "properties": FIELDS, "required": [*FIELDS], "additionalProperties": False}
GRAMMARS = [
    "json_schema:" + json.dumps(SCHEMA | TIGHT),
    "json_schema:" + json.dumps({"type": "array", "items": SCHEMA, "minItems": 2, "maxItems": 2} | TIGHT),
    "regex:(once|twice|never) upon a time( there (was|were) [a-z]{3,8}){1,3}\\.",
]


def requests():
    return [
        Submit(
            prompt=pack_ids(PROMPTS.tokenizer.encode("Once upon a time")),
            seed=number,
            grammar=GRAMMARS[number % 3],
            limits=Limits(max_tokens=110, stop_ids=PROMPTS.tokenizer.eos_ids if number % 2 else ()),
            sampling=Sampling(
                temperature=[0.0, 1.0, 1.5][number // 2],
                top_p=0.95,
                presence_penalty=0.4 * (number % 4 == 0),
                logprobs=2,
            ),
        )
        for number in range(6)
    ]


def is_record(found):
    assert list(found) == list(FIELDS)
    assert isinstance(found["old"], bool)
    assert found["name"].isalpha()
    assert found["kind"] in FIELDS["kind"]["enum"]
    return 2 <= len(found["sizes"]) <= 5 and all(0 <= size <= 99 for size in found["sizes"])


def check(number, ids):
    text = PROMPTS.tokenizer.decode([token for token in ids if token not in PROMPTS.tokenizer.eos_ids])
    match number % 3:
        case 0:
            assert is_record(json.loads(text))
        case 1:
            assert all(map(is_record, json.loads(text)))
        case 2:
            assert text.endswith(".")


@pytest.fixture(scope="module")
def plain():
    """What each request says alone, without drafts, to an engine that lives."""

    async def work():
        records = []
        async with serving(DEMO) as service:
            service.prompts = PROMPTS
            for request in requests():
                stream = service.open(replace(request, draft=Draft("off"), cache=False))
                await ended(stream)
                records.append(record(stream))
        return records

    return run(work())


def test_answers_obey(plain):
    whole = [(number, ids) for number, (ids, _, _, reason) in enumerate(plain) if reason == "stop"]
    assert len(whole) >= 4
    for number, ids in whole:
        check(number, ids)


def test_side_by_side_whatever_the_controller_drafts(plain):
    async def work():
        async with serving(DEMO) as service:
            service.prompts = PROMPTS
            streams = [service.open(request) for request in requests()]
            await ended(*streams)
            assert list(map(record, streams)) == plain

    run(work())


def test_engines_that_die_in_mid_answer(plain):
    async def work():
        async with serving(DEMO) as service:
            service.prompts = PROMPTS
            streams = [service.open(request) for request in requests()]
            for _ in range(2):
                await tokens_more(streams, 40)
                kill(service)
            await ended(*streams)
            assert list(map(record, streams)) == plain
            assert sum(stream.resumes for stream in streams) >= 6

    run(work())


def test_garbage_harms_nobody(plain):
    async def work():
        async with serving(DEMO) as service:
            service.prompts = PROMPTS
            streams = [service.open(request) for request in requests()[:3]]
            bad = [
                service.open(replace(requests()[0], grammar=text)) for text in ("regex:(", "x", "lark:" + "(" * 60_000)
            ]
            await ended(*streams, *bad)
            assert list(map(record, streams)) == plain[:3]
            assert all(isinstance(stream.error, GrammarError) for stream in bad)
            assert not service.supervisor.active.restarts

    run(work())
