"""A random decoder block over a paged cache, and the rows of its steps."""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from fwd.kernels.kv import KV
from fwd.kernels.ops import QKV, Norm
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import Reference
from fwd.kernels.rows import Cells, Rows

DTYPES = (torch.float32, torch.bfloat16)
KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
PAGE = 4
POSITIONS = 256
# hidden, heads, kv_heads, head_dim, intermediate, extras: ordinary, odd in every dimension, wide, over torch's split
SHAPES = [
    (64, 4, 2, 16, 96, False),
    (67, 3, 1, 10, 37, True),
    (250, 5, 5, 18, 129, True),
    (256, 8, 2, 64, 688, False),
    (1030, 6, 3, 34, 2100, True),
    (512, 4, 2, 64, 8200, False),
]


@dataclass
class Block:
    """A random decoder block and the ops that it runs one after the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    ops: Reference = field(default_factory=Reference)

    def __post_init__(self):
        hidden, heads, kv_heads, dim, inner, extras = self.shape
        self.generator = torch.Generator().manual_seed(self.seed)
        width = (heads + 2 * kv_heads) * dim
        self.layer = QKV(
            self.norm(hidden),
            self.matrix(width, hidden),
            self.random(width) if extras else None,
            self.norm(dim) if extras else None,
            self.norm(dim) if extras else None,
            kv_heads,
            dim,
        )
        self.output = self.matrix(hidden, heads * dim)
        self.mlp_norm, self.gate_up = self.norm(hidden), self.matrix(2 * inner, hidden)
        self.down, self.last_norm = self.matrix(hidden, inner), self.norm(hidden)
        self.head = self.ops.pack_head(QTensor.plain(self.random(301, hidden)))
        angles = torch.outer(torch.arange(float(POSITIONS)), 100.0 ** -torch.linspace(0, 1, dim // 2))
        self.rope = torch.stack((angles.cos(), angles.sin()), dim=1)

    def random(self, *shape):
        return (torch.randn(shape, generator=self.generator) * 0.3).to(self.dtype)

    def matrix(self, *shape):
        return self.ops.pack(QTensor.plain(self.random(*shape)))

    def norm(self, width):
        return Norm(self.random(width) + 1, 1e-5)

    def cache(self, pages, *, stale=math.nan, kv=None, window=0, group=0):
        """KV of `pages` pages full of `stale`, in the model's dtype or in `kv`."""
        shape, dtype = (pages * PAGE, self.shape[2], self.shape[3]), KV_DTYPES[kv] if kv else self.dtype
        keys, values = (torch.full(shape, stale).to(dtype) for _ in range(2))
        scales = [torch.full(shape[:2], stale) if kv == "fp8" else None for _ in range(2)]
        return KV(keys, values, PAGE, group, window, *scales)

    def attended(self, hidden, rows, kv):
        """The attention of one block, [rows, heads·head_dim]; `rows` come whole."""
        attend = self.ops.decode_attention if rows.chunk < 0 else self.ops.prefill_attention
        return attend(self.ops.qkv(hidden, self.layer, self.rope, rows, kv), rows, kv)

    def run(self, hidden, rows, *kvs):
        """One block for each KV and the head; returns hidden and logits of the given rows, padding cut off."""
        count = len(hidden)
        rows = rows.padded(self.ops.row_block)
        x = functional.pad(hidden, (0, 0, 0, len(rows.positions) - count))
        for kv in kvs:
            x = self.ops.linear(self.attended(x, rows, kv), self.output, x)
            x = self.ops.linear(self.ops.gate_up(x, self.mlp_norm, self.gate_up), self.down, x)
        return torch.cat((x.float(), self.ops.head(x, self.last_norm, self.head)), dim=1)[:count]


def decode_rows(places, *tables):
    """Rows at (sequence, position); of each group the block tables [sequences, pages]."""
    sequences, positions = (torch.tensor(column) for column in zip(*places, strict=True))
    cells = tuple(Cells(slots(table[sequences], positions), table.int()) for table in tables)
    return Rows(positions, sequences, torch.full_like(positions, -1), cells)


def chunk_rows(index, size, valid, *tables, first=0):
    """Chunk `index` of sequence 0: its positions from `first` to `valid` are live."""
    positions = torch.arange(index * size, (index + 1) * size)
    live = (positions >= first) & (positions < valid)
    cells = []
    for table in tables:
        known = positions.clamp(max=table.shape[1] * PAGE - 1)
        cells.append(Cells(torch.where(live, slots(table[:1].expand(size, -1), known), -1), table.int()))
    sequences = torch.where(live, 0, -1)
    return Rows(positions, sequences, torch.full_like(positions, -1), tuple(cells), chunk=index)


def slots(lines, positions):
    """The cell of each position, by its own line of a block table."""
    return lines.gather(1, (positions // PAGE)[:, None])[:, 0] * PAGE + positions % PAGE


def scattered_tables(sequences, pages, seed):
    order = torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(seed))
    return order.view(sequences, pages)


def same_bits(left, right):
    return torch.equal(left.contiguous().view(torch.int32), right.contiguous().view(torch.int32))
