"""gpt-oss: attention with sinks, every second layer within a window, and experts with biases and a clamped SwiGLU."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fwd.kernels.kv import KV
from fwd.kernels.ops import ExpertOps, Experts, Router
from fwd.kernels.rows import Rows
from fwd.models.blocks import MLP_NORM, Attention, Mixture
from fwd.models.decoder import Decoder
from fwd.models.weights import Weights

ROUTER = "mlp.router"
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"  # rows of the first: gate, up, gate, up, …


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The weights of one block."""

    attention: Attention
    mixture: Mixture


class GptOss(Decoder[Layer, KV, ExpertOps]):
    """A decoder with sinks and experts."""

    def layer(self, weights: Weights, prefix: str, index: int) -> Layer:  # noqa: ARG002, D102
        return Layer(Attention.take(weights, prefix), Mixture(router(weights, prefix), experts(weights, prefix)))

    def fetching(self, layer: Layer, after: Layer) -> Layer:  # noqa: D102
        return replace(layer, mixture=layer.mixture.fetching(after.attention.qkv.weight))

    def block(self, hidden: Tensor, layer: Layer, rows: Rows, kv: KV) -> Tensor:  # noqa: D102
        hidden = layer.attention.run(self.ops, hidden, self.rope, rows, kv)
        return layer.mixture.run(self.ops, hidden, rows)


def router(weights: Weights, prefix: str) -> Router:
    """The router of the layer at `prefix`."""
    spec, moe = weights.spec, weights.spec.moe
    assert moe is not None, "all layers have experts"
    return Router(
        norm=weights.norm(prefix + MLP_NORM, spec.hidden),
        weight=weights.router(prefix + ROUTER, moe.experts),
        bias=weights.wide(f"{prefix}{ROUTER}.bias", moe.experts),
        correction=None,
        scoring=moe.scoring,
        top_k=moe.top_k,
    )


def experts(weights: Weights, prefix: str) -> Experts:
    """The experts of the layer at `prefix`, their rows in order: gate, then up."""
    spec, moe = weights.spec, weights.spec.moe
    assert moe is not None, "all layers have experts"
    order = gate_then_up(2 * moe.intermediate)
    gate_up_bias = weights.wide(f"{prefix}{GATE_UP}_bias", moe.experts, 2 * moe.intermediate)
    return Experts(
        gate_up=weights.stacked(prefix + GATE_UP, order, spec.hidden),
        gate_up_bias=gate_up_bias[:, order],
        down=weights.stacked(prefix + DOWN, torch.arange(spec.hidden), moe.intermediate),
        down_bias=weights.wide(f"{prefix}{DOWN}_bias", moe.experts, spec.hidden),
        activation="clamped",
    )


def gate_then_up(rows: int) -> Tensor:
    """The rows of a gate_up in order: 0, 2, 4, …, 1, 3, 5, …."""
    return torch.arange(rows).view(-1, 2).t().flatten()
