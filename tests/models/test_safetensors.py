"""Headers and indexes: what does not fit its file is refused in one line, whatever its bytes."""

import json
import tracemalloc

import pytest
from raw_files import FILES, GOOD, INDEX, raw, refusal, write, write_index, write_shards

from fwd.models.safetensors import BITS, MAX_HEADER, headers

KILO = 1 << 10
SLACK = 64 * KILO  # what a refusal costs beside the header
ROOM = 40  # Python's objects for a byte of JSON, at most


def test_tensors_of_every_dtype_are_found_in_their_places(tmp_path, path, random_bytes):
    tensors = {dtype.lower(): (dtype, (3, 4)) for dtype in BITS} | {"scalar": ("F32", ()), "none": ("BF16", (0, 7))}
    data = write(path, tensors, random_bytes)
    found, whole = headers(tmp_path), path.read_bytes()
    assert {name: (entry.dtype, entry.shape) for name, entry in found.items()} == tensors
    assert b"".join(whole[entry.begin : entry.end] for entry in found.values()) == data
    assert all(entry.path == path for entry in found.values())


def test_metadata_and_padding_are_ignored(tmp_path, path):
    metadata = {"format": "pt", "shape": "x", "data": "y", "nested": {"data": [1, [2]]}}
    path.write_bytes(raw(json.dumps({"__metadata__": metadata, "w": GOOD}).encode() + b"   ", bytes(16)))
    assert list(headers(tmp_path)) == ["w"]


def test_an_index_is_followed_through_links(tmp_path, random_bytes):
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshot"
    folder.mkdir()
    places = write_shards(folder, random_bytes)
    for number, file in enumerate(FILES):
        (folder / file).rename(tmp_path / "blobs" / str(number))
        (folder / file).symlink_to(f"../blobs/{number}")
    assert {name: entry.path.name for name, entry in headers(folder).items()} == places


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({**GOOD, "dtype": "F33"}, "dtype F33, which is not known"),
        ({**GOOD, "dtype": 4}, "Expected `str`"),
        ({**GOOD, "shape": [2, -2]}, ">= 0"),
        ({**GOOD, "shape": [-2, -2]}, ">= 0"),
        ({**GOOD, "shape": [2.0, 2]}, "Expected `int`"),
        ({**GOOD, "shape": [True, 4]}, "Expected `int`"),
        ({**GOOD, "shape": "22"}, "Expected `array`"),
        ({**GOOD, "shape": [2**40, 2**40]}, "takes"),
        ({**GOOD, "shape": [2**63, 2, 0]}, "<="),
        ({**GOOD, "shape": [1] * 9 + [4]}, "length <= 8"),
        ({**GOOD, "data_offsets": [0, 15]}, "takes 16 bytes"),
        ({**GOOD, "data_offsets": [-16, 0]}, ">= 0"),
        ({**GOOD, "data_offsets": [16, 0]}, "takes 16 bytes"),
        ({**GOOD, "data_offsets": [0]}, "length 2"),
        ({**GOOD, "data_offsets": [0, 2**70]}, "<="),
        ({**GOOD, "dtype": "F4", "shape": [5], "data_offsets": [0, 3]}, "takes 2.5 bytes"),
        ({"dtype": "F32", "shape": [2, 2]}, "missing required field"),
        ([], "Expected `object`"),
        (None, "Expected `object`"),
    ],
    ids=str,
)
def test_a_tensor_that_does_not_fit_is_named_with_the_reason(tmp_path, path, entry, reason):
    path.write_bytes(raw({"w": entry}, bytes(16)))
    message = refusal(tmp_path)
    assert f"{path}: tensor w " in message
    assert reason in message


def test_a_tensor_beyond_the_end_is_a_truncated_file(tmp_path, path):
    path.write_bytes(raw({"w": {**GOOD, "data_offsets": [16, 32]}}, bytes(31)))
    assert f"{path} is truncated: tensor w ends at byte" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        (([0, 16], [8, 24]), "tensors a and b overlap"),
        (([8, 24], [0, 16]), "tensors b and a overlap"),
        (([0, 16], [0, 16]), "tensors a and b overlap"),
        (([0, 16], [20, 36]), "no tensor covers the bytes between a and b"),
        (([4, 20], [20, 36]), "no tensor covers the bytes between the header and a"),
        (([0, 16], [16, 32]), "no tensor covers the bytes between b and the end"),
    ],
)
def test_tensors_cover_the_data_once(tmp_path, path, offsets, words):
    table = {name: {**GOOD, "data_offsets": place} for name, place in zip("ab", offsets, strict=True)}
    path.write_bytes(raw(table, bytes(36)))
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    "twice",
    [
        '{"a": ENTRY, "a": ENTRY}',
        '{"a": ENTRY, "\\u0061": ENTRY}',
        '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4], "data_offsets": [0, 16]}}',
    ],
)
def test_what_stands_twice_is_refused(tmp_path, path, twice):
    path.write_bytes(raw(twice.replace("ENTRY", json.dumps(GOOD)).encode(), bytes(16)))
    assert "stands twice" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "\u202e", "n" * 513])
