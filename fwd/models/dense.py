"""The dense family: Llama 3.x, Qwen2.5, Qwen3 — one decoder block with optional q, k, v bias and qk-norm."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.kernels.ops import QKV, KVCache, Norm, Ops, Rows
from fwd.kernels.qtensor import QTensor
from fwd.models import cache as caches
from fwd.models.formats import Checkpoint
from fwd.models.layout import KVFormat
from fwd.models.rope import rope_table
from fwd.models.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
LAST_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
LAYER = "model.layers.{}."
INPUT_NORM = "input_layernorm.weight"
QKV_WEIGHT = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
QKV_BIAS = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
Q_NORM, K_NORM = "self_attn.q_norm.weight", "self_attn.k_norm.weight"
OUTPUT, OUTPUT_BIAS = "self_attn.o_proj.weight", "self_attn.o_proj.bias"
MLP_NORM = "post_attention_layernorm.weight"
GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
DOWN = "mlp.down_proj.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The weights of one block."""

    qkv: QKV
    output: QTensor  # [hidden, heads·head_dim]
    output_bias: Tensor | None
    norm: Norm
    gate_up: QTensor  # [2·intermediate, hidden]
    down: QTensor  # [hidden, intermediate]


class Dense:
    """A dense decoder; see `fwd.models.model.Model` for the methods' contract."""

    def __init__(self, spec: ModelSpec, ops: Ops, dtype: torch.dtype, checkpoint: Checkpoint, context: int) -> None:
        self.spec, self.ops, self.dtype = spec, ops, dtype
        weights = _Weights(spec, ops, checkpoint, dtype)
        embedding = weights.matrix((EMBEDDING,), (spec.vocab,), spec.hidden)
        self.layers = [weights.layer(LAYER.format(index)) for index in range(spec.layers)]
        self.last_norm = weights.norm(LAST_NORM, spec.hidden)
        self.head = ops.pack_head(embedding if spec.tied else weights.matrix((HEAD,), (spec.vocab,), spec.hidden))
        self.embedding = self.head if spec.tied and self.head.packed else embedding
        self.rope = rope_table(spec.rope, spec.head_dim, context).to(ops.device)
        checkpoint.finish(lambda name: name.endswith("rotary_emb.inv_freq") or (spec.tied and name == HEAD))
        self.weights_hash = checkpoint.digest()

    def new_cache(self, units: Sequence[int], page_size: int, kv: KVFormat) -> KVCache:
        """Return an empty cache of `units[g]` pages for each group g."""
        return caches.new_cache(self.spec.cache, units, page_size, kv, self.ops.device)

    @torch.inference_mode()
    def forward(self, ids: Tensor, rows: Rows, cache: KVCache) -> Tensor:
        """Return hidden [rows, hidden]."""
        ops, count, rows = self.ops, len(ids), rows.padded(self.ops.row_block)
        attend = ops.decode_attention if rows.chunk < 0 else ops.prefill_attention
        hidden = ops.embed(_padded(ids, len(rows.positions)), self.embedding)  # [rows, hidden]
        for layer, kv in zip(self.layers, cache.layers, strict=True):
            q = ops.qkv(hidden, layer.qkv, self.rope, rows, kv)  # [rows, heads, head_dim]
            mixed = attend(q, rows, kv)  # [rows, heads·head_dim]
            hidden = ops.linear(mixed, layer.output, hidden, layer.output_bias)
            active = ops.gate_up(hidden, layer.norm, layer.gate_up)  # [rows, intermediate]
            hidden = ops.linear(active, layer.down, hidden)
        return hidden[:count]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits float32 [rows, vocab]."""
        padded = _padded(hidden, len(hidden) + -len(hidden) % self.ops.row_block)
        return self.ops.head(padded, self.last_norm, self.head)[: len(hidden)]


@dataclass(frozen=True, slots=True)
class _Weights:
    """Takes the tensors of a checkpoint, fused as the ops want them."""

    spec: ModelSpec
    ops: Ops
    checkpoint: Checkpoint
    dtype: torch.dtype

    def layer(self, prefix: str) -> Layer:
        spec = self.spec
        return Layer(
            qkv=self.qkv(prefix),
            output=self.packed((prefix + OUTPUT,), (spec.hidden,), spec.heads * spec.head_dim),
            output_bias=self.vector((prefix + OUTPUT_BIAS,), (spec.hidden,)) if spec.output_bias else None,
            norm=self.norm(prefix + MLP_NORM, spec.hidden),
            gate_up=self.packed(_under(prefix, GATE_UP), (spec.intermediate,) * 2, spec.hidden),
            down=self.packed((prefix + DOWN,), (spec.hidden,), spec.intermediate),
        )

    def qkv(self, prefix: str) -> QKV:
        spec = self.spec
        widths = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim)
        return QKV(
            norm=self.norm(prefix + INPUT_NORM, spec.hidden),
            weight=self.packed(_under(prefix, QKV_WEIGHT), widths, spec.hidden),
            bias=self.vector(_under(prefix, QKV_BIAS), widths) if spec.qkv_bias else None,
            q_norm=self.norm(prefix + Q_NORM, spec.head_dim) if spec.qk_norm else None,
            k_norm=self.norm(prefix + K_NORM, spec.head_dim) if spec.qk_norm else None,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
        )

    def norm(self, name: str, width: int) -> Norm:
        return Norm(self.vector((name,), (width,)), self.spec.eps)

    def vector(self, names: tuple[str, ...], widths: tuple[int, ...]) -> Tensor:
        return self.checkpoint.take(names, [(width,) for width in widths], self.dtype).to(self.ops.device)

    def packed(self, names: tuple[str, ...], outputs: tuple[int, ...], inputs: int) -> QTensor:
        return self.ops.pack(self.matrix(names, outputs, inputs))

    def matrix(self, names: tuple[str, ...], outputs: tuple[int, ...], inputs: int) -> QTensor:
        taken = self.checkpoint.take(names, [(width, inputs) for width in outputs], self.dtype)
        return QTensor.plain(taken.to(self.ops.device))


def _under(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(prefix + name for name in names)


def _padded(rows: Tensor, count: int) -> Tensor:
    """`rows` and zeros after them; themselves where there are enough, for a step that is captured launches no more."""
    extra = count - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, extra)) if extra else rows
