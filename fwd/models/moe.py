"""Qwen3-MoE: the attention of Qwen3, and experts in most layers that a softmax over all of them chooses among."""

from dataclasses import dataclass, replace

from torch import Tensor

from fwd.kernels.kv import KV
from fwd.kernels.ops import ExpertOps, Experts, Router
from fwd.kernels.rows import Rows
from fwd.models.blocks import MLP, MLP_NORM, Attention, Mixture
from fwd.models.decoder import Decoder
from fwd.models.weights import Weights

ROUTER = "mlp.gate"
GATE_UP = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
DOWN = ("mlp.experts.{}.down_proj",)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The weights of one block."""

    attention: Attention
    mlp: MLP | Mixture


class Moe(Decoder[Layer, KV, ExpertOps]):
    """A decoder with experts."""

    def layer(self, weights: Weights, prefix: str, index: int) -> Layer:  # noqa: D102
        moe = weights.spec.moe
        mixed = moe is not None and index in moe.layers
        return Layer(Attention.take(weights, prefix), mixture(weights, prefix) if mixed else MLP.take(weights, prefix))

    def fetching(self, layer: Layer, after: Layer) -> Layer:  # noqa: D102
        mlp = layer.mlp
        return replace(layer, mlp=mlp.fetching(after.attention.qkv.weight)) if isinstance(mlp, Mixture) else layer

    def block(self, hidden: Tensor, layer: Layer, rows: Rows, kv: KV) -> Tensor:  # noqa: D102
        hidden = layer.attention.run(self.ops, hidden, self.rope, rows, kv)
        match layer.mlp:
            case Mixture() as mixture:
                return mixture.run(self.ops, hidden, rows)
            case MLP() as mlp:
                return mlp.run(self.ops, hidden)


def mixture(weights: Weights, prefix: str) -> Mixture:
    """The experts of the layer at `prefix`."""
    spec, moe = weights.spec, weights.spec.moe
    assert moe is not None, "a layer of experts"
    router = Router(
        norm=weights.norm(prefix + MLP_NORM, spec.hidden),
        weight=weights.router(prefix + ROUTER, moe.experts),
        bias=None,
        correction=None,
        scoring=moe.scoring,
        top_k=moe.top_k,
        normalize=moe.normalize,
        scale=moe.scale,
    )
    gate_up = weights.experts(weights.under(prefix, GATE_UP), (moe.intermediate,) * 2, spec.hidden)
    down = weights.experts(weights.under(prefix, DOWN), (spec.hidden,), moe.intermediate)
    return Mixture(router, Experts(gate_up, None, down, None))
