"""Takes the tensors of a checkpoint for a family, fused and placed as its ops want them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fwd.errors import ModelError
from fwd.kernels.ops import QKV, ExpertOps, Norm, Ops
from fwd.kernels.qtensor import QTensor
from fwd.kernels.requantize import to_fp8
from fwd.models import formats
from fwd.models.source import Source
from fwd.models.spec import HEAD, ModelSpec

INPUT_NORM = "input_layernorm.weight"
QKV_PROJ = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
Q_NORM, K_NORM = "self_attn.q_norm.weight", "self_attn.k_norm.weight"


@dataclass(frozen=True, slots=True)
class Weights:
    """Names are modules (`…mlp.up_proj`) for matrices and tensors (`….weight`) for vectors, behind `spec.prefix`."""

    spec: ModelSpec
    ops: Ops
    checkpoint: Source
    dtype: torch.dtype

    def under(self, prefix: str, names: Sequence[str]) -> tuple[str, ...]:
        """The full names."""
        return tuple(prefix + name for name in names)

    def qkv(self, prefix: str) -> QKV:
        """The attention input of the layer at `prefix`, by the names that most families share."""
        spec = self.spec
        widths = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim)
        modules = self.under(prefix, QKV_PROJ)
        return QKV(
            norm=self.norm(prefix + INPUT_NORM, spec.hidden),
            weight=self.packed(modules, widths, spec.hidden),
            bias=self.bias(modules, widths) if spec.qkv_bias else None,
            q_norm=self.norm(prefix + Q_NORM, spec.head_dim) if spec.qk_norm else None,
            k_norm=self.norm(prefix + K_NORM, spec.head_dim) if spec.qk_norm else None,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
        )

    def norm(self, name: str, width: int) -> Norm:
        """An RMSNorm with the model's epsilon."""
        return Norm(self.vector((name,), (width,)), self.spec.eps)

    def bias(self, modules: Sequence[str], widths: Sequence[int]) -> Tensor:
        """The biases of modules, one after the other."""
        return self.vector([f"{module}.bias" for module in modules], widths)

    def vector(self, names: Sequence[str], widths: Sequence[int]) -> Tensor:
        """Vectors one after the other, in the model's dtype."""
        full = self.under(self.spec.prefix, names)
        return self.checkpoint.take(full, [(width,) for width in widths], self.dtype).to(self.ops.device)

    def wide(self, name: str, *shape: int) -> Tensor:
        """A tensor in float32, whatever the model's dtype."""
        (full,) = self.under(self.spec.prefix, (name,))
        return self.checkpoint.take((full,), (shape,), torch.float32).to(self.ops.device)

    def packed(self, modules: Sequence[str], outputs: Sequence[int], inputs: int) -> QTensor:
        """The matrices of modules one above the other, in the order that the ops stream them."""
        return self.ops.pack(self.matrix(modules, outputs, inputs))

    def router(self, module: str, experts: int) -> QTensor:
        """The matrix of a router, as the ops stream it."""
        return self._mixed.pack_router(self.matrix((module,), (experts,), self.spec.hidden))

    def shared(self, modules: Sequence[str], outputs: Sequence[int], inputs: int) -> QTensor:
        """The matrices of the expert that all rows visit one above the other, as the ops stream them."""
        return self._mixed.pack_experts(self.matrix(modules, outputs, inputs))

    def matrix(self, modules: Sequence[str], outputs: Sequence[int], inputs: int) -> QTensor:
        """The matrices of modules one above the other; quantised ones stay as they are."""
        full = self.under(self.spec.prefix, modules)
        if (found := formats.linear(self.checkpoint, self.spec.quantization, full, outputs, inputs)) is None:
            names = [f"{module}.weight" for module in full]
            taken = self.checkpoint.take(names, [(width, inputs) for width in outputs], self.dtype)
            found = QTensor.plain(taken)
        found = found.to(self.ops.device)
        return to_fp8(found) if found.scales is None and self.spec.requantised(modules[0]) else found

    def head(self, embedding: QTensor | None) -> QTensor:
        """The matrix of the head, which may be the embedding."""
        if embedding is None:
            return self.matrix((HEAD,), (self.spec.vocab,), self.spec.hidden)
        return embedding if self.spec.shares else to_fp8(embedding)

    def table(self, module: str, lines: int, width: int) -> QTensor:
        """A matrix of which lines are taken, not products: it is plain."""
        (full,) = self.under(self.spec.prefix, (module,))
        if (stored := self.spec.quantization.format_of(full)) is not None:
            raise ModelError(
                f"{self.checkpoint.folder}: {full} is {stored.format}: only plain embeddings are supported"
            )
        return self.matrix((module,), (lines,), width)

    def experts(self, modules: Sequence[str], outputs: Sequence[int], inputs: int) -> QTensor:
        """The matrices of all experts of a layer, as the ops stream them; of each expert one above the other.

        Modules have {} for its number; all of an expert's have as many outputs.
        """
        assert self.spec.moe is not None, "the model has experts"
        each = range(self.spec.moe.experts)
        full = [self.under(self.spec.prefix, [module.format(expert) for module in modules]) for expert in each]
        if (found := formats.experts(self.checkpoint, self.spec.quantization, full, outputs[0], inputs)) is None:
            names = [f"{module}.weight" for own in full for module in own]
            taken = self.checkpoint.take(names, [(width, inputs) for width in outputs] * len(each), self.dtype)
            found = QTensor.plain(taken.view(len(each), sum(outputs), inputs))
        return self._mixed.pack_experts(found.to(self.ops.device))

    def stacked(self, module: str, order: Tensor, inputs: int) -> QTensor:
        """The matrices of all experts of a layer, which stand in one tensor: [experts, inputs, outputs] where plain.

        Their outputs come in an `order` of the tensor's, int64 [outputs].
        """
        assert self.spec.moe is not None, "the model has experts"
        (full,), count = self.under(self.spec.prefix, (module,)), self.spec.moe.experts
        shape = (count, len(order), inputs)
        found = formats.stacked(self.checkpoint, self.spec.quantization, full, shape, order)
        if found is None:
            taken = self.checkpoint.take((full,), ((count, inputs, len(order)),), self.dtype)
            found = QTensor.plain(_turned(taken, order))
        return self._mixed.pack_experts(found.to(self.ops.device))

    @property
    def _mixed(self) -> ExpertOps:
        """The ops, which take experts: `kernels.device.check` has seen to it."""
        return cast("ExpertOps", self.ops)


def _turned(experts: Tensor, order: Tensor) -> Tensor:
    """Return [experts, inputs, outputs] as [experts, outputs, inputs] in place, since a layer of them is gigabytes."""
    turned = experts.view(len(experts), len(order), -1)
    for into, one in zip(turned, experts, strict=True):
        into.copy_(one.t()[order])
    return turned
