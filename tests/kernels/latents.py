"""A random decoder block that keeps latents, and what its attention is by the definition."""

import math
from dataclasses import dataclass, field

import torch
from blocks import KV_DTYPES, PAGE, POSITIONS
from torch.nn import functional

from fwd.kernels.kv import LATENT_BLOCK, LatentKV
from fwd.kernels.ops import Latents, Norm
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import Reference

# hidden, heads, q_rank, latent, nope, rope, value: ordinary, odd in every dimension, a ragged block, many heads
SHAPES = [
    (64, 4, 32, 32, 16, 8, 16),
    (67, 3, 0, 37, 10, 6, 13),
    (72, 5, 24, 136, 24, 10, 32),
    (128, 20, 48, 64, 24, 16, 32),
]
WIDE = (2100, 16, 1536, 512, 128, 64, 128)  # over torch's split


@dataclass
class Block:
    """A random attention block over latents and the ops that it runs one after the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    ops: Reference = field(default_factory=Reference)

    def __post_init__(self):
        hidden, heads, rank, latent, nope, rope, value = self.shape
        self.generator = torch.Generator().manual_seed(self.seed)
        self.layer = Latents(
            norm=self.norm(hidden),
            down=self.matrix(rank + latent + rope, hidden),
            q_norm=self.norm(rank) if rank else None,
            query=self.matrix(heads * (nope + rope), rank or hidden),
            kv_norm=self.norm(latent),
            up_key=self.random(heads, nope, latent),
            up_value=self.random(heads, value, latent),
            rope=rope,
            scale=1.7 * (nope + rope) ** -0.5,
        )
        self.output = self.matrix(hidden, heads * value)
        angles = torch.outer(torch.arange(float(POSITIONS)), 100.0 ** -torch.linspace(0, 1, rope // 2))
        self.rope = torch.stack((angles.cos(), angles.sin()), dim=1)

    def random(self, *shape):
        return (torch.randn(shape, generator=self.generator) * 0.3).to(self.dtype)

    def matrix(self, *shape):
        return self.ops.pack(QTensor.plain(self.random(*shape)))

    def norm(self, width):
        return Norm(self.random(width) + 1, 1e-6)

    def cache(self, pages, *, stale=math.nan, kv=None):
        """Pages full of `stale`, in the model's dtype or in `kv`."""
        latent, rope = self.shape[3], self.shape[5]
        dtype = KV_DTYPES[kv] if kv else self.dtype
        cells, key_dtype = pages * PAGE, torch.bfloat16 if kv == "fp8" else dtype
        scales = torch.full((cells, -(-latent // LATENT_BLOCK)), stale) if kv == "fp8" else None
        return LatentKV(
            torch.full((cells, latent), stale).to(dtype),
            torch.full((cells, rope), stale).to(key_dtype),
            PAGE,
            0,
            scales,
        )

    def attended(self, hidden, rows, kv):
        """The attention of one block, [rows, heads·value]; `rows` come whole."""
        attend = self.ops.decode_latent_attention if rows.chunk < 0 else self.ops.prefill_latent_attention
        return attend(self.ops.latent_qkv(hidden, self.layer, self.rope, rows, kv), self.layer, rows, kv)

    def run(self, hidden, rows, *kvs):
        """One block for each cache; returns hidden of the given rows as float32, padding cut off."""
        count, rows = len(hidden), rows.padded(self.ops.row_block)
        x = functional.pad(hidden, (0, 0, 0, len(rows.positions) - count))
        for kv in kvs:
            x = self.ops.linear(self.attended(x, rows, kv), self.output, x)
        return x.float()[:count]


def stored(kv, cells):
    """Latents and rotated keys of cells in float64."""
    latents, keys = kv.latents[cells].double(), kv.keys[cells].double()
    if kv.scales is None:
        return latents, keys
    by_number = torch.arange(latents.shape[1]) // LATENT_BLOCK
    return latents * kv.scales[cells].double()[:, by_number], keys


def expected(q, layer, kv, table, position):
    """The definition, in float64, of one row's attention [heads·value]: keys and values of each head, softmax."""
    places = torch.arange(position + 1)
    latents, rotated = stored(kv, table[places // PAGE] * PAGE + places % PAGE)
    out = []
    for head, query in enumerate(q.double()):
        keys = torch.cat((latents @ layer.up_key[head].double().T, rotated), dim=1)
        values = latents @ layer.up_value[head].double().T
        out.append((keys @ query * layer.scale).softmax(0) @ values)
    return torch.cat(out)
