"""The buffers of one launch. They are allocated once, so their addresses never change, and a step only fills them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fwd.engine.pages import BlockTable
from fwd.engine.plan import Plan
from fwd.engine.request import Request
from fwd.engine.scheduler import BUCKETS, Chunk, Span
from fwd.kernels.rows import Cells, Records, Rows

CPU = torch.device("cpu")
Array = NDArray[np.int64]
Fields = Mapping[str, torch.dtype]


def bucket(rows: int, block: int) -> int:
    """The smallest bucket that holds `rows` rows in whole blocks."""
    return next(size for size in BUCKETS if size >= rows and size % block == 0)


class Launch(NamedTuple):
    """One filled step: `ids` int64 [rows] and their `rows`; the rows in `drawing` draw a token each."""

    ids: torch.Tensor
    rows: Rows
    drawing: list[int]


class Block:
    """Buffers of `capacity` elements each in one block of bytes, which one copy brings to the device.

    `tensors` is what the device sees, `arrays` what the host fills in; on the CPU they are the same memory.
    """

    def __init__(self, fields: Fields, capacity: int, device: torch.device) -> None:
        wide = sorted(fields.items(), key=lambda field: -field[1].itemsize)  # so that each begins at its own size
        size = capacity * sum(dtype.itemsize for _, dtype in wide)
        self._host = staging(size, torch.uint8, device)
        self._device = self._host if device == CPU else self._host.to(device)
        self.tensors: dict[str, torch.Tensor] = {}
        self.arrays: dict[str, NDArray[np.generic]] = {}
        begin = 0
        for name, dtype in wide:
            end = begin + capacity * dtype.itemsize
            self.tensors[name] = self._device[begin:end].view(dtype)
            self.arrays[name] = self._host[begin:end].view(dtype).numpy()
            begin = end

    def upload(self) -> None:
        """Bring what was filled in to the device, before what is launched next."""
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)


def staging(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that the host fills in and a GPU can fetch by itself."""
    return torch.zeros(size, dtype=dtype, pin_memory=device != CPU)


class Table:
    """The block tables of one group, int32 [sequences, pages], and which part of each is up to date on the device.

    What the host writes is fetched later, so it must not change before: a line gets another owner only when all that
    was launched with the one before has been collected.
    """

    def __init__(self, sequences: int, pages: int, device: torch.device = CPU) -> None:
        self._host = staging(sequences * pages, torch.int32, device).view(sequences, pages)
        self.tensor = self._host if device == CPU else self._host.to(device)
        self.lines = self._host.numpy()
        self._known = [(0, 0)] * sequences

    def write(self, line: int, table: BlockTable) -> None:
        """Write what is new in a request's table: a step costs nothing that grows with the context."""
        epoch, begin = self._known[line]
        if epoch != table.epoch:
            begin = 0
        if begin < len(table):
            self.lines[line, begin : len(table)] = np.frombuffer(table.pages, np.int32)[begin:]
            if self.tensor is not self._host:
                self.tensor[line, begin : len(table)].copy_(self._host[line, begin : len(table)], non_blocking=True)
        self._known[line] = (table.epoch, len(table))


