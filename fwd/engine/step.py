"""The buffers of one launch. They are allocated once, so their addresses never change, and a step only fills them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fwd.engine.pages import BlockTable
from fwd.engine.plan import Plan
from fwd.engine.request import Request
from fwd.engine.sampler import draw
from fwd.engine.scheduler import MAX_ROWS, Chunk, Span
from fwd.kernels.ops import Cells, Draw, Records, Rows

BUCKETS = (1, 2, 4, 8, MAX_ROWS)
Array = NDArray[np.int64]


def bucket(rows: int, block: int) -> int:
    """The smallest bucket that holds `rows` rows in whole blocks."""
    return next(size for size in BUCKETS if size >= rows and size % block == 0)


class Launch(NamedTuple):
    """One filled step: `ids` int64 [rows] and their `rows`; row `drawing[i]` draws a token as `draws[i]` says."""

    ids: torch.Tensor
    rows: Rows
    drawing: list[int]
    draws: list[Draw]


class Table:
    """The block tables of one group on the device, int32 [sequences, pages], and which part of each is up to date."""

    def __init__(self, sequences: int, pages: int) -> None:
        self.tensor = torch.zeros((sequences, pages), dtype=torch.int32)
        self.lines = self.tensor.numpy()
        self._known = [(0, 0)] * sequences

    def write(self, line: int, table: BlockTable) -> None:
        """Write what is new in a request's table: a step costs nothing that grows with the context."""
        epoch, begin = self._known[line]
        if epoch != table.epoch:
            begin = 0
        if begin < len(table):
            self.lines[line, begin : len(table)] = np.frombuffer(table.pages, np.int32)[begin:]
        self._known[line] = (table.epoch, len(table))


class Step:
    """Rows of a launch: which token each computes, whose it is, where its KV goes, and what is drawn from it.

    ids, positions, sequences, parents, per paged group slots, and with a state group reads and writes: int64
    [capacity]; per paged group a `Table`. Rows are not sequences: replayed and drafted tokens give one several.
    """

    def __init__(self, plan: Plan, capacity: int, sequences: int, block: int) -> None:
        kinds = [group.kind for group in plan.groups]
        pages = -(-plan.context // plan.page_size)
        self._page_size, self._chunk, self._block = plan.page_size, plan.chunk, block
        self.ids, self._ids = _buffer(capacity)
        self.positions, self._positions = _buffer(capacity)
        self.sequences, self._sequences = _buffer(capacity)
        self.parents, self._parents = _buffer(capacity)
        self.reads, self._reads = _buffer(capacity if "state" in kinds else 0)
        self.writes, self._writes = _buffer(capacity if "state" in kinds else 0)
        self._paged = [(_buffer(capacity), Table(sequences, pages)) for kind in kinds if kind != "state"]
        self._parents.fill(-1)

    def decode(self, spans: Sequence[Span]) -> Launch:
        """Fill in the rows of a decode step, in the order of `spans`; rows up to the bucket are padding."""
        row, drawing, draws = 0, [], []
        for line, span in enumerate(spans):
            self._fill(row, line, span.request, span.start, span.end)
            if len(self._reads):
                self._chain(row, span)
            row += span.end - span.start
            if span.draws:
                drawing.append(row - 1)
                draws.append(draw(span.request))
        size = bucket(row, self._block)
        self._pad(row, size)
        return Launch(self.ids[:size], self._rows(size, -1), drawing, draws)

    def prefill(self, chunk: Chunk) -> Launch:
        """Fill in the rows of a chunk; those before and after its positions are padding. Its last row may draw."""
        request, size = chunk.request, self._chunk
        first = chunk.number * size
        begin, end = chunk.start - first, chunk.end - first
        self._pad(0, begin)
        self._pad(end, size)
        self._fill(begin, 0, request, chunk.start, chunk.end)
        self._positions[:] = range(first, first + size)
        if len(self._reads):
            self._reads[begin], self._writes[end - 1] = request.record, request.staged[0]
        drawing = chunk.drawing
        return Launch(self.ids, self._rows(size, chunk.number), [end - 1] * len(drawing), [*map(draw, drawing)])

    def _fill(self, row: int, line: int, request: Request, start: int, end: int) -> None:
        rows = slice(row, row + end - start)
        pages, offsets = np.divmod(np.arange(start, end), self._page_size)
        self._ids[rows] = request.ids[start:end]
        self._positions[rows] = range(start, end)
        self._sequences[rows] = line
        for ((_, slots), table), pages_of in zip(self._paged, request.tables, strict=True):
            table.write(line, pages_of)
            slots[rows] = table.lines[line, pages] * self._page_size + offsets
        if len(self._reads):
            self._reads[rows] = self._writes[rows] = -1

    def _chain(self, row: int, span: Span) -> None:
        """Each row of a span goes on from the state that the row before it leaves."""
        request, rows = span.request, slice(row, row + span.end - span.start)
        self._writes[rows] = request.staged
        self._reads[rows] = [request.record, *request.staged[:-1]]

    def _pad(self, row: int, size: int) -> None:
        self._positions[row:size] = 0
        self._sequences[row:size] = -1
        for (_, slots), _ in self._paged:
            slots[row:size] = -1
        if len(self._reads):
            self._reads[row:size] = self._writes[row:size] = -1

    def _rows(self, size: int, chunk: int) -> Rows:
        return Rows(
            positions=self.positions[:size],
            sequences=self.sequences[:size],
            parents=self.parents[:size],
            cells=tuple(Cells(slots[:size], table.tensor) for (slots, _), table in self._paged),
            records=Records(self.reads[:size], self.writes[:size]) if len(self._reads) else None,
            chunk=chunk,
        )


def _buffer(capacity: int) -> tuple[torch.Tensor, Array]:
    """One int64 buffer as the device and as the host see it."""
    tensor = torch.zeros(capacity, dtype=torch.int64)
    return tensor, tensor.numpy()
