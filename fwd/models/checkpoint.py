"""The tensors of a model folder, each taken exactly once: safetensors, sharded or not; never pickle, never code."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fwd.errors import ModelError
from fwd.models.reader import LEAF, Range, Reader, Sums
from fwd.models.safetensors import Entry, list_files, merged, open_shards, read_json

Progress = Callable[[int, int], None]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = ("F32", "F16", "BF16")  # that `take` converts into each other
STAGED = 16 * LEAF  # bytes of a tensor that are held to be converted


class Checkpoint:
    """All tensors of a model folder; `progress` gets bytes read and in total, from the thread that takes.

    Opening it checks all headers and allocates no tensor. Raises ModelError for what does not fit together, here and
    in all methods. Tensors are read straight into place, which begins at a multiple of 64 bytes.
    """

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder = folder
        files, self._config = list_files(folder), read_json(folder / "config.json")
        self.shards = open_shards(files)
        self.entries = merged(self.shards)
        self.kept: dict[str, int] = {}  # bytes by prefix
        self._of = {shard.path: shard for shard in self.shards}
        self._unused = set(self.entries)
        self._sums = Sums(self.shards, files.sha256)
        self._total = sum(shard.size for shard in self.shards) + self._sums.total
        self._progress = progress
        self._reader = Reader(self.shards, self._report)
        try:
            self._report()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and close the files."""
        self._sums.close()
        self._reader.close()
        for shard in self.shards:
            shard.close()

    def take(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
        """Return the named float tensors, converted and concatenated along the first dimension."""
        for name, shape in zip(names, shapes, strict=True):
            self._check(name, shape, FLOATS)
        out = torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], dtype=dtype)
        ends = accumulate(shape[0] for shape in shapes)
        parts = {name: out[end - shape[0] : end] for name, shape, end in zip(names, shapes, ends, strict=True)}
        self._reader.read(self._whole(name, part) for name, part in parts.items() if self._dtype(name) == dtype)
        for name, part in parts.items():
            if self._dtype(name) != dtype:
                self._convert(name, part.view(-1))
            self._unused.remove(name)
        return out

    def raw(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a tensor as it is stored, whose shape may be any if none is expected."""
        entry = self._check(name, shape, DTYPES)
        return self.stack((name,), entry.shape, DTYPES[entry.dtype])[0]

    def stack(self, names: Sequence[str], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return tensors of one shape that are stored in `dtype`, one after the other: [names, *shape]."""
        stored = [key for key, value in DTYPES.items() if value == dtype]
        for name in names:
            self._check(name, shape, stored)
        out = torch.empty(len(names), *shape, dtype=dtype)
        self._reader.read(map(self._whole, names, out))
        self._unused.difference_update(names)
        return out

    def left(self) -> list[str]:
        """Return the names of tensors that nobody took, in order."""
        return sorted(self._unused)

    def keep(self, prefix: str) -> None:
        """Leave all tensors of this prefix in the files, for whom they are: `kept` says how many bytes they have."""
        names = {name for name in self._unused if name.startswith(prefix)}
        if names:
            self.kept[prefix] = sum(self.entries[name].nbytes for name in names)
        self._unused -= names

    def finish(self, ignored: Callable[[str], bool]) -> None:
        """Read what nobody took for its hash; raise ModelError for a tensor left over that `ignored` does not accept.

        The same for a file that was changed meanwhile, or whose SHA-256 is not that of the index.
        """
        left = [name for name in self.left() if not ignored(name)]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ModelError(f"{self.entries[left[0]].path}: tensor {left[0]}{more} has no place in this architecture")
        self._reader.read(part for shard in self.shards for part in self._reader.unread(shard))
        self._sums.check(self._report)
        self._report()
        for shard in self.shards:
            found = os.fstat(shard.fd)
            if (found.st_size, found.st_mtime_ns) != (shard.size, shard.modified):
                raise ModelError(f"{shard.path} was changed while it was loaded")

    def digest(self) -> str:
        """Return a hash of every byte that `finish` has seen read, as hex.

        SHA-256 of config.json followed by the digests of the files in the order of their names. A file's is SHA-256
        of the SHA-256 of its leaves: its header and its tensors in the order of their places, cut every 4 MiB.
        """
        total = hashlib.sha256(self._config)
        for shard in self.shards:
            total.update(self._reader.digest(shard))
        return total.hexdigest()

    def _report(self) -> None:
        self._progress(self._reader.done + self._sums.done, self._total)

    def _check(self, name: str, shape: tuple[int, ...] | None, dtypes: Sequence[str] | dict[str, torch.dtype]) -> Entry:
        if name not in self.entries:
            expected = "" if shape is None else f", expected shape {list(shape)}"
            raise ModelError(f"{self.folder}: tensor {name} is missing{expected}")
        assert name in self._unused, f"{name} taken twice"
        entry = self.entries[name]
        if shape is not None and entry.shape != shape:
            raise ModelError(f"{entry.path}: {name} has shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in dtypes:
            raise ModelError(f"{entry.path}: {name} has dtype {entry.dtype}, expected one of {', '.join(dtypes)}")
        return entry

    def _dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entries[name].dtype]

    def _whole(self, name: str, into: Tensor) -> Range:
        entry = self.entries[name]
        return Range(self._of[entry.path], entry.begin, entry.nbytes, _bytes(into))

    def _convert(self, name: str, out: Tensor) -> None:
        """Read a tensor piece by piece into memory that is used again, and from there into the flat `out`."""
        entry = self.entries[name]
        staged = torch.empty(min(STAGED, entry.nbytes) // self._dtype(name).itemsize, dtype=self._dtype(name))
        for part, piece in self._pieces(entry, staged):
            self._reader.read((part,))
            start = (part.begin - entry.begin) // staged.itemsize
            out[start : start + len(piece)] = piece

    def _pieces(self, entry: Entry, staged: Tensor) -> Iterator[tuple[Range, Tensor]]:
        for begin in range(entry.begin, entry.end, STAGED):
            length = min(STAGED, entry.end - begin)
            piece = staged[: length // staged.itemsize]
            yield Range(self._of[entry.path], begin, length, _bytes(piece)), piece


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data
