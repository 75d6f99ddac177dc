"""Checkpoint files: safetensors by mmap behind our own header check, sharded or not; never pickle, never code.

A file: 8 bytes little-endian header length n; n bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}; data.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from fwd.errors import ModelError

Progress = Callable[[int, int], None]

MAX_HEADER = 100 * 1024 * 1024
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ITEMSIZE = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_ITEMSIZE |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}
_PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; `begin` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Shard:
    """One mapped safetensors file whose header has been checked against its size. Raises ModelError."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ModelError(f"{path} is missing: the model folder is incomplete")
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.entries = _read_header(path, file.read(8), file.read, size)
                self.data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from None

    def tensor(self, name: str) -> Tensor:
        """Return a float tensor as a view of the file (a copy where the file does not align it)."""
        entry = self.entries[name]
        dtype = _FLOATS.get(entry.dtype)
        if dtype is None:
            raise ModelError(f"{self.path}: {name} has dtype {entry.dtype}, expected one of {', '.join(_FLOATS)}")
        if entry.begin % dtype.itemsize:
            return torch.frombuffer(bytearray(self.data[entry.begin : entry.end]), dtype=dtype).view(entry.shape)
        flat = torch.frombuffer(self.data, dtype=dtype, count=math.prod(entry.shape), offset=entry.begin)
        return flat.view(entry.shape)


class Checkpoint:
    """All tensors of a model folder, each to be taken exactly once; `progress` gets bytes taken and bytes in total."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder = folder
        self.shards = [Shard(path) for path in _shard_paths(folder)]
        self._where = _owners(self.shards)
        self._unused = set(self._where)
        self._progress, self._done = progress, 0
        self._total = sum(entry.end - entry.begin for shard in self.shards for entry in shard.entries.values())
        self._hash = hashlib.sha256((folder / "config.json").read_bytes())
        self._hashing = Thread(target=self._hash_shards, name="weights-hash", daemon=True)
        self._hashing.start()

    def take(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
        """Return the named tensors, converted and concatenated along the first dimension."""
        for name, shape in zip(names, shapes, strict=True):
            self._check(name, shape)
        out = torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], dtype=dtype)
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            out[start : start + shape[0]] = self._where[name].tensor(name)
            start += shape[0]
            self._account(name)
        return out

    def finish(self, ignored: Callable[[str], bool]) -> None:
        """Raise ModelError if a tensor was left over that `ignored` does not accept."""
        left = sorted(name for name in self._unused if not ignored(name))
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ModelError(f"{self._where[left[0]].path}: tensor {left[0]}{more} has no place in this architecture")
        self._progress(self._total, self._total)

    def digest(self) -> str:
        """Return SHA-256 of config.json followed by the shards' own SHA-256 in the order of their names, as hex.

        Every byte is hashed, beside the copying: 0.9 s per GiB of one core that has SHA instructions.
        """
        self._hashing.join()
        return self._hash.hexdigest()

    def _hash_shards(self) -> None:
        for shard in self.shards:
            self._hash.update(hashlib.sha256(shard.data).digest())

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._where:
            raise ModelError(f"{self.folder}: tensor {name} is missing, expected shape {list(shape)}")
        assert name in self._unused, f"{name} taken twice"
        found = self._where[name].entries[name].shape
        if found != shape:
            raise ModelError(f"{self._where[name].path}: {name} has shape {list(found)}, expected {list(shape)}")

    def _account(self, name: str) -> None:
        self._unused.remove(name)
        entry = self._where[name].entries[name]
        self._done += entry.end - entry.begin
        self._progress(self._done, self._total)


def _shard_paths(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        return [folder / name for name in _shard_names(index)]
    if any(path.suffix in _PICKLES for path in folder.iterdir()):
        raise ModelError(f"{folder} holds pickled weights, which can run code when read: convert them to safetensors")
    raise ModelError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")


def _shard_names(index: Path) -> list[str]:
    table = _json_object(index, index.read_bytes() if index.stat().st_size <= MAX_HEADER else b"")
    names = table.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index}: weight_map is missing or empty")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: {str(name)[:80]!r} is not the plain name of a safetensors file")
    return sorted(set(names.values()))


def _owners(shards: Iterable[Shard]) -> dict[str, Shard]:
    owners: dict[str, Shard] = {}
    for shard in shards:
        for name in shard.entries:
            if name in owners:
                raise ModelError(f"tensor {name} stands in both {owners[name].path} and {shard.path}")
            owners[name] = shard
    return owners


def _read_header(path: Path, prefix: bytes, read: Callable[[int], bytes], size: int) -> dict[str, Entry]:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ModelError(f"{path} is truncated or no safetensors file: header of {length} bytes in a file of {size}")
    header = _json_object(path, read(length))
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}
    placed = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    for (name, entry), (later, after) in pairwise(placed):
        if after.begin < entry.end:
            raise ModelError(f"{path}: tensors {name} and {later} overlap")
    return entries


def _entry(path: Path, name: str, value: object, start: int, size: int) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            dtype in _ITEMSIZE and name.isprintable()
        ):
            if all(type(dim) is int and dim >= 0 for dim in shape) and len(shape) <= 8:
                expected = math.prod(shape) * _ITEMSIZE[dtype]
                if 0 <= begin <= end <= size - start and end - begin == expected:
                    return Entry(dtype, tuple(shape), start + begin, start + end)
    raise ModelError(f"{path}: tensor {name[:80]!r} has a header that does not fit the file: {repr(value)[:120]}")


def _json_object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        table = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} holds no valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(table).__name__}")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table
