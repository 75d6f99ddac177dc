"""Random matrices and attention inputs for the matrix-vector kernels, and what the reference makes of them."""

import random

import torch
from torch.nn import functional

from fwd.kernels import gemv
from fwd.kernels.kv import KV
from fwd.kernels.ops import QKV, Norm
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import Reference
from fwd.kernels.rows import Cells, Rows

POSITIONS = 64
CELLS = 40
STALE = 7.0
# hidden, heads, kv_heads, head_dim, bias, qk-norm, fp8 cells
LAYERS = [
    (256, 4, 2, 64, False, False, False),
    (2880, 2, 1, 64, True, False, False),
    (72, 16, 1, 16, True, False, False),
    (128, 3, 3, 128, False, False, False),
    (64, 2, 1, 256, True, False, True),
    (136, 6, 2, 64, False, True, False),
    (64, 2, 2, 80, True, True, True),
    (96, 2, 1, 128, False, True, True),
]


class Chance:
    """Random tensors on a device, the same ones on each."""

    def __init__(self, seed, device="cpu"):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def __call__(self, *shape, scale=1.0, dtype=torch.bfloat16):
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype).to(self.device)

    def matrix(self, outputs, inputs):
        return QTensor.plain(self(outputs, inputs, scale=inputs**-0.5))

    def norm(self, width):
        return Norm(self(width, scale=0.3) + 1, 1e-5)


class Layer:
    """A random attention input on a device, its reference, and where `count` rows go; `weight` replaces its matrix."""

    def __init__(self, shape, count, seed, device="cpu", weight=None):
        chance = Chance(seed, device)
        hidden, self.heads, kv_heads, dim, biased, normed, self.fp8 = shape
        width = (self.heads + 2 * kv_heads) * dim
        self.hidden = chance(count, hidden)
        self.plain = QKV(
            chance.norm(hidden),
            chance.matrix(width, hidden) if weight is None else weight.to(torch.device(device)),
            chance(width) if biased else None,
            chance.norm(dim) if normed else None,
            chance.norm(dim) if normed else None,
            kv_heads,
            dim,
        )
        self.rope = torch.stack(angles(dim), dim=1).to(device)
        order = random.Random(seed)
        self.positions = torch.tensor(order.sample(range(POSITIONS), count), device=device)
        self.slots = torch.tensor(order.sample(range(CELLS), count), device=device)

    def rows(self):
        count = len(self.hidden)
        sequences = torch.where(self.slots < 0, -1, 0)
        tables = torch.zeros(1, 1, dtype=torch.int32, device=self.slots.device)
        parents = torch.full_like(self.positions, -1)
        return Rows(self.positions[:count], sequences[:count], parents[:count], (Cells(self.slots[:count], tables),))

    def cache(self):
        shape = (CELLS, self.plain.kv_heads, self.plain.head_dim)
        dtype = torch.float8_e4m3fn if self.fp8 else torch.bfloat16
        tensors = [torch.full(shape, STALE, device=self.hidden.device).to(dtype) for _ in range(2)]
        scales = [torch.full(shape[:2], STALE, device=self.hidden.device) if self.fp8 else None for _ in range(2)]
        return KV(*tensors, 4, 0, 0, *scales)

    def packed(self):
        layer = self.plain
        biases = (layer.bias, layer.q_norm, layer.k_norm, layer.kv_heads, layer.head_dim)
        return QKV(layer.norm, layer.weight.pack(), *biases)

    def run(self, launcher):
        """Returns q and all of the cache."""
        heads, kv, layer = self.heads + 2 * self.plain.kv_heads, self.cache(), self.packed()
        space = gemv.Workspace.of(launcher.device, heads, layer.head_dim)
        q = gemv.qkv(launcher, space, self.hidden, layer, self.rope, rows=self.rows(), kv=kv)
        assert not space.counters.any(), "counters are left as they were found"
        return q, *contents(kv)

    def expected(self):
        """The same by the reference, on the CPU."""
        kv, rows = self.cache(), self.rows().padded(4)
        hidden = functional.pad(self.hidden, (0, 0, 0, len(rows.positions) - len(self.hidden)))
        return Reference().qkv(hidden, self.plain, self.rope, rows, kv)[: len(self.hidden)], *contents(kv)


def angles(dim):
    places = torch.outer(torch.arange(float(POSITIONS)), 100.0 ** -torch.linspace(0, 1, dim // 2))
    return places.cos(), places.sin()


def contents(kv):
    """Keys and values as they are read, and the scales."""
    if kv.key_scales is None:
        return kv.keys, kv.values
    scaled = (kv.keys, kv.key_scales), (kv.values, kv.value_scales)
    return *(cells.float() * scales.unsqueeze(-1) for cells, scales in scaled), kv.key_scales, kv.value_scales


def to(thing, device):
    if isinstance(thing, QTensor):
        return QTensor(thing.data.to(device), thing.format, thing.shape, thing.packed)
    return thing.to(device)
