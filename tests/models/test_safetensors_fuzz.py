"""Headers and indexes of any bytes are read or refused in one line."""

import json
import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_files import FILES, GOOD, INDEX, header, raw, refusal, write_shards

from fwd.errors import ModelError
from fwd.models.safetensors import BITS, headers, open_shard

fuzz = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def attempt(work, path):
    """What `work` makes of a path; nothing if it is refused, in one line."""
    result = refused = None
    try:
        result = work(path)
    except ModelError as error:
        refused = error
    assert refused is None or refused.message.isprintable()
    return result


def parses(path):
    """Open a file: it is read or refused in one line, nothing else; what is read covers the file."""
    shard = attempt(open_shard, path)
    if shard is None:
        return
    shard.close()
    places = sorted((entry.begin, entry.end) for entry in shard.entries.values())
    assert sum(end - begin for begin, end in places) == shard.size - shard.start
    assert all(0 < begin <= end <= path.stat().st_size for begin, end in places)


def test_every_changed_byte_of_a_header_is_read_or_refused(path):
    whole = raw({"w": GOOD, "v": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}, bytes(22))
    for place in range(len(whole) - 22):
        for value in (0, 0x20, 0x22, 0x2D, 0x39, 0x5B, 0x5D, 0x7D, 0xFF, whole[place] ^ 1):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            parses(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 80) | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "X"]) | values,
        "shape": st.lists(st.integers(0, 5), max_size=3) | values,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | values,
    }
)
tensors = st.dictionaries(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=6),
    st.tuples(
        st.sampled_from([name for name, bits in BITS.items() if bits >= 8]), st.lists(st.integers(0, 4), max_size=3)
    ),
    max_size=5,
)


@fuzz
@given(tensors)
def test_any_sound_header_is_read(path, tensors):
    table, size = header(tensors)
    path.write_bytes(raw(table, bytes(size)))
    shard = open_shard(path)
    shard.close()
    assert {name: (entry.dtype, list(entry.shape)) for name, entry in shard.entries.items()} == tensors


@fuzz
@given(tensors, st.data())
def test_a_sound_header_with_offsets_shifted_is_read_or_refused(path, tensors, data):
    table, size = header(tensors)
    for info in table.values():
        info["data_offsets"] = [max(0, place + data.draw(st.integers(-3, 3))) for place in info["data_offsets"]]
    path.write_bytes(raw(table, bytes(size)))
    parses(path)


@fuzz
@given(st.dictionaries(st.text(max_size=3), entries | values, max_size=4), st.integers(0, 64))
def test_any_header_is_read_or_refused(path, header, size):
    path.write_bytes(raw(header, bytes(size)))
    parses(path)


@fuzz
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(path, content):
    path.write_bytes(content)
    parses(path)
    path.write_bytes(raw(content, bytes(8)))
    parses(path)


@fuzz
@given(st.dictionaries(st.sampled_from(["weight_map", "metadata", "x"]), values | st.dictionaries(st.text(), values)))
def test_any_index_is_read_or_refused(tmp_path, table):
    (tmp_path / INDEX).write_text(json.dumps(table))
    assert refusal(tmp_path).isprintable()


@fuzz
@given(st.binary(max_size=8), st.integers(0, 400), st.integers(0, 8))
def test_a_spoiled_index_is_read_or_refused(tmp_path, content, place, removed):
    write_shards(tmp_path, random.Random(3), total_size=48, sha256={FILES[0]: "0" * 64})
    whole = (tmp_path / INDEX).read_bytes()
    (tmp_path / INDEX).write_bytes(whole[:place] + content + whole[place + removed :])
    assert set(attempt(headers, tmp_path) or ()) <= {"a0", "b0", "a1", "b1"}
