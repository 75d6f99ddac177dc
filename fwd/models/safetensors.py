"""Safetensors headers, checked against their files before anything is allocated. No torch here.

A file: 8 bytes little-endian header length n; n bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}, maybe
padded with spaces; data. As the format's description has it: the header begins with `{` and has 100 MB at most, no name
stands twice, and the tensors cover the data without holes or overlaps (huggingface/safetensors, README.md).
"""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from fwd.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "BOOL": 8}
BITS |= {f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_METADATA = "__metadata__"
_MAX_NAME, _MAX_DIMS = 512, 8
_MAX_DIM = 1 << 48
_PICKLES = (".bin", ".pt", ".pth")
_LFS = b"version https://git-lfs"

T = TypeVar("T")
Dim = Annotated[int, msgspec.Meta(ge=0, le=_MAX_DIM)]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor; `begin` and `end` are byte offsets in the file `path`."""

    path: Path
    dtype: str  # a key of BITS
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One open file whose header fits it; `start` is where its data begin, `modified` its time in ns."""

    path: Path
    fd: int
    size: int
    start: int
    modified: int
    entries: Mapping[str, Entry]

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


class _Info(msgspec.Struct, frozen=True):
    dtype: str
    shape: Annotated[list[Dim], msgspec.Meta(max_length=_MAX_DIMS)]
    data_offsets: tuple[Dim, Dim]


class _Metadata(msgspec.Struct, frozen=True):
    sha256: dict[str, str] = {}


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]
    metadata: _Metadata | None = None


@dataclass(frozen=True, slots=True)
class Folder:
    """The weight files of a model folder: which tensors the index promises each (none where there is no index)."""

    files: Mapping[Path, tuple[str, ...]]
    sha256: Mapping[Path, str] = field(default_factory=dict)  # lower-case hex, of the files the index has one for


def headers(folder: Path) -> dict[str, Entry]:
    """Return where each tensor of a model folder stands. Raises ModelError for what does not fit together."""
    shards = open_shards(list_files(folder))
    for shard in shards:
        shard.close()
    return merged(shards)


def merged(shards: list[Shard]) -> dict[str, Entry]:
    """Return the tensors of all shards; raises ModelError for one that stands in two."""
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in shard.entries.items():
            if name in entries:
                raise ModelError(f"tensor {name} stands in both {entries[name].path} and {shard.path}")
            entries[name] = entry
    return entries


def open_shards(folder: Folder) -> list[Shard]:
    """Open all files in the order of their names; raises ModelError as `headers` does, and then leaves none open."""
    shards: list[Shard] = []
    try:
        for path, promised in folder.files.items():
            shards.append(open_shard(path))
            _check_promised(shards[-1], promised)
        merged(shards)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return shards


def _check_promised(shard: Shard, names: Iterable[str]) -> None:
    missing = next((name for name in names if name not in shard.entries), None)
    if missing is not None:
        index = shard.path.with_name(INDEX)
        raise ModelError(f"{index} names tensor {_shown(missing)} in {shard.path.name}, which lacks it")


def list_files(folder: Path) -> Folder:
    """Find the weight files: `model.safetensors`, else those the index names. Raises ModelError."""
    single, index = folder / SINGLE, folder / INDEX
    if os.path.lexists(single):
        return Folder({single: ()})
    if os.path.lexists(index):
        return _indexed(index)
    try:
        pickled = any(path.suffix in _PICKLES for path in folder.iterdir())
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror}") from None
    if pickled:
        raise ModelError(f"{folder} holds pickled weights, which can run code when read: convert them to safetensors")
    raise ModelError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}; download them into it")


def _indexed(index: Path) -> Folder:
    table = _decoded(index, read_json(index), _INDEX_DECODER)
    if not table.weight_map:
        raise ModelError(f"{index}: weight_map is empty")
    files: dict[Path, list[str]] = {}
    for name, file in table.weight_map.items():
        files.setdefault(_plain(index, file), []).append(name)
    sums = table.metadata.sha256 if table.metadata else {}
    for file, digest in sums.items():
        if _plain(index, file) not in files or len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
            raise ModelError(f"{index}: metadata.sha256 of {_shown(file)} is no SHA-256 of a file of weight_map")
    return Folder(
        {path: tuple(files[path]) for path in sorted(files)},
        {index.with_name(file): digest.lower() for file, digest in sums.items()},
    )


def _plain(index: Path, file: str) -> Path:
    """The path of a file beside the index; a link there may lead anywhere, a name may not."""
    if Path(file).name != file or "\\" in file or not file.endswith(".safetensors") or not _named(file):
        raise ModelError(f"{index}: {_shown(file)} is not the plain name of a safetensors file")
    return index.with_name(file)


