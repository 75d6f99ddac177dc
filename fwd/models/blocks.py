"""The halves of a block that families share: attention over keys and values, a plain MLP, a mixture of experts."""

from dataclasses import dataclass, replace

from torch import Tensor

from fwd.kernels.kv import KV
from fwd.kernels.ops import QKV, ExpertOps, Experts, Norm, Ops, Router
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import Rows
from fwd.models.weights import Weights

OUTPUT, SINKS = "self_attn.o_proj", "self_attn.sinks"
MLP_NORM = "post_attention_layernorm.weight"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """Attention over keys and values."""

    qkv: QKV
    output: QTensor  # [hidden, heads·head_dim]
    output_bias: Tensor | None
    sinks: Tensor | None  # float32 [heads]

    @classmethod
    def take(cls, weights: Weights, prefix: str) -> "Attention":
        """The attention of the layer at `prefix`."""
        spec, module = weights.spec, prefix + OUTPUT
        return cls(
            qkv=weights.qkv(prefix),
            output=weights.packed((module,), (spec.hidden,), spec.heads * spec.head_dim),
            output_bias=weights.bias((module,), (spec.hidden,)) if spec.output_bias else None,
            sinks=weights.wide(prefix + SINKS, spec.heads) if spec.sinks else None,
        )

    def run(self, ops: Ops, hidden: Tensor, rope: Tensor, rows: Rows, kv: KV) -> Tensor:
        """Return hidden + attention [rows, hidden]; hidden may be overwritten."""
        attend = ops.decode_attention if rows.chunk < 0 else ops.prefill_attention
        q = ops.qkv(hidden, self.qkv, rope, rows, kv)  # [rows, heads, head_dim]
        mixed = attend(q, rows, kv, self.sinks)  # [rows, heads·head_dim]
        return ops.linear(mixed, self.output, hidden, self.output_bias)


@dataclass(frozen=True, slots=True, eq=False)
class MLP:
    """The gated MLP of a dense layer."""

    norm: Norm
    gate_up: QTensor  # [2·intermediate, hidden]
    down: QTensor  # [hidden, intermediate]

    @classmethod
    def take(cls, weights: Weights, prefix: str) -> "MLP":
        """The MLP of the layer at `prefix`."""
        spec = weights.spec
        return cls(
            norm=weights.norm(prefix + MLP_NORM, spec.hidden),
            gate_up=weights.packed(weights.under(prefix, GATE_UP), (spec.intermediate,) * 2, spec.hidden),
            down=weights.packed((prefix + DOWN,), (spec.hidden,), spec.intermediate),
        )

    def run(self, ops: Ops, hidden: Tensor) -> Tensor:
        """Return hidden + MLP [rows, hidden]; hidden may be overwritten."""
        active = ops.gate_up(hidden, self.norm, self.gate_up)  # [rows, intermediate]
        return ops.linear(active, self.down, hidden)


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """A mixture of experts in an MLP's place."""

    router: Router
    experts: Experts

    def fetching(self, weight: QTensor) -> "Mixture":
        """The same, which has a weight of the next layer fetched while experts are chosen."""
        return replace(self, router=replace(self.router, ahead=weight))

    def run(self, ops: ExpertOps, hidden: Tensor, rows: Rows) -> Tensor:
        """Return hidden + what its experts make of each row [rows, hidden]; hidden may be overwritten."""
        routed = ops.route(hidden, self.router, rows)
        active = ops.expert_gate_up(routed, self.experts)
        return ops.expert_down(active, routed, self.experts, hidden)
