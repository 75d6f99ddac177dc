"""Prefill on a GPU: the library's products over weights that are unpacked slab by slab, own kernels for the rest.

A product's shape is that of its chunk, whatever rows are padding, so a row's bits are its own. torch's flash attention
is left out: it takes pages in order, and where a sequence's pages stand depends on what was cached before it.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.kernels import chunk_latents, expert_kernels, packing
from fwd.kernels.kv import KV, LatentKV
from fwd.kernels.launch import Kernel, Launcher
from fwd.kernels.ops import QKV, Active, Experts, Latents, Norm, Routed, Router
from fwd.kernels.paged_attention import KV_DTYPES, check
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import normed
from fwd.kernels.rows import Rows
from fwd.kernels.sizes import UNPACKED_BYTES
from fwd.kernels.spaces import Spaces
from fwd.kernels.unpack import unpack

_OUTPUTS = 128  # outputs of a slab are a multiple of this, the width of the library's tiles, where there are as many
_THREADS = 128


class Prefill:
    """The ops of a prefill chunk over packed weights, bfloat16 [C, …]; nothing here waits for the device."""

    def __init__(self, launcher: Launcher, slab: int = UNPACKED_BYTES, spaces: Spaces | None = None) -> None:
        self._launcher, self._spaces = launcher, spaces or Spaces(launcher)
        self._scratch = launcher.empty((slab // 2,), torch.bfloat16)

    def qkv(self, hidden: Tensor, layer: QKV, rope: Tensor, rows: Rows, kv: KV) -> Tensor:
        """See `fwd.kernels.ops.Ops.qkv`."""
        fused = self._product(normed(hidden, layer.norm), layer.weight, layer.bias)
        return prefill_kv(self._launcher, fused, layer, rope, rows=rows, kv=kv)

    def attention(self, q: Tensor, rows: Rows, kv: KV, sinks: Tensor | None = None) -> Tensor:
        """See `fwd.kernels.ops.Ops.prefill_attention`."""
        return prefill_attention(self._launcher, q, rows, kv, sinks=sinks)

    def linear(self, x: Tensor, weight: QTensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `fwd.kernels.ops.Ops.linear`; `residual` is overwritten."""
        if bias is not None:
            residual.add_(bias)
        for outputs, matrix in self._slabs(weight):
            residual[:, outputs].addmm_(x, matrix.t())
        return residual

    def gate_up(self, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor:
        """See `fwd.kernels.ops.Ops.gate_up`."""
        gate, up = self._product(normed(hidden, norm), weight, None).chunk(2, dim=1)
        return F.silu(gate).mul_(up)

    def route(self, hidden: Tensor, router: Router, rows: Rows) -> Routed:
        """See `fwd.kernels.ops.ExpertOps.route`."""
        space = self._spaces.router(len(hidden), router)
        return expert_kernels.route(self._launcher, space, hidden, router, rows)

    def expert_gate_up(self, routed: Routed, experts: Experts) -> Active:
        """See `fwd.kernels.ops.ExpertOps.expert_gate_up`."""
        return expert_kernels.expert_gate_up(self._launcher, self._spaces.mixture(routed, experts), routed, experts)

    def expert_down(self, active: Active, routed: Routed, experts: Experts, residual: Tensor) -> Tensor:
        """See `fwd.kernels.ops.ExpertOps.expert_down`; `residual` is overwritten."""
        space = self._spaces.mixture(routed, experts)
        return expert_kernels.expert_down(self._launcher, space, active, routed, experts, residual=residual)

    def latent_qkv(self, hidden: Tensor, layer: Latents, rope: Tensor, rows: Rows, kv: LatentKV) -> Tensor:
        """See `fwd.kernels.ops.LatentOps.latent_qkv`."""
        x, heads = normed(hidden, layer.norm), len(layer.up_key)
        down = self._product(x, layer.down, None)  # [C, q_rank + latent + rope]
        if layer.q_norm is not None:
            x = normed(down[:, : layer.query.shape[1]], layer.q_norm)
        q = self._product(x, layer.query, None).view(len(x), heads, -1)
        return chunk_latents.latent_rows(self._launcher, down, q, layer, rope, rows=rows, kv=kv)

    def latent_attention(self, q: Tensor, layer: Latents, rows: Rows, kv: LatentKV) -> Tensor:
        """See `fwd.kernels.ops.LatentOps.prefill_latent_attention`."""
        space = self._spaces.latents(layer)
        return chunk_latents.prefill_latent_attention(self._launcher, space, q, layer, rows=rows, kv=kv)

    def _product(self, x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
        out = x.new_empty(len(x), weight.shape[0])
        for outputs, matrix in self._slabs(weight):
            if bias is None:
                torch.mm(x, matrix.t(), out=out[:, outputs])
            else:
                torch.addmm(bias[outputs], x, matrix.t(), out=out[:, outputs])
        return out

    def _slabs(self, weight: QTensor) -> Iterator[tuple[slice, Tensor]]:
        """The matrix part by part; the one before is overwritten."""
        outputs, inputs = weight.shape
        for part in slabs(outputs, inputs, self._scratch.numel(), packing.inputs_of(weight)):
            yield part, unpack(self._launcher, weight, part, self._scratch)


def slabs(outputs: int, inputs: int, numbers: int, block: int = packing.BLOCK) -> list[slice]:
    """Cut the outputs of a matrix [outputs, inputs] into parts of up to `numbers` weights, of like size."""
    most = numbers // (-(-inputs // block) * block)
    grain = _OUTPUTS if most >= _OUTPUTS else 8
    assert most >= grain, f"a slab of {numbers} numbers holds no {grain} outputs of {inputs} inputs"
    parts = -(-outputs // (most // grain * grain))
    each = -(-outputs // (parts * grain)) * grain
    return [slice(start, min(start + each, outputs)) for start in range(0, outputs, each)]


def prefill_kv(launcher: Launcher, fused: Tensor, layer: QKV, rope: Tensor, *, rows: Rows, kv: KV) -> Tensor:
    """Norm and rotate the heads of `fused` bfloat16 [C, (heads + 2·kv_heads)·head_dim]; write k and v; return q."""
    count, head_dim, kv_heads = len(fused), layer.head_dim, layer.kv_heads
    heads = fused.shape[1] // head_dim - 2 * kv_heads
    slots = rows.cells[kv.group].slots
    assert fused.dtype == torch.bfloat16, fused.dtype
    assert fused.is_contiguous(), fused.stride()
    assert rope.dtype == torch.float32, rope.dtype
    assert rope.shape[1:] == (2, head_dim // 2), tuple(rope.shape)
    assert kv.keys.shape[1:] == (kv_heads, head_dim), (tuple(kv.keys.shape), kv_heads, head_dim)
    assert len(slots) == len(rows.positions) == count, (len(slots), len(rows.positions), count)
    q = launcher.empty((count, heads, head_dim), torch.bfloat16)
    launcher.launch(
        Kernel("prefill_kv.cu", f"prefill_kv_{KV_DTYPES[kv.keys.dtype]}_{head_dim}"),
        (count, 1, 1),
        _THREADS,
        0,
        *(q, kv.keys, kv.values, kv.key_scales, kv.value_scales, fused),
        *(layer.q_norm.weight if layer.q_norm else None, layer.k_norm.weight if layer.k_norm else None),
        *(rope, rows.positions, slots, heads, kv_heads, len(rope)),
        *(layer.q_norm.eps if layer.q_norm else 0.0, layer.k_norm.eps if layer.k_norm else 0.0),
    )
    return q


def prefill_attention(launcher: Launcher, q: Tensor, rows: Rows, kv: KV, *, sinks: Tensor | None = None) -> Tensor:
    """See `fwd.kernels.ops.Ops.prefill_attention`: q bfloat16 [C, heads, head_dim]."""
    assert rows.chunk >= 0, "decode rows"
    check(q, kv, sinks)
    count, heads, head_dim = q.shape
    kv_heads, tables = kv.keys.shape[1], rows.cells[kv.group].tables
    assert len(rows.sequences) == count, (len(rows.sequences), count)
    assert tables.is_contiguous(), tables.stride()
    group = heads // kv_heads
    out = launcher.empty((count, heads * head_dim), torch.bfloat16)
    launcher.launch(
        Kernel("prefill.cu", f"prefill_attention_{KV_DTYPES[kv.keys.dtype]}_{head_dim}"),
        (-(-count * group // query_rows(head_dim)), kv_heads, 1),
        _THREADS,
        shared_bytes(head_dim, kv.keys.element_size()),
        *(out, q, kv.keys, kv.values, kv.key_scales, kv.value_scales, sinks, rows.sequences, tables),
        *(count, rows.chunk * count, group, kv_heads, tables.shape[1], kv.page_size, kv.window, head_dim**-0.5),
    )
    return out


def query_rows(head_dim: int) -> int:
    """Queries × heads of a block of the attention kernel, as in `cuda/prefill.cu`."""
    return 64 if head_dim == 256 else 128


def shared_bytes(head_dim: int, itemsize: int) -> int:
    """Bytes of shared memory of a block: two stages of keys and values, its queries; for fp8 also bf16 tiles."""
    keys, fp8 = 32 if head_dim == 256 else 64, itemsize == 1
    stage = 2 * keys * (head_dim * itemsize + 4 * fp8)
    return 2 * stage + query_rows(head_dim) * head_dim * 2 + 4 * keys * head_dim * fp8
