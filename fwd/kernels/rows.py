"""Which tokens of which sequences a step computes, and where what they leave goes."""

from dataclasses import dataclass, replace

import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Where the rows of a step find and put the KV of one group of layers, which has page numbers of its own."""

    slots: Tensor  # int64 [rows], KV cell to write = page · page_size + offset; −1: a padding row, writes nothing
    tables: Tensor  # int32 [sequences, max_pages], page of each page_size positions; unused or behind a window: any


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Which recurrent state each row continues and where it leaves its own; a record once written never changes."""

    reads: Tensor  # int64 [rows], record of the state before the row; −1: the empty state, or not read
    writes: Tensor  # int64 [rows], record of the state after the row; −1: not kept


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one step: which token of which sequence each row computes, and where what it leaves goes.

    A decode row at position p attends to cells 0…p of its sequence (the last `window` of them in a sliding group), also
    those that rows of this step write. Drafts may form a tree: a row whose parent is q ≥ 0 stands below row q, one
    position after it, in the same sequence, and sees what q sees and itself. Its cell is its own slot, whatever the
    block table holds there; up to and with its first ancestor whose parent is −1 all is found through the block table.
    Keys are taken in order of position wherever they stand: an accepted branch has the bits of the plain chain.

    A prefill step is exactly C rows of one sequence at positions iC … iC+C−1 (`chunk` = i); rows that are not needed,
    at its beginning or its end, are padding. Of a prefill step only the first row that is no padding reads a record and
    only the last one writes one.
    """

    positions: Tensor  # int64 [rows], absolute; of padding rows: any
    sequences: Tensor  # int64 [rows], line of the tables; −1: a padding row
    parents: Tensor  # int64 [rows], row this draft follows; −1: what the block table holds before it (also a chain)
    cells: tuple[Cells, ...]  # per paged group
    records: Records | None = None  # where the model keeps states
    chunk: int = -1  # −1: decode rows; else the index i of the prefill chunk

    def padded(self, block: int) -> "Rows":
        """Append padding rows up to a multiple of `block`."""
        if (extra := -len(self.positions) % block) == 0:
            return self
        assert self.chunk < 0, "a prefill chunk comes whole"

        def padding(rows: Tensor, value: int = -1) -> Tensor:
            return F.pad(rows, (0, extra), value=value)

        records = self.records
        return replace(
            self,
            positions=padding(self.positions, 0),
            sequences=padding(self.sequences),
            parents=padding(self.parents),
            cells=tuple(Cells(padding(each.slots), each.tables) for each in self.cells),
            records=records and Records(padding(records.reads), padding(records.writes)),
        )
