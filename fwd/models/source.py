"""The tensors that a model folder's headers tell of, each taken exactly once: never pickle, never code."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fwd.errors import ModelError
from fwd.models.safetensors import Entry, list_files, open_shards

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
BATCH = 4 << 20  # bytes of tensors that `values` gives at once, unless one has more


class Source(ABC):
    """All tensors of a model folder: a `Checkpoint` reads them, a `Rehearsal` only checks that it could.

    Opening it checks all headers and allocates no tensor. Raises ModelError for what does not fit together, here and
    in all methods.
    """

    device: torch.device  # of tensors that are taken

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, list_files(folder)
        self.shards = open_shards(self.files)
        self.entries = {name: entry for shard in self.shards for name, entry in shard.entries.items()}
        self.kept: dict[str, int] = {}  # bytes by prefix
        self._of = {shard.path: shard for shard in self.shards}
        self._unused = set(self.entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for shard in self.shards:
            shard.close()

    def take(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
        """Return the named float tensors, converted and concatenated along the first dimension."""
        for name, shape in zip(names, shapes, strict=True):
            self._check(name, shape, FLOATS)
        heights = [shape[0] for shape in shapes]
        out = torch.empty(sum(heights), *shapes[0][1:], dtype=dtype, device=self.device)
        self._read(names, out.split_with_sizes(heights))
        self._unused.difference_update(names)
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
        out = torch.empty(len(names), *shape, dtype=dtype, device=self.device)
        self._read(names, out)
        self._unused.difference_update(names)
        return out

    def values(self, names: Sequence[str], found: Tensor) -> Iterator[tuple[Sequence[str], Tensor]]:
        """Give the values of tensors that `stack` has given as `found` [names, …], some at once."""
        step = max(1, BATCH * len(names) // max(found.nbytes, 1))
        for start in range(0, len(names), step):
            some = names[start : start + step]
            yield some, self._values(some, found[start : start + step])

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
        """Raise ModelError for a tensor left over that `ignored` does not accept."""
        left = [name for name in self.left() if not ignored(name)]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ModelError(f"{self.entries[left[0]].path}: tensor {left[0]}{more} has no place in this architecture")

    @abstractmethod
    def digest(self) -> str:
        """Return a hash of every byte that `finish` has seen read, as hex; empty where none are read."""

    @abstractmethod
    def _read(self, names: Sequence[str], parts: Iterable[Tensor]) -> None:
        """Read tensors into these, converted where they are stored in another dtype."""

    @abstractmethod
    def _values(self, names: Sequence[str], found: Tensor) -> Tensor:
        """Return what was read into `found`, of its shape and dtype."""

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


def memory(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data
