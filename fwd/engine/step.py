"""The buffers of one launch. They are allocated once, so their addresses never change, and a step only fills them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fwd.engine.request import Request
from fwd.engine.sampler import draw
from fwd.engine.scheduler import MAX_ROWS, Chunk, Span
from fwd.kernels.ops import Draw, Rows

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


class Step:
    """Rows of a launch: which token each computes, whose it is, where its KV goes, and what is drawn from it.

    ids, positions, slots, sequences, parents: int64 [capacity]; tables: [sequences, pages]; lengths: [sequences], known
    tokens whose KV is committed before the step. Rows are not sequences: replayed and drafted tokens give one several.
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
        self._lines = [0] * sequences
        self._parents.fill(-1)

    def decode(self, spans: Sequence[Span]) -> Launch:
        """Fill in the rows of a decode step, in the order of `spans`; rows up to the bucket are padding."""
        row, drawing, draws = 0, [], []
        for line, span in enumerate(spans):
            self._fill(row, line, span)
            row += span.end - span.start
            if span.draws:
                drawing.append(row - 1)
                draws.append(draw(span.request))
        size = bucket(row, self._block)
        self._pad(row, size)
        return Launch(self.ids[:size], self._rows(size, -1), drawing, draws)

    def prefill(self, chunk: Chunk, size: int) -> Launch:
        """Fill in a chunk of `size` rows; rows past the prompt are padding. The last row of the prompt may draw."""
        request, start = chunk.request, chunk.number * size
        end = min(start + size, request.prompt)
        self._fill(0, 0, Span(request, start, end))
        self._pad(end - start, size)
        draws = end == request.length < request.limit
        return Launch(
            self.ids, self._rows(size, chunk.number), [end - start - 1] * draws, [draw(request)] if draws else []
        )

    def _fill(self, row: int, line: int, span: Span) -> None:
        rows = slice(row, row + span.end - span.start)
        pages, offsets = np.divmod(np.arange(span.start, span.end), self._page_size)
        self._ids[rows] = span.request.ids[span.start : span.end]
        self._positions[rows] = range(span.start, span.end)
        self._slots[rows] = self._table(line, span.request)[pages] * self._page_size + offsets
        self._sequences[rows] = line
        self._lengths[line] = span.start

    def _pad(self, row: int, size: int) -> None:
        self._slots[row:size] = -1
        self._positions[row:size] = 0
        self._sequences[row:size] = 0

    def _table(self, line: int, request: Request) -> Array:
        if self._lines[line] != request.pages_version:
            self._tables[line, : len(request.pages)] = request.pages
            self._lines[line] = request.pages_version
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
