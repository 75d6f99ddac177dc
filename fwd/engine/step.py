"""The buffers of one launch. They are allocated once, so their addresses never change, and a step only fills them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fwd.engine.request import Request
from fwd.engine.scheduler import MAX_ROWS, Chunk, Span
from fwd.kernels.ops import Rows

BUCKETS = (1, 2, 4, 8, MAX_ROWS)
Array = NDArray[np.int64]


def bucket(rows: int, block: int) -> int:
    """The smallest bucket that holds `rows` rows in whole blocks."""
    return next(size for size in BUCKETS if size >= rows and size % block == 0)


class Step:
    """Rows of a launch: which token each computes, whose it is, and where its KV goes (int64 throughout).

    ids, positions, slots, sequences, parents: [capacity]; tables: [sequences, pages]; lengths: [sequences] known tokens
    whose KV is committed before the step. Rows are not sequences: replayed and drafted tokens give one several rows.
    """

    def __init__(self, capacity: int, sequences: int, pages: int, page_size: int, block: int) -> None:
        self._page_size = page_size
        self._block = block
        self.ids, self._ids = _buffer(capacity)
        self.positions, self._positions = _buffer(capacity)
        self.slots, self._slots = _buffer(capacity)
        self.sequences, self._sequences = _buffer(capacity)
        self.parents, self._parents = _buffer(capacity)
        self.lengths, self._lengths = _buffer(sequences)
        self.tables, self._tables = _buffer(sequences, pages)
        self._lines: list[tuple[int, int]] = [(-1, 0)] * sequences
        self._parents.fill(-1)

    def decode(self, spans: Sequence[Span]) -> tuple[torch.Tensor, Rows]:
        """Fill in the rows of a decode step, in the order of `spans`; rows up to the bucket are padding."""
        row = 0
        for line, span in enumerate(spans):
            count = span.end - span.start
            self._sequences[row : row + count] = line
            self._lengths[line] = span.start
            self._fill(row, line, span, span.end)
            row += count
        size = bucket(row, self._block)
        self._slots[row:size] = -1
        self._positions[row:size] = 0
        self._sequences[row:size] = 0
        return self.ids[:size], self._rows(size, -1)

    def prefill(self, chunk: Chunk, size: int) -> tuple[torch.Tensor, Rows]:
        """Fill in chunk `chunk.number` of `size` rows; rows past the prompt are padding."""
        request, start = chunk.request, chunk.number * size
        end = min(start + size, request.prompt)
        self._fill(0, 0, Span(request, start, end), end)
        self._lengths[0] = start
        self._slots[end - start :] = -1
        self._positions[end - start :] = 0
        return self.ids, self._rows(size, chunk.number)

    def _fill(self, row: int, line: int, span: Span, end: int) -> None:
        request, count = span.request, end - span.start
        table = self._table(line, request)
        positions = np.arange(span.start, end)
        self._ids[row : row + count] = request.ids[span.start : end]
        self._positions[row : row + count] = positions
        self._slots[row : row + count] = table[positions // self._page_size] * self._page_size + (
            positions % self._page_size
        )

    def _table(self, line: int, request: Request) -> Array:
        key = (request.id, request.pages_version)
        if self._lines[line] != key:
            self._tables[line, : len(request.pages)] = request.pages
            self._lines[line] = key
        table: Array = self._tables[line]
        return table

    def _rows(self, size: int, chunk: int) -> Rows:
        return Rows(
            positions=self.positions[:size],
            slots=self.slots[:size],
            sequences=self.sequences[:size],
            tables=self.tables,
            parents=self.parents[:size],
            chunk=chunk,
        )


def _buffer(*shape: int) -> tuple[torch.Tensor, Array]:
    """One int64 buffer as the device and as the host see it."""
    tensor = torch.zeros(shape, dtype=torch.int64)
    return tensor, tensor.numpy()