def read_json(path: Path, most: int = MAX_HEADER) -> bytes:
    """Return the content of a JSON file of at most so many bytes. Raises ModelError."""
    fd = _open(path)
    try:
        size = os.fstat(fd).st_size
        if size > most:
            raise ModelError(f"{path} has {size} bytes, over the {most} that are read")
        return _read(path, fd, size, 0)
    finally:
        os.close(fd)


def open_shard(path: Path) -> Shard:
    """Open one file and check its header; raises ModelError naming file, tensor and reason."""
    fd = _open(path)
    try:
        found = os.fstat(fd)
        length = _header_length(path, _read(path, fd, 8, 0), found.st_size)
        start = 8 + length
        entries = _entries(path, _read(path, fd, length, 8), start, found.st_size)
    except BaseException:
        os.close(fd)
        raise
    return Shard(path, fd, found.st_size, start, found.st_mtime_ns, entries)


def _open(path: Path) -> int:
    """Open a regular file (a link to one, too), and nothing that could hang or act when it is opened or read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the model folder is incomplete") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelError(f"{path} is missing: what stands there is no file")
    return fd


def _read(path: Path, fd: int, length: int, offset: int) -> bytes:
    try:
        return os.pread(fd, length, offset)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    length = int.from_bytes(prefix, "little")
    if prefix == _LFS[:8]:
        raise ModelError(f"{path} is a git-lfs pointer without the weights: fetch them with git lfs pull")
    if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ModelError(f"{path} is truncated or no safetensors file: header of {length} bytes in a file of {size}")
    return length


def _entries(path: Path, header: bytes, start: int, size: int) -> dict[str, Entry]:
    """Check a header of `start` − 8 bytes in a file of `size`; what is allocated is bounded by the header."""
    if not header.startswith(b"{"):
        raise ModelError(f"{path}: the header does not begin with {{")
    table = _decoded(path, header, _HEADER_DECODER)
    table.pop(_METADATA, None)
    entries = {name: _entry(path, name, info, start) for name, info in table.items()}
    # NOTE: the decoder keeps the last of equal keys; a quote within a string is escaped, so this counts keys.
    if header.count(b'"data_offsets"') != len(entries):
        raise ModelError(f"{path}: a tensor stands twice in the header, or its fields do")
    _check_cover(path, entries, start, size)
    return entries


def _entry(path: Path, name: str, raw: msgspec.Raw, start: int) -> Entry:
    if not _named(name):
        raise ModelError(f"{path}: {_shown(name)} is no name of a tensor")
    try:
        info = _INFO_DECODER.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: tensor {_shown(name)} has a header that does not fit the format: {error}") from None
    begin, end = info.data_offsets
    bits = prod(info.shape) * BITS.get(info.dtype, 0)
    if info.dtype not in BITS:
        raise ModelError(f"{path}: tensor {_shown(name)} has dtype {_shown(info.dtype)}, which is not known")
    if (end - begin) * 8 != bits:
        wanted = f"{info.dtype} {info.shape} takes {bits / 8:g} bytes"
        raise ModelError(f"{path}: tensor {_shown(name)} has offsets {begin} to {end}, but {wanted}")
    return Entry(path, info.dtype, tuple(info.shape), start + begin, start + end)


def _check_cover(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Each byte after the header belongs to one tensor."""
    for (name, entry), (later, after) in pairwise(_placed(path, entries, start, size)):
        if after.begin < entry.end:
            raise ModelError(f"{path}: tensors {_shown(name)} and {_shown(later)} overlap")
        if after.begin > entry.end:
            raise ModelError(f"{path}: no tensor covers the bytes between {_shown(name)} and {_shown(later)}")


def _placed(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> Iterator[tuple[str, Entry]]:
    """Tensors in the order of their places, between the header and the end of the file."""
    outside = next((name for name, entry in entries.items() if entry.end > size), None)
    if outside is not None:
        end = entries[outside].end
        raise ModelError(f"{path} is truncated: tensor {_shown(outside)} ends at byte {end}, the file at {size}")
    yield "the header", Entry(path, "U8", (), start, start)
    yield from sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    yield "the end", Entry(path, "U8", (), size, size)


def _named(name: str) -> bool:
    return 0 < len(name) <= _MAX_NAME and name.isprintable()


def _shown(name: str) -> str:
    return name if _named(name) and len(name) <= 160 else repr(name[:80])


def _decoded(path: Path, raw: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path} holds no valid JSON of its kind: {error}") from None


_HEADER_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_INFO_DECODER = msgspec.json.Decoder(_Info)
_INDEX_DECODER = msgspec.json.Decoder(_Index)