def test_a_name_that_cannot_be_printed_is_refused(tmp_path, path, name):
    path.write_bytes(raw({name: GOOD}, bytes(16)))
    message = refusal(tmp_path)
    assert "is no name of a tensor" in message
    assert message.isprintable()


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_a_header_length_out_of_bounds_is_refused_before_it_is_read(tmp_path, path, length):
    path.write_bytes(raw(b"{}", bytes(64), length=length))
    assert "truncated" in refusal(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path, path, random_bytes):
    write(path, {"a": ("BF16", (3, 5)), "b": ("F32", (2,))}, random_bytes)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert str(path) in refusal(tmp_path), size


def test_a_pointer_of_git_lfs_is_named(tmp_path, path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path, random_bytes):
    write_shards(tmp_path, random_bytes)
    (tmp_path / FILES[1]).unlink()
    assert f"{tmp_path / FILES[1]} is missing" in refusal(tmp_path)


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path, random_bytes):
    places = write_shards(tmp_path, random_bytes)
    write_index(tmp_path, places | {"a0": FILES[1]})
    assert f"names tensor a0 in {FILES[1]}, which lacks it" in refusal(tmp_path)
    write_index(tmp_path, places | {"c": FILES[0]})
    assert f"names tensor c in {FILES[0]}, which lacks it" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path, random_bytes):
    places = write_shards(tmp_path, random_bytes)
    write(tmp_path / FILES[1], dict.fromkeys(("a0", "a1", "b1"), ("F32", (2, 3))), random_bytes)
    write_index(tmp_path, places)
    assert "tensor a0 stands in both" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "..",
        "x\0.safetensors",
        "x\n.safetensors",
        "x" * 600 + ".safetensors",
        "model.bin",
        "",
    ],
)
def test_a_name_that_leaves_the_folder_or_is_no_weight_file_is_refused(tmp_path, random_bytes, name):
    places = write_shards(tmp_path, random_bytes)
    write_index(tmp_path, places | {"a0": name})
    assert "plain name" in refusal(tmp_path)
    write_index(tmp_path, places, sha256={name: "0" * 64})
    assert "plain name" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no valid JSON"),
        ("[]", "no valid JSON"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "Expected `object`"),
        ('{"weight_map": {"a": 7}}', "Expected `str`"),
        ('{"weight_map": {}}', "is empty"),
        ("[" * 100_000, "Expected `object`"),
        ('{"x":' + "[" * 100_000, "recursion"),
        ('{"a":' * 100_000, "recursion"),
        (" " * (MAX_HEADER + 1), "over the"),
        ('{"weight_map": {"a": "x.safetensors"}, "metadata": {"sha256": 1}}', "Expected `object`"),
        ('{"weight_map": {"a": "x.safetensors"}, "metadata": {"sha256": {"x.safetensors": "00"}}}', "no SHA-256"),
        ('{"weight_map": {"a": "x.safetensors"}, "metadata": {"sha256": {"y.safetensors": "00"}}}', "no SHA-256"),
    ],
    ids=lambda value: value[:24],
)
def test_a_broken_index_is_refused(tmp_path, content, reason):
    (tmp_path / INDEX).write_text(content)
    message = refusal(tmp_path)
    assert INDEX in message
    assert reason in message


def test_headers_take_no_more_than_their_size_allows(tmp_path, path):
    """What a bomb of brackets, of tensors or of digits costs is bounded by its bytes."""
    bombs = [b"[]," * 20_000, b'"a":[' * 20_000, b",".join(b'"%d":0' % number for number in range(20_000))]
    bombs += [
        b'"w":{"shape":[' + b"0," * 50_000,
        b'"w":{"shape":[' + b"9" * 100_000 + b"]}",
        b'"' + b"\\u0041" * 20_000,
    ]
    for bomb in bombs:
        path.write_bytes(raw(b"{" + bomb + b"}", bytes(8)))
        assert peak(lambda: refusal(tmp_path)) < SLACK + ROOM * len(bomb)


def peak(work):
    """Bytes of Python's memory that a call takes at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
