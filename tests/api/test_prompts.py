"""Prompts as ids: read piece by piece when they are long, with the same result and the same words for mistakes."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwd.api.openai import prompts
from fwd.errors import BadRequestError
from fwd.protocol.ids import unpack_ids

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40)


def read(raw, inline=1 << 16):
    kept, prompts.INLINE = prompts.INLINE, inline
    try:
        found = asyncio.run(prompts.read_prompts(raw))
    finally:
        prompts.INLINE = kept
    return [prompt if isinstance(prompt, str) else list(unpack_ids(prompt)) for prompt in found]


@given(st.one_of(IDS, st.lists(IDS, min_size=1, max_size=5)), st.sampled_from([None, 1]), st.integers(1, 30))
def test_ids_in_pieces_are_the_ids(value, indent, inline):
    wanted = value if isinstance(value[0], list) else [value]
    assert read(json.dumps(value, indent=indent).encode(), inline) == wanted


MISTAKES = ["[1, -1]", "[1, 2147483648]", "[1, 1.5]", "[1, null]", "[]", "[[1], 2]", "[[1], [null]]", "[[[1]]]", "{}"]
MISTAKES += ['[1, "x"]', '["x", [1]]', "true", "7", "[[1], [1, {}]]", '[[1, "[1]"]]']


@pytest.mark.parametrize("raw", MISTAKES)
def test_a_mistake_is_told_alike_in_short_and_in_long(raw):
    told = []
    for inline in (1, 1 << 16):
        with pytest.raises(BadRequestError) as caught:
            read(raw.encode(), inline)
        told.append((caught.value.message, caught.value.param))
    assert told[0] == told[1]
    assert told[0][1].partition(".")[0] == "prompt"


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.integers(1, 30))
def test_texts_are_texts(texts, inline):
    assert read(json.dumps(texts).encode(), inline) == texts
    assert read(json.dumps(texts[0]).encode(), inline) == texts[:1]


def test_more_lists_than_are_ever_open_are_not_read():
    with pytest.raises(BadRequestError) as caught:
        read(b"[" + b"[1]," * 100_000 + b"[1]]")
    assert caught.value.param == "n"


def test_no_call_is_given_all_of_a_million_ids(monkeypatch):
    sizes = []

    class Noted:
        def decode(self, raw):
            sizes.append(len(raw))
            return prompts.msgspec.json.decode(raw)

    monkeypatch.setattr(prompts, "_ids", Noted())
    monkeypatch.setattr(prompts, "_whole", None)
    (ids,) = read(json.dumps([20] * (1 << 20)).encode())
    assert ids == [20] * (1 << 20)
    assert max(sizes) < prompts.INLINE + 100  # such a call keeps the GIL for a millisecond
