"""The dense family: Llama 3.x, Qwen2.5, Qwen3 — one decoder block with optional q, k, v bias and qk-norm."""

from dataclasses import dataclass

from torch import Tensor

from fwd.kernels.kv import KV
from fwd.kernels.ops import QKV, Norm, Ops
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import Rows
from fwd.models.decoder import Decoder
from fwd.models.weights import Weights

OUTPUT = "self_attn.o_proj"
MLP_NORM = "post_attention_layernorm.weight"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The weights of one block."""

    qkv: QKV
    output: QTensor  # [hidden, heads·head_dim]
    output_bias: Tensor | None
    norm: Norm
    gate_up: QTensor  # [2·intermediate, hidden]
    down: QTensor  # [hidden, intermediate]


class Dense(Decoder[Layer, KV, Ops]):
    """A dense decoder."""

    def layer(self, weights: Weights, prefix: str, index: int) -> Layer:  # noqa: ARG002, D102
        spec = weights.spec
        return Layer(
            qkv=weights.qkv(prefix),
            output=weights.packed((prefix + OUTPUT,), (spec.hidden,), spec.heads * spec.head_dim),
            output_bias=weights.bias((prefix + OUTPUT,), (spec.hidden,)) if spec.output_bias else None,
            norm=weights.norm(prefix + MLP_NORM, spec.hidden),
            gate_up=weights.packed(weights.under(prefix, GATE_UP), (spec.intermediate,) * 2, spec.hidden),
            down=weights.packed((prefix + DOWN,), (spec.hidden,), spec.intermediate),
        )

    def block(self, hidden: Tensor, layer: Layer, rows: Rows, kv: KV) -> Tensor:  # noqa: D102
        ops = self.ops
        attend = ops.decode_attention if rows.chunk < 0 else ops.prefill_attention
        q = ops.qkv(hidden, layer.qkv, self.rope, rows, kv)  # [rows, heads, head_dim]
        mixed = attend(q, rows, kv)  # [rows, heads·head_dim]
        hidden = ops.linear(mixed, layer.output, hidden, layer.output_bias)
        active = ops.gate_up(hidden, layer.norm, layer.gate_up)  # [rows, intermediate]
        return ops.linear(active, layer.down, hidden)
