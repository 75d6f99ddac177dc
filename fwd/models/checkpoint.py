"""The tensors of a model folder, read: safetensors, sharded or not, every byte hashed once."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fwd.errors import ModelError
from fwd.models.reader import LEAF, Range, Reader, Sums
from fwd.models.safetensors import Entry, read_json
from fwd.models.source import DTYPES, Source, memory

Progress = Callable[[int, int], None]

STAGED = 16 * LEAF  # bytes of a tensor that are held to be converted


class Checkpoint(Source):
    """All tensors of a model folder; `progress` gets bytes read and in total, from the thread that takes.

    Tensors are read straight into place, which begins at a multiple of 64 bytes.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._config = read_json(folder / "config.json")
        super().__init__(folder)
        self._sums = Sums(self.shards, self.files.sha256)
        self._total = sum(shard.size for shard in self.shards) + self._sums.total
        self._progress = progress
        self._reader = Reader(self.shards, self._report)
        try:
            self._report()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads and close the files."""
        self._sums.close()
        self._reader.close()
        super().close()

    def finish(self, ignored: Callable[[str], bool]) -> None:
        """Read what nobody took for its hash; raise ModelError for a tensor left over that `ignored` does not accept.

        The same for a file that was changed meanwhile, or whose SHA-256 is not that of the index.
        """
        super().finish(ignored)
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

    def _read(self, names: Sequence[str], parts: Iterable[Tensor]) -> None:
        others: list[tuple[str, Tensor]] = []
        self._reader.read(self._as_stored(names, parts, others))
        for name, part in others:
            self._convert(name, part.view(-1))

    def _as_stored(
        self, names: Sequence[str], parts: Iterable[Tensor], others: list[tuple[str, Tensor]]
    ) -> Iterator[Range]:
        """What needs no conversion; the `others` are listed."""
        for name, part in zip(names, parts, strict=True):
            entry = self.entries[name]
            if DTYPES[entry.dtype] == part.dtype:
                yield Range(self._of[entry.path], entry.begin, entry.nbytes, memory(part))
            else:
                others.append((name, part))

    def _values(self, names: Sequence[str], found: Tensor) -> Tensor:  # noqa: ARG002
        return found

    def _convert(self, name: str, out: Tensor) -> None:
        """Read a tensor piece by piece into memory that is used again, and from there into the flat `out`."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        staged = torch.empty(min(STAGED, entry.nbytes) // dtype.itemsize, dtype=dtype)
        for part, piece in self._pieces(entry, staged):
            self._reader.read((part,))
            start = (part.begin - entry.begin) // staged.itemsize
            out[start : start + len(piece)] = piece

    def _pieces(self, entry: Entry, staged: Tensor) -> Iterator[tuple[Range, Tensor]]:
        for begin in range(entry.begin, entry.end, STAGED):
            length = min(STAGED, entry.end - begin)
            piece = staged[: length // staged.itemsize]
            yield Range(self._of[entry.path], begin, length, memory(piece)), piece
