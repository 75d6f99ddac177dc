"""Messages: older peers are understood, newer ones too, and every number is bounded."""

import math
from typing import get_args

import msgspec
import pytest

from fwd.errors import BadFrameError
from fwd.protocol import messages
from fwd.protocol.ids import pack_ids, unpack_ids
from fwd.protocol.local import FromDaemon, Prompt, ToDaemon, to_daemon
from fwd.protocol.messages import FromEngine, Hello, Submit, ToEngine, Tokens, encoder, from_engine, to_engine
from fwd.protocol.values import Limits, Sampling

ALL = {kind for union in (ToEngine, FromEngine, ToDaemon, FromDaemon) for kind in get_args(union)}


def encode(*fields):
    return msgspec.msgpack.encode(fields)


def test_every_message_has_its_own_tag():
    tags = [kind.__struct_config__.tag for kind in ALL]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("kind", sorted(ALL, key=lambda kind: kind.__name__))
def test_fields_with_defaults_come_last_so_that_more_can_follow(kind):
    required = [field.required for field in msgspec.structs.fields(kind)]
    assert required == sorted(required, reverse=True)


def test_a_peer_of_yesterday_sends_fewer_fields():
    assert to_engine.decode(encode(3, [], 9, b"\1\0\0\0")) == Submit(id=9, prompt=pack_ids([1]))
    assert to_engine.decode(encode(3, [], 9, b"", b"", [0.5])).sampling == Sampling(temperature=0.5)
    assert from_engine.decode(encode(18, 1, 0, [5])) == Tokens(id=1, start=0, ids=[5])


def test_a_peer_of_tomorrow_sends_more_fields():
    assert from_engine.decode(encode(18, 1, 0, [5], [], [], {"new": [1]}, "field")) == Tokens(id=1, start=0, ids=[5])
    assert to_daemon.decode(encode(1, 2, "build", 3, 4)) == Hello(version=2, build="build")


def submit(**changes):
    return encoder.encode(Submit(**changes))


WRONG = {
    "negative id": {"id": -1},
    "id over 63 bits": {"id": 2**63},
    "seed over 63 bits": {"seed": 2**63},
    "choice": {"choice": 128},
    "priority": {"priority": "urgent"},
    "adapter": {"adapter": "x" * 257},
    "prompt_logprobs": {"prompt_logprobs": 21},
    "temperature over 2": {"sampling": Sampling(temperature=2.01)},
    "temperature below 0": {"sampling": Sampling(temperature=-0.01)},
    "temperature is NaN": {"sampling": [math.nan]},
    "top_k": {"sampling": Sampling(top_k=-1)},
    "top_p is 0": {"sampling": Sampling(top_p=0)},
    "top_p is NaN": {"sampling": [1, 0, math.nan]},
    "min_p is infinite": {"sampling": Sampling(min_p=math.inf)},
    "repetition_penalty": {"sampling": Sampling(repetition_penalty=0)},
    "presence_penalty": {"sampling": Sampling(presence_penalty=2.5)},
    "frequency_penalty": {"sampling": Sampling(frequency_penalty=-math.inf)},
    "logit_bias": {"sampling": Sampling(logit_bias={1: 101})},
    "logit_bias is NaN": {"sampling": [1, 0, 1, 0, 1, 0, 0, {1: math.nan}]},
    "logit_bias of no token": {"sampling": Sampling(logit_bias={-1: 1})},
    "logit_bias too many": {"sampling": Sampling(logit_bias=dict.fromkeys(range(1025), 1))},
    "logprobs": {"sampling": Sampling(logprobs=21)},
    "max_tokens": {"limits": Limits(max_tokens=-2)},
    "max_tokens over every context": {"limits": Limits(max_tokens=2**24 + 1)},
    "stop_ids": {"limits": Limits(stop_ids=(-1,))},
    "stop_ids too many": {"limits": Limits(stop_ids=tuple(range(65)))},
    "deadline below 0": {"limits": Limits(deadline_ms=-1)},
    "deadline is NaN": {"limits": Limits(deadline_ms=math.nan)},
    "deadline is infinite": {"limits": Limits(deadline_ms=math.inf)},
    "drafter": {"draft": ["oracle"]},
    "max_draft": {"draft": ["auto", 2**31 + 1]},
    "prompt is text": {"prompt": "abc"},
    "boolean id": {"id": True},
}


@pytest.mark.parametrize("name", WRONG)
def test_values_out_of_bounds_are_refused(name):
    with pytest.raises(msgspec.ValidationError):
        to_engine.decode(submit(**WRONG[name]))


def test_values_at_the_bounds_are_taken():
    edge = Submit(
        id=2**63 - 1,
        seed=-(2**63),
        choice=127,
        sampling=Sampling(temperature=0, top_p=1, min_p=1, logit_bias={2**31 - 1: -100}, logprobs=20),
        limits=Limits(max_tokens=2**24, stop_ids=tuple(range(64))),
    )
    assert to_engine.decode(encoder.encode(edge)) == edge


def test_a_sampling_value_that_is_not_a_number_cannot_even_be_built():
    with pytest.raises(ValueError, match="NaN"):
        Sampling(temperature=math.nan)


def test_stop_strings_are_bounded():
    with pytest.raises(msgspec.ValidationError):
        to_daemon.decode(encoder.encode(Prompt(stops=("x",) * 17)))


def test_a_token_that_is_no_int32_is_refused():
    with pytest.raises(msgspec.ValidationError):
        from_engine.decode(encode(18, 1, 0, [2**31]))


def test_ids_are_little_endian_int32():
    assert bytes(pack_ids([1, 2**31 - 1])) == b"\1\0\0\0\xff\xff\xff\x7f"
    assert list(unpack_ids(memoryview(b"\1\0\0\0\xff\xff\xff\x7f"))) == [1, 2**31 - 1]


def test_ids_that_are_cut_or_too_large():
    with pytest.raises(BadFrameError, match="5 bytes"):
        unpack_ids(memoryview(bytes(5)))
    with pytest.raises(OverflowError):
        pack_ids([2**31])


def test_ids_are_views_of_the_frame():
    frame = encoder.encode(Submit(prompt=pack_ids(range(100))))
    assert to_engine.decode(frame).prompt.obj is frame


def test_the_version_is_part_of_the_first_frame():
    assert msgspec.msgpack.decode(encoder.encode(Hello(build="b"))) == [1, messages.VERSION, "b"]
