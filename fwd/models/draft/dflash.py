"""DFlash (arXiv 2602.06036): a block of masks is filled in at once, by layers whose context is features of the target.

Keys and values of known positions are made of fused features, in each layer by its own projections; rows of a block
see them and, where a layer is not causal, each other.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from fwd.kernels.kv import KVCache
from fwd.kernels.ops import QKV
from fwd.kernels.rows import Rows
from fwd.models.blocks import MLP, Attention
from fwd.models.checkpoint import Checkpoint
from fwd.models.draft.dflash_config import LAYERS, SINKS, DFlashSpec
from fwd.models.draft.shared import Base, Target, check, heads_of, quietly
from fwd.models.draft.tensors import is_unused
from fwd.models.rope import rope_table
from fwd.models.weights import Weights


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer; `context` makes keys and values of features as `attention` makes them of a block's rows."""

    attention: Attention
    context: QKV
    mlp: MLP
    causal: bool


class DFlash(Base[DFlashSpec]):
    """See `fwd.models.draft.model.DraftModel`; embedding and head are the target's."""

    def __init__(self, spec: DFlashSpec, target: Target, context: int) -> None:
        super().__init__(spec, target)
        self._embedding, self._head = target.embedding, target.head
        check(self._ops, spec, spec.body)
        with Checkpoint(spec.folder, quietly) as checkpoint:
            self._take(Weights(spec.body, self._ops, checkpoint, self.dtype))
            checkpoint.finish(is_unused)
            self.weights_hash = checkpoint.digest()
        self._rope = rope_table(spec.body.rope, spec.rotated, context).to(self._ops.device)

    def _take(self, weights: Weights) -> None:
        spec = self.spec
        self._fc = weights.packed(("fc",), (spec.hidden,), spec.features)
        self._norm, norm = (weights.norm(f"{name}.weight", spec.hidden) for name in ("norm", "hidden_norm"))
        self._layers: list[Layer] = []
        for index, causal in enumerate(spec.causal):
            attention = take_attention(weights, LAYERS.format(index))
            mlp = MLP.take(weights, LAYERS.format(index))
            self._layers.append(Layer(attention, replace(attention.qkv, norm=norm), mlp, causal))

    def fuse(self, features: Tensor) -> Tensor:  # noqa: D102
        return self.product(features, self._fc)

    def absorb(self, ids: Tensor, hidden: Tensor | None, rows: Rows, cache: KVCache) -> None:  # noqa: ARG002, D102
        assert hidden is not None, "it takes features"
        for layer, kv in zip(self._layers, heads_of(cache), strict=True):
            self._ops.qkv(hidden, layer.context, self._rope, rows, kv)  # its queries are nobody's

    def draft(self, ids: Tensor, ends: Tensor, rows: Rows, cache: KVCache) -> Tensor:  # noqa: D102
        hidden = self._ops.embed(ids, self._embedding)  # [rows, hidden]
        whole = replace(rows, positions=ends)  # so each row sees what the last of its block does
        for layer, kv in zip(self._layers, heads_of(cache), strict=True):
            own, attention = kv, layer.attention
            if kv.window and not layer.causal:  # the window of a block ends at its anchor
                own = replace(kv, window=kv.window + self.spec.block - 1)
            q = self._ops.qkv(hidden, attention.qkv, self._rope, rows, kv)  # [rows, heads, head_dim]
            mixed = self._ops.decode_attention(q, rows if layer.causal else whole, own, attention.sinks)
            hidden = self._ops.linear(mixed, attention.output, hidden, attention.output_bias)
            hidden = layer.mlp.run(self._ops, hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self._ops.head(hidden, self._norm, self._head)


def take_attention(weights: Weights, prefix: str) -> Attention:
    """The attention of the layer at `prefix`, whose sinks have a name of their own."""
    found = Attention.take(replace(weights, spec=replace(weights.spec, sinks=False)), prefix)
    if not weights.spec.sinks:
        return found
    return replace(found, sinks=weights.wide(prefix + SINKS, weights.spec.heads))
