"""Paged contexts for the attention kernels: rows of sequences whose pages lie anywhere, NaN in every cell not seen."""

import math
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fwd.kernels import sources
from fwd.kernels.kv import KV
from fwd.kernels.reference import Reference
from fwd.kernels.rows import Cells, Rows

KV_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Shape:
    """What attention is over."""

    kv: str  # "bf16" or "fp8"
    head_dim: int
    kv_heads: int
    group: int
    page: int
    window: int = 0
    sinks: bool = False

    def __str__(self):
        window = f"-window{self.window}" if self.window else ""
        return f"{self.kv}-{self.head_dim}-{self.kv_heads}x{self.group}-page{self.page}{window}{'-sinks' * self.sinks}"

    @property
    def heads(self):
        return self.kv_heads * self.group


class Context:
    """Sequences of some lengths: a position that is known holds numbers of its own, wherever its page lies."""

    def __init__(self, shape, lengths, *, seed=1, places=2, spare=3):
        self.shape, self.lengths = shape, lengths
        order = torch.Generator().manual_seed(places)
        pages = [-(-length // shape.page) for length in lengths]
        drawn = torch.randperm(sum(pages) + spare, generator=order).int()
        self.tables = torch.full((len(lengths), max(pages) + 1), -1, dtype=torch.int32)
        self.spare = drawn[len(drawn) - spare :]
        for line, (count, mine) in enumerate(zip(pages, drawn[: sum(pages)].split(pages), strict=True)):
            self.tables[line, :count] = mine
        self.kv = empty_cache(shape, len(drawn) * shape.page)
        for line, length in enumerate(lengths):
            self.write(self.cell(line, torch.arange(length)), seed * 1000 + line)

    def cell(self, line, positions):
        return self.tables[line, positions // self.shape.page].long() * self.shape.page + positions % self.shape.page

    def write(self, cells, seed):
        """Fill cells, the first of them always alike."""
        kv = self.kv
        size = (len(cells), self.shape.kv_heads, self.shape.head_dim)
        for each, (numbers, scales) in enumerate(((kv.keys, kv.key_scales), (kv.values, kv.value_scales))):
            chance = torch.Generator().manual_seed(10 * seed + each)
            drawn = torch.randn(size, generator=chance)
            if scales is not None:
                scales[cells] = torch.rand(size[:2], generator=chance.manual_seed(10 * seed + each + 2)) * 0.02
                drawn *= 100
            numbers[cells] = drawn.to(numbers.dtype)

    def forget(self, line, first):
        """Give back the pages that hold nothing from position `first` on; no cell before it may be read."""
        cells = self.cell(line, torch.arange(first))
        for numbers in (self.kv.keys, self.kv.values):
            numbers[cells] = torch.full((), math.nan).to(numbers.dtype)
        self.tables[line, : first // self.shape.page] = -1

    def rows(self, places):
        """Decode rows at (sequence, position); sequence −1: padding."""
        sequences, positions = (torch.tensor(column) for column in zip(*places, strict=True))
        slots = torch.tensor([int(self.cell(s, torch.tensor(p))) if s >= 0 else -1 for s, p in places])
        return Rows(positions, sequences, torch.full_like(positions, -1), (Cells(slots, self.tables),))

    def chunk(self, index, size, first, end):
        """Chunk `index` of sequence 0; positions first … end − 1 are live."""
        positions = torch.arange(index * size, (index + 1) * size)
        live = (positions >= first) & (positions < end)
        known = positions.clamp(max=self.tables.shape[1] * self.shape.page - 1)
        slots = torch.where(live, self.cell(0, known), -1)
        cells = Cells(slots, self.tables[:1].contiguous())
        return Rows(positions, torch.where(live, 0, -1), torch.full_like(positions, -1), (cells,), chunk=index)


def empty_cache(shape, cells):
    """A cache of NaN."""
    size, dtype = (cells, shape.kv_heads, shape.head_dim), KV_DTYPES[shape.kv]
    scales = [torch.full(size[:2], math.nan) if shape.kv == "fp8" else None for _ in range(2)]
    keys, values = (torch.full(size, math.nan).to(dtype) for _ in range(2))
    return KV(keys, values, shape.page, 0, shape.window, *scales)


def queries(shape, count, seed=5):
    drawn = torch.randn((count, shape.heads, shape.head_dim), generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16()


def sinks_of(shape, seed=6):
    return torch.randn(shape.heads, generator=torch.Generator().manual_seed(seed)) * 2 if shape.sinks else None


def reference(q, rows, kv, sinks):
    """What the reference gives."""
    ops = Reference()
    ops._enter(rows, torch.zeros(1, 2, q.shape[2] // 2))
    attend = ops.decode_attention if rows.chunk < 0 else ops.prefill_attention
    return attend(q, rows, kv, sinks)


def on(device, thing):
    """Rows, KV, a tensor or None on a device; copies, so that no launch finds what another one left."""
    if thing is None or isinstance(thing, torch.Tensor):
        return thing if thing is None else thing.clone().to(device)
    if isinstance(thing, KV):
        names = ("keys", "values", "key_scales", "value_scales")
        return replace(thing, **{name: on(device, getattr(thing, name)) for name in names})
    cells = tuple(Cells(on(device, each.slots), on(device, each.tables)) for each in thing.cells)
    moved = {name: on(device, getattr(thing, name)) for name in ("positions", "sequences", "parents")}
    return replace(thing, cells=cells, **moved)


def trimmed(execution, source, kernel):
    """The execution with one kernel left in a file, which compiles sooner; mutants begin here."""
    left = execution.mutated(source, "#include", "#include")
    path = Path(left.folder) / source
    keep_only(path, kernel)
    return left


def keep_only(path, kernel):
    head, *kernels = re.split(r'(?=^extern "C")', path.read_text(), flags=re.MULTILINE)
    (mine,) = (text for text in kernels if f" {kernel}(" in text)
    path.write_text(head + mine)


def trimmed_folder(folder, source, kernel):
    """A copy of `cuda/` with one kernel left in a file."""
    shutil.copytree(sources.home(), folder, ignore=shutil.ignore_patterns("host"))
    keep_only(Path(folder) / source, kernel)
    return Path(folder)
