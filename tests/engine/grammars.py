"""Grammars over the vocabulary of the mock model, engines that take them, and answers told by the library alone."""

import json
import re
import string
from functools import cache
from itertools import accumulate

import numpy as np
import pytest
from guesser import Guesser
from llguidance import LLMatcher
from mock_engine import Engine
from mock_runner import VOCAB, next_token

from fwd.engine.grammar import Grammars
from fwd.engine.request import Request
from fwd.engine.speculate.drafter import Wish
from fwd.engine.speculate.forced import Forced
from fwd.grammar.compiled import Tokens, serialised
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Submit, Vocabulary

PIECES = [
    '{"',
    '":',
    '","',
    '"a',
    '":"',
    "true",
    "false",
    "null",
    "ab",
    "abc",
    "},",
    "[1",
    "12",
    '"}',
    "]}",
    "b ",
    "  ",
]
PIECES += ["xyz", "a long piece", "\u00e9"]
PLAIN = [*'{}[]":,. -\\', *string.digits, *string.ascii_lowercase]
TEXTS = [text.encode() for text in PLAIN + PIECES]
SPECIAL = (len(TEXTS), len(TEXTS) + 1)  # special tokens, whose text a grammar never sees
EOS = (VOCAB - 2, VOCAB - 1)  # the first of them reads like text
TEXTS += [b"<|x|>", b"ab"]
TEXTS += [b""] * (VOCAB - 2 - len(TEXTS)) + [b"true", b"<|end|>"]
assert len(TEXTS) == VOCAB


@pytest.fixture
def patient(monkeypatch):
    """Nobody drafts less because the machine is slow."""
    monkeypatch.setattr("fwd.engine.grammar.DRAFTS_SECONDS", 1e9)
    monkeypatch.setattr("fwd.engine.grammar.FORCED_SECONDS", 1e9)


def vocabulary(texts=TEXTS, special=SPECIAL, eos=EOS):
    return Vocabulary(
        text=memoryview(b"".join(texts)), ends=pack_ids(accumulate(map(len, texts))), special=pack_ids(special), eos=eos
    )


def text_of(ids):
    """The text of an answer, without what ends it."""
    return b"".join(TEXTS[token] for token in ids if token not in EOS).decode(errors="replace")


def schema(**fields):
    return "json_schema:" + json.dumps(fields)


def is_record(text):
    found = json.loads(text)
    assert list(found) == ["a", "bcd", "e"]
    assert isinstance(found["a"], bool)
    assert found["bcd"] in ("12", "abc", "a long piece")
    return len(found["e"]) <= 2 and all(isinstance(each, int) for each in found["e"])


RECORD = {
    "a": {"type": "boolean"},
    "bcd": {"enum": ["12", "abc", "a long piece"]},
    "e": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
}
TIGHT = {"whitespace_flexible": False}
# A grammar, and whether a text is one of its.
GRAMMARS = {
    "record": (schema(type="object", properties=RECORD, required=[*RECORD], additionalProperties=False), is_record),
    "tight": (
        schema(
            type="object",
            properties=RECORD,
            required=[*RECORD],
            additionalProperties=False,
            **{"x-guidance": TIGHT},
        ),
        lambda text: is_record(text) and json.dumps(json.loads(text), separators=(",", ":")) == text.replace("-0", "0"),
    ),
    "any": (schema(), lambda text: json.loads(text) is not ...),
    "digits": (r"regex:[0-9]{3}-[0-9]{4}", re.compile(r"[0-9]{3}-[0-9]{4}").fullmatch),
    "words": (r"regex:(abc|ab|xyz|a long piece)( (abc|ab|xyz))*\.?", re.compile(r"[a-z ]+\.?").fullmatch),
    "lark": (
        'lark:start: "[" item ("," item)* "]"\nitem: /[a-f]{2}/ | start',
        re.compile(r"[\[\]a-f,]+").fullmatch,
    ),
    "empty": ('lark:start: ""', lambda text: not text),
}


@cache
def _tokens():
    return Tokens(vocabulary(), VOCAB)


@cache
def _start(grammar):
    return LLMatcher(_tokens().table, serialised(grammar))


def follow(grammar, ids):
    """Where the library stands after some ids; None if they do not follow."""
    state = _start(grammar).deep_copy()
    return state if all(not state.is_stopped() and state.consume_token(token) for token in ids) else None


def answer(grammar, prompt, seed, tokens, *, stop_ids=(), choice=0):
    """The output of a request that nothing disturbs, and how it ends: reason and the id that stopped it."""
    state = follow(grammar, ())
    ids = list(prompt)
    for _ in range(tokens):
        mask = np.frombuffer(state.compute_bitmask(), np.uint32)
        ids.append(token := next_token(ids, seed, choice, mask))
        assert state.consume_token(token), state.get_error()
        if token in stop_ids or token in EOS:
            return ids[len(prompt) :], ("stop", token)
        if state.is_stopped():
            return ids[len(prompt) :], ("stop", -1)
    return ids[len(prompt) :], ("length", -1)


class Forcing(Guesser):
    """Drafts what grammars force."""

    def _guess(self, request, count):
        if not count:
            return ()
        (proposal,) = Forced().propose([Wish(request, count)])
        assert len(proposal.ids) <= count
        return proposal.ids


def engine(**settings):
    made = Engine(**settings)
    made.handle(vocabulary())
    return made


@cache
def known():
    made = Grammars(VOCAB)
    made.learn(vocabulary())
    return made


def begun(grammar, emitted=(), grammars=None):
    """A matcher for the text of a grammar, after what was emitted."""
    grammars = grammars or known()
    grammars.enter(request := Request(Submit(prompt=pack_ids([1]), emitted=pack_ids(emitted), grammar=grammar)))
    ((_, error),) = grammars.leave(60)
    if error:
        raise error
    return request.grammar


def matcher(name, emitted=()):
    return begun(GRAMMARS[name][0], emitted)


def allowed(mask):
    """The ids of a mask."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little", count=VOCAB)).tolist()
