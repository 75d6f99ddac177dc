"""DeepSeek-V3, Kimi K2.5's text model and GLM-4.7-Flash: attention over latents (MLA, DeepSeek-V2 2024), then experts.

Dense layers have the MLP of `fwd.models.blocks`, others the experts of `fwd.models.moe` and some that all rows visit.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fwd.kernels.kv import LatentKV
from fwd.kernels.ops import LatentOps, Latents, Norm
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import Rows
from fwd.models import moe
from fwd.models.blocks import MLP, OUTPUT, Mixture
from fwd.models.decoder import Decoder
from fwd.models.spec import LatentSpec
from fwd.models.weights import INPUT_NORM, Weights

QUERY = "self_attn.q_proj"  # where there is no query latent
QUERY_DOWN, QUERY_NORM, QUERY_UP = "self_attn.q_a_proj", "self_attn.q_a_layernorm.weight", "self_attn.q_b_proj"
DOWN, NORM = "self_attn.kv_a_proj_with_mqa", "self_attn.kv_a_layernorm.weight"  # of latent, then rotated key
UP = "self_attn.kv_b_proj"  # a head's keys, then its values
CORRECTION = "mlp.gate.e_score_correction_bias"
SHARED_GATE_UP = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
SHARED_DOWN = "mlp.shared_experts.down_proj"
EPS = 1e-6  # of the norms of latents, whatever the config's: as these models were trained


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The weights of one block."""

    latents: Latents
    output: QTensor  # [hidden, heads·value]
    mlp: MLP | Mixture


class DeepSeek(Decoder[Layer, LatentKV, LatentOps]):
    """A decoder that keeps latents."""

    def layer(self, weights: Weights, prefix: str, index: int) -> Layer:  # noqa: D102
        spec, mla = weights.spec, _mla(weights)
        mixed = spec.moe is not None and index in spec.moe.layers
        return Layer(
            latents=latents(weights, prefix),
            output=weights.packed((prefix + OUTPUT,), (spec.hidden,), spec.heads * mla.value),
            mlp=mixture(weights, prefix) if mixed else MLP.take(weights, prefix),
        )

    def fetching(self, layer: Layer, after: Layer) -> Layer:  # noqa: D102
        mlp = layer.mlp
        return replace(layer, mlp=mlp.fetching(after.latents.down)) if isinstance(mlp, Mixture) else layer

    def block(self, hidden: Tensor, layer: Layer, rows: Rows, kv: LatentKV) -> Tensor:  # noqa: D102
        ops = self.ops
        attend = ops.decode_latent_attention if rows.chunk < 0 else ops.prefill_latent_attention
        q = ops.latent_qkv(hidden, layer.latents, self.rope, rows, kv)  # [rows, heads, nope + rope]
        mixed = attend(q, layer.latents, rows, kv)  # [rows, heads·value]
        hidden = ops.linear(mixed, layer.output, hidden)
        match layer.mlp:
            case Mixture() as mixture:
                return mixture.run(ops, hidden, rows)
            case MLP() as mlp:
                return mlp.run(ops, hidden)


def latents(weights: Weights, prefix: str) -> Latents:
    """The attention input of the layer at `prefix`; rows of rotated parts in half pairing."""
    spec, mla = weights.spec, _mla(weights)
    head, widths = mla.nope + mla.rope, (mla.q_rank, mla.latent + mla.rope)
    modules = weights.under(prefix, (QUERY_DOWN, DOWN) if mla.q_rank else (DOWN,))
    down = weights.matrix(modules, widths[-len(modules) :], spec.hidden)
    query = weights.matrix(
        (prefix + (QUERY_UP if mla.q_rank else QUERY),), (spec.heads * head,), mla.q_rank or spec.hidden
    )
    up_key, up_value = ups(weights, prefix)
    return Latents(
        norm=weights.norm(prefix + INPUT_NORM, spec.hidden),
        down=weights.ops.pack(paired(down, 1, mla)),
        q_norm=Norm(weights.vector((prefix + QUERY_NORM,), (mla.q_rank,)), EPS) if mla.q_rank else None,
        query=weights.ops.pack(paired(query, spec.heads, mla)),
        kv_norm=Norm(weights.vector((prefix + NORM,), (mla.latent,)), EPS),
        up_key=up_key,
        up_value=up_value,
        rope=mla.rope,
        scale=mla.scale,
    )


def ups(weights: Weights, prefix: str) -> tuple[Tensor, Tensor]:
    """The two parts of each head's way up, [heads, nope, latent] and [heads, value, latent], in the model's dtype."""
    spec, mla = weights.spec, _mla(weights)
    up = weights.matrix((prefix + UP,), (spec.heads * (mla.nope + mla.value),), mla.latent).dequantize()
    by_head = up.view(spec.heads, -1, mla.latent).to(weights.dtype)
    return by_head[:, : mla.nope].contiguous(), by_head[:, mla.nope :].contiguous()


def paired(matrix: QTensor, heads: int, mla: LatentSpec) -> QTensor:
    """Each of `heads` equal parts with its last `rope` rows in half pairing's order: the even ones, then the odd."""
    if not mla.interleaved:
        return matrix
    order = torch.arange(matrix.shape[0]).view(heads, -1)
    order[:, -mla.rope :] = order[:, -mla.rope :].reshape(heads, -1, 2).transpose(1, 2).flatten(1)
    return matrix.rows(order.flatten())


def mixture(weights: Weights, prefix: str) -> Mixture:
    """The experts of the layer at `prefix`, those that every row visits as one."""
    spec, experts = weights.spec, weights.spec.moe
    assert experts is not None, "a layer of experts"
    plain, shared = moe.mixture(weights, prefix), experts.shared
    router = replace(
        plain.router,
        correction=weights.wide(prefix + CORRECTION, experts.experts),
        groups=experts.groups,
        top_groups=experts.top_groups,
    )
    if not shared:
        return Mixture(router, plain.experts)
    gate_up = weights.shared(weights.under(prefix, SHARED_GATE_UP), (shared, shared), spec.hidden)
    down = weights.shared((prefix + SHARED_DOWN,), (spec.hidden,), shared)
    return Mixture(router, replace(plain.experts, shared_gate_up=gate_up, shared_down=down))


def _mla(weights: Weights) -> LatentSpec:
    assert weights.spec.mla is not None, "a model that keeps latents"
    return weights.spec.mla
