"""A prefill chunk by the reference, over weights that stand as kernels stream them: how `--device host` prefills."""

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from fwd.kernels import packing
from fwd.kernels.kv import KV
from fwd.kernels.ops import QKV, Norm
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import Reference
from fwd.kernels.rows import Rows


class Chunks(Protocol):
    """The ops of a prefill chunk over packed weights; see `fwd.kernels.ops.Ops`."""

    def qkv(self, hidden: Tensor, layer: QKV, rope: Tensor, rows: Rows, kv: KV) -> Tensor: ...  # noqa: D102
    def attention(self, q: Tensor, rows: Rows, kv: KV, sinks: Tensor | None = None) -> Tensor: ...  # noqa: D102
    def linear(self, x: Tensor, weight: QTensor, residual: Tensor, bias: Tensor | None = None) -> Tensor: ...  # noqa: D102
    def gate_up(self, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor: ...  # noqa: D102


class ReferenceChunks:
    """The reference: weights in bfloat16 are put in rows for each product, others slab by slab in float32."""

    def __init__(self) -> None:
        self._reference = Reference()

    def qkv(self, hidden: Tensor, layer: QKV, rope: Tensor, rows: Rows, kv: KV) -> Tensor:  # noqa: D102
        return self._reference.qkv(hidden, replace(layer, weight=self._plain(layer.weight)), rope, rows, kv)

    def attention(self, q: Tensor, rows: Rows, kv: KV, sinks: Tensor | None = None) -> Tensor:  # noqa: D102
        return self._reference.prefill_attention(q, rows, kv, sinks)

    def linear(self, x: Tensor, weight: QTensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: D102
        return self._reference.linear(x, self._plain(weight), residual, bias)

    def gate_up(self, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor:  # noqa: D102
        return self._reference.gate_up(hidden, norm, self._plain(weight))

    def _plain(self, weight: QTensor) -> QTensor:
        return self._reference.pack(packing.restore(weight)) if weight.format == "bf16" else weight
