"""Random layers that keep latents, paged contexts of theirs, and what kernels and the reference make of rows there."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from contexts import on
from layers import Chance
from torch.nn import functional
from trees import tree_rows

from fwd.kernels import latent_kernels as latents
from fwd.kernels.kv import LATENT_BLOCK, LatentKV
from fwd.kernels.ops import Latents
from fwd.kernels.paged import write_latents
from fwd.kernels.reference import Reference
from fwd.kernels.rows import Cells, Rows

KV_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Shape:
    """What a layer is, and its cells."""

    kv: str  # "bf16" or "fp8"
    hidden: int
    heads: int
    rank: int  # 0: no query latent
    latent: int
    nope: int
    rope: int
    value: int
    page: int = 4

    def __str__(self):
        sizes = (self.hidden, self.heads, self.rank, self.latent, self.nope, self.rope, self.value)
        return f"{self.kv}-{'x'.join(map(str, sizes))}-page{self.page}"


# Queries of latents, weights of cells, sums of pieces and what is summed of latents are rounded to bf16 before tensor
# cores take them: each of the four adds some 3e-6. What was seen most is 1.3e-5.
BOUND = 2e-5
EXACT = 1e-6  # of what is rounded where the reference rounds, its sums taken in another order
SHAPES = [
    Shape("bf16", 64, 4, 32, 32, 16, 8, 16),
    Shape("bf16", 72, 3, 0, 48, 8, 16, 24, page=16),  # no query latent
    Shape("bf16", 136, 5, 24, 112, 24, 24, 40),  # a head ends within a tile
    Shape("bf16", 256, 20, 96, 512, 192, 64, 256, page=12),
    Shape("bf16", 32, 128, 0, 16, 8, 8, 8),
    Shape("fp8", 64, 4, 32, 32, 16, 8, 16),
    Shape("fp8", 2880, 3, 16, 272, 8, 16, 20),  # a ragged block
    Shape("fp8", 72, 20, 0, 512, 24, 64, 136, page=16),
]


class Layer:
    """A random layer with plain weights; `packed` has them as kernels take them."""

    def __init__(self, shape, *, seed=3, positions=1024):
        chance = Chance(seed)
        self.shape, wide = shape, shape.nope + shape.rope
        self.plain = Latents(
            norm=chance.norm(shape.hidden),
            down=chance.matrix(shape.rank + shape.latent + shape.rope, shape.hidden),
            q_norm=chance.norm(shape.rank) if shape.rank else None,
            query=chance.matrix(shape.heads * wide, shape.rank or shape.hidden),
            kv_norm=chance.norm(shape.latent),
            up_key=chance(shape.heads, shape.nope, shape.latent, scale=shape.latent**-0.5),
            up_value=chance(shape.heads, shape.value, shape.latent, scale=shape.latent**-0.5),
            rope=shape.rope,
            scale=1.7 * wide**-0.5,
        )
        places = torch.outer(torch.arange(float(positions)), 100.0 ** -torch.linspace(0, 1, shape.rope // 2))
        self.rope = torch.stack((places.cos(), places.sin()), dim=1)

    def norms(self):
        return ((name, getattr(self.plain, name)) for name in ("norm", "q_norm", "kv_norm"))

    def packed(self, device):
        layer = replace(self.plain, down=self.plain.down.pack().to(device), query=self.plain.query.pack().to(device))
        norms = {name: norm and replace(norm, weight=on(device, norm.weight)) for name, norm in self.norms()}
        return replace(layer, up_key=on(device, layer.up_key), up_value=on(device, layer.up_value), **norms)


class Context:
    """Sequences of some lengths: a position that is known holds numbers of its own, wherever its page lies."""

    def __init__(self, shape, lengths, *, seed=1, places=2, spare=3):
        self.shape, self.lengths = shape, lengths
        pages = [-(-length // shape.page) for length in lengths]
        drawn = torch.randperm(sum(pages) + spare, generator=torch.Generator().manual_seed(places)).int()
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
        chance = torch.Generator().manual_seed(seed)
        drawn = torch.randn((len(cells), self.shape.latent + self.shape.rope), generator=chance).bfloat16()
        write_latents(self.kv, cells, drawn[:, : self.shape.latent], drawn[:, self.shape.latent :])

    def rows(self, places):
        """Decode rows at (sequence, position); sequence −1: padding."""
        sequences, positions = (torch.tensor(column) for column in zip(*places, strict=True))
        slots = torch.tensor([int(self.cell(s, torch.tensor(p))) if s >= 0 else -1 for s, p in places])
        return Rows(positions, sequences, torch.full_like(positions, -1), (Cells(slots, self.tables),))

    def last_rows(self):
        return self.rows([(line, length - 1) for line, length in enumerate(self.lengths)])


def tree(shape, base):
    """A context and the rows of a tree over `base` of its tokens."""
    context = Context(shape, (base + 1, 30), spare=12)
    return context, tree_rows(context, base)


def empty_cache(shape, cells):
    """A cache of NaN."""
    scales = torch.full((cells, -(-shape.latent // LATENT_BLOCK)), math.nan) if shape.kv == "fp8" else None
    numbers = torch.full((cells, shape.latent), math.nan).to(KV_DTYPES[shape.kv])
    return LatentKV(numbers, torch.full((cells, shape.rope), math.nan).bfloat16(), shape.page, 0, scales)


def cache_on(device, kv):
    return replace(kv, **{name: on(device, getattr(kv, name)) for name in ("latents", "keys", "scales")})


def hidden_of(shape, count, seed=5):
    return torch.randn((count, shape.hidden), generator=torch.Generator().manual_seed(seed)).bfloat16()


def written(kv, rows):
    """The cells of rows that have one: latents as they are read, keys."""
    slots = rows.cells[0].slots
    slots = slots[slots >= 0]
    numbers = kv.latents[slots].float()
    if kv.scales is not None:
        numbers *= kv.scales[slots].repeat_interleave(LATENT_BLOCK, dim=1)[:, : numbers.shape[1]]
    return numbers, kv.keys[slots]


def attend(launcher, layer, hidden, rows, kv):
    """q, attention and the written cells, by the kernels; the workspace must be left as it was."""
    device = launcher.device
    packed, cache, moved, rope = layer.packed(device), cache_on(device, kv), on(device, rows), on(device, layer.rope)
    workspace = latents.Workspace.new(launcher, packed)
    q = latents.latent_qkv(launcher, workspace, on(device, hidden), packed, rope, rows=moved, kv=cache)
    out = latents.decode_latent_attention(launcher, workspace, q, packed, rows=moved, kv=cache)
    assert not workspace.counters.any(), "a counter is not zero"
    return q.clone(), out, *written(cache, moved)


def reference(layer, hidden, rows, kv):
    """The same by the reference."""
    ops, cache, whole = Reference(), cache_on("cpu", kv), rows.padded(4)
    x = functional.pad(hidden, (0, 0, 0, len(whole.positions) - len(hidden)))
    q = ops.latent_qkv(x, layer.plain, layer.rope, whole, cache)
    out = ops.decode_latent_attention(q, layer.plain, whole, cache)
    return q[: len(hidden)], out[: len(hidden)], *written(cache, rows)


def trimmed(execution, kernels):
    """The execution with only these kernels left, which compile sooner; mutants begin here."""
    left = execution.mutated("latent_qkv.cu", "#include", "#include")
    for path in Path(left.folder).glob("latent_*.cu"):
        keep_only(path, kernels)
    return left


def keep_only(path, kernels):
    head, *parts = re.split(r'(?=^(?:extern "C"|FWD_LATENT_|LATENT_ATTENTION\())', path.read_text(), flags=re.MULTILINE)
    mine = (part for part in parts if any(f"{name}(" in part or f"({name}," in part for name in kernels))
    path.write_text(head + "".join(mine))
