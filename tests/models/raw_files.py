"""Safetensors files byte by byte, for what no writer would write."""

import json
import struct
from math import prod

import pytest

from fwd.errors import ModelError
from fwd.models.safetensors import BITS, headers

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}  # of a tensor in a header


def raw(header, data=b"", length=None):
    """A file of this header (JSON, or bytes as they are), which says it is `length` bytes long, and data."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data


def header(tensors):
    """The header of tensors {name: (dtype, shape)} one after the other, and how many bytes they take."""
    table, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return table, end


def write(path, tensors, generator):
    """Write tensors {name: (dtype, shape)} of random bytes; return the data."""
    table, size = header(tensors)
    data = generator.randbytes(size)
    path.write_bytes(raw(table, data))
    return data


def write_index(folder, places, **metadata):
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": places}))


def write_shards(folder, generator, **metadata):
    """Write two files of two tensors, and their index; return which tensor stands where."""
    places = {}
    for number, file in enumerate(FILES):
        tensors = {f"{name}{number}": ("F32", (2, 3)) for name in "ab"}
        write(folder / file, tensors, generator)
        places |= dict.fromkeys(tensors, file)
    write_index(folder, places, **metadata)
    return places


def refusal(folder):
    """The line by which a folder is refused."""
    with pytest.raises(ModelError) as refused:
        headers(folder)
    assert len(refused.value.message.splitlines()) == 1
    assert len(refused.value.message) < 2000
    return refused.value.message
