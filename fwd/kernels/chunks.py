"""A prefill chunk by the reference, over weights that stand as kernels stream them: how `--device host` prefills."""

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from fwd.kernels import packing
from fwd.kernels.kv import KV, LatentKV
from fwd.kernels.ops import QKV, Active, Experts, Latents, Norm, Routed, Router
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import Reference
from fwd.kernels.rows import Rows


class Chunks(Protocol):
    """The ops of a prefill chunk over packed weights; see `fwd.kernels.ops`."""

    def qkv(self, hidden: Tensor, layer: QKV, rope: Tensor, rows: Rows, kv: KV) -> Tensor: ...  # noqa: D102
    def attention(self, q: Tensor, rows: Rows, kv: KV, sinks: Tensor | None = None) -> Tensor: ...  # noqa: D102
    def linear(self, x: Tensor, weight: QTensor, residual: Tensor, bias: Tensor | None = None) -> Tensor: ...  # noqa: D102
    def gate_up(self, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor: ...  # noqa: D102
    def route(self, hidden: Tensor, router: Router, rows: Rows) -> Routed: ...  # noqa: D102
    def expert_gate_up(self, routed: Routed, experts: Experts) -> Active: ...  # noqa: D102
    def expert_down(self, active: Active, routed: Routed, experts: Experts, residual: Tensor) -> Tensor: ...  # noqa: D102
    def latent_qkv(self, hidden: Tensor, layer: Latents, rope: Tensor, rows: Rows, kv: LatentKV) -> Tensor: ...  # noqa: D102
    def latent_attention(self, q: Tensor, layer: Latents, rows: Rows, kv: LatentKV) -> Tensor: ...  # noqa: D102


class ReferenceChunks:
    """The reference: matrices in bfloat16 are put in rows for each product, others become float32 slab by slab."""

    def __init__(self) -> None:
        self._reference = Reference()
        self.route = self._reference.route
        self.expert_gate_up = self._reference.expert_gate_up
        self.expert_down = self._reference.expert_down
        self.attention = self._reference.prefill_attention
        self.latent_attention = self._reference.prefill_latent_attention

    def qkv(self, hidden: Tensor, layer: QKV, rope: Tensor, rows: Rows, kv: KV) -> Tensor:  # noqa: D102
        return self._reference.qkv(hidden, replace(layer, weight=self._plain(layer.weight)), rope, rows, kv)

    def linear(self, x: Tensor, weight: QTensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: D102
        return self._reference.linear(x, self._plain(weight), residual, bias)

    def gate_up(self, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor:  # noqa: D102
        return self._reference.gate_up(hidden, norm, self._plain(weight))

    def latent_qkv(self, hidden: Tensor, layer: Latents, rope: Tensor, rows: Rows, kv: LatentKV) -> Tensor:  # noqa: D102
        plain = replace(layer, down=self._plain(layer.down), query=self._plain(layer.query))
        return self._reference.latent_qkv(hidden, plain, rope, rows, kv)

    def _plain(self, weight: QTensor) -> QTensor:
        return self._reference.pack(packing.restore(weight)) if weight.format == "bf16" else weight
