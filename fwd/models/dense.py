"""The dense family: Llama 3.x, Mistral, Qwen2.5, Qwen3 — one decoder block with optional q, k, v bias and qk-norm."""

from dataclasses import dataclass

from torch import Tensor

from fwd.kernels.kv import KV
from fwd.kernels.ops import Ops
from fwd.kernels.rows import Rows
from fwd.models.blocks import MLP, Attention
from fwd.models.decoder import Decoder
from fwd.models.weights import Weights


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The weights of one block."""

    attention: Attention
    mlp: MLP


class Dense(Decoder[Layer, KV, Ops]):
    """A dense decoder; the names of its tensors are those of `fwd.models.weights` and `fwd.models.blocks`."""

    def layer(self, weights: Weights, prefix: str, index: int) -> Layer:  # noqa: ARG002, D102
        return Layer(Attention.take(weights, prefix), MLP.take(weights, prefix))

    def block(self, hidden: Tensor, layer: Layer, rows: Rows, kv: KV) -> Tensor:  # noqa: D102
        hidden = layer.attention.run(self.ops, hidden, self.rope, rows, kv)
        return layer.mlp.run(self.ops, hidden)