def new_tables(plan: Plan, sequences: int, device: torch.device) -> list[Table]:
    """The tables of each paged group."""
    pages = -(-plan.context // plan.page_size)
    return [Table(sequences, pages, device) for group in plan.groups if group.kind != "state"]


class Step:
    """Rows of a launch: which token each computes, whose it is and where its KV goes.

    ids, positions, sequences, parents, per paged group slots, and with a state group reads and writes: int64
    [capacity]; what `fields` names beside them travels with them. Rows are not sequences: replayed and drafted tokens
    give one several. All rows start as padding.
    """

    def __init__(
        self,
        plan: Plan,
        capacity: int,
        block: int,
        tables: Sequence[Table],
        *,
        device: torch.device = CPU,
        fields: Fields | None = None,
    ) -> None:
        names = ["ids", "positions", "sequences", "parents", *(f"slots{group}" for group in range(len(tables)))]
        self._states = any(group.kind == "state" for group in plan.groups)
        names += ["reads", "writes"] if self._states else []
        self.block = Block({**dict.fromkeys(names, torch.int64), **(fields or {})}, capacity, device)
        self._page_size, self._chunk, self._rows_block, self._tables = plan.page_size, plan.chunk, block, tables
        self._ids, self._positions, self._sequences, parents = (self.block.arrays[name] for name in names[:4])
        self._slots = [self.block.arrays[name] for name in names if name.startswith("slots")]
        self._reads, self._writes = (self.block.arrays.get(name, np.empty(0, np.int64)) for name in ("reads", "writes"))
        parents.fill(-1)
        self._pad(0, capacity)
        self.block.upload()

    @property
    def ids(self) -> torch.Tensor:
        """int64 [capacity], the token that each row computes; −1 − line: the one that line drew last."""
        return self.block.tensors["ids"]

    def decode(self, spans: Sequence[Span], lines: Sequence[int]) -> tuple[int, list[int]]:
        """Fill in the rows of a decode step, in the order of `spans`, which have `lines` of the tables.

        Returns the number of rows with padding up to the bucket, and the rows that draw: of a span with drafts several.
        """
        row = 0
        drawing: list[int] = []
        for line, span in zip(lines, spans, strict=True):
            self._fill(row, line, span)
            row += span.reach - span.start
            if span.draws:
                drawing += range(row - 1 - len(span.drafts), row)
        size = bucket(row, self._rows_block)
        self._pad(row, size)
        return size, drawing

    def prefill(self, chunk: Chunk) -> Launch:
        """Fill in the rows of a chunk; those before and after its positions are padding. Its last row may draw."""
        request, size = chunk.request, self._chunk
        first = chunk.number * size
        begin, end = chunk.start - first, chunk.end - first
        self._pad(0, begin)
        self._pad(end, size)
        self._fill_many(begin, 0, request, range(chunk.start, chunk.end))
        self._positions[:] = range(first, first + size)
        if self._states:
            self._reads[begin], self._writes[end - 1] = request.record, request.staged[0]
        self.block.upload()
        return Launch(self.ids, self.rows(size, chunk.number), [end - 1] * len(chunk.drawing))

    def first_row(self) -> tuple[torch.Tensor, Rows]:
        """A chunk that computes one row, in the first page of each group: for a cache that holds nothing yet."""
        self._sequences[0] = 0
        for slots in self._slots:
            slots[0] = 0
        self.block.upload()
        return self.ids, self.rows(self._chunk, 0)

    def rows(self, size: int, chunk: int = -1) -> Rows:
        """What the model is told of the first `size` rows."""
        of = {name: tensor[:size] for name, tensor in self.block.tensors.items()}
        return Rows(
            positions=of["positions"],
            sequences=of["sequences"],
            parents=of["parents"],
            cells=tuple(Cells(of[f"slots{group}"], table.tensor) for group, table in enumerate(self._tables)),
            records=Records(of["reads"], of["writes"]) if self._states else None,
            chunk=chunk,
        )

    def _fill(self, row: int, line: int, span: Span) -> None:
        request, start, reach = span.request, span.start, span.reach
        if reach - start > 1:
            self._fill_many(row, line, request, range(start, reach), span.drafts)
        else:
            self._fill_one(row, line, request, start)
        if self._states:
            self._chain(row, span)

    def _fill_one(self, row: int, line: int, request: Request, position: int) -> None:
        """What every step does: numbers one by one are cheaper than arrays."""
        self._ids[row] = request.ids[position] if position < request.length else -1 - line
        self._positions[row] = position
        self._sequences[row] = line
        page, offset = divmod(position, self._page_size)
        for slots, table, pages_of in zip(self._slots, self._tables, request.tables, strict=True):
            table.write(line, pages_of)
            slots[row] = pages_of.pages[page] * self._page_size + offset

    def _fill_many(self, row: int, line: int, request: Request, positions: range, drafts: Sequence[int] = ()) -> None:
        rows, known = slice(row, row + len(positions)), positions.stop - len(drafts)
        pages, offsets = np.divmod(np.arange(positions.start, positions.stop), self._page_size)
        self._ids[rows] = [*request.ids[positions.start : known], *drafts]
        self._positions[rows] = positions
        self._sequences[rows] = line
        for slots, table, pages_of in zip(self._slots, self._tables, request.tables, strict=True):
            table.write(line, pages_of)
            slots[rows] = table.lines[line, pages] * self._page_size + offsets
        if self._states:
            self._reads[rows] = self._writes[rows] = -1

    def _chain(self, row: int, span: Span) -> None:
        """Each row of a span goes on from the state that the row before it leaves."""
        request, count = span.request, span.reach - span.start
        rows, first = slice(row, row + count), len(request.staged) - count
        self._writes[rows] = request.staged[first:]
        self._reads[rows] = [request.record, *request.staged[:-1]][first:]

    def _pad(self, row: int, size: int) -> None:
        if row == size:
            return
        self._positions[row:size] = 0
        self._sequences[row:size] = -1
        for slots in self._slots:
            slots[row:size] = -1
        if self._states:
            self._reads[row:size] = self._writes[row:size] = -1
