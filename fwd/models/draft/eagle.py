"""EAGLE-3 (Li et al. 2025): features of three blocks of the target, fused, and a layer that takes them with a token.

The first layer's attention takes [input_layernorm(embedding of t_{p+1}); hidden_norm(h_p)] and adds to h_p; h_p is the
fused feature, or what came out of the last layer for the row before.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.errors import ModelError
from fwd.kernels.kv import KV, KVCache
from fwd.kernels.ops import QKV, Norm, Ops
from fwd.kernels.qtensor import QTensor
from fwd.kernels.reference import normed
from fwd.kernels.rows import Rows
from fwd.models.blocks import MLP, OUTPUT, Attention
from fwd.models.checkpoint import Checkpoint
from fwd.models.draft.costs import FILL
from fwd.models.draft.eagle_config import EagleSpec
from fwd.models.draft.model import ABSENT
from fwd.models.draft.shared import Base, Target, check, heads_of, quietly
from fwd.models.draft.tensors import is_unused
from fwd.models.rope import rope_table
from fwd.models.source import Source
from fwd.models.weights import INPUT_NORM, K_NORM, Q_NORM, QKV_PROJ, Weights

HIDDEN_NORM = "hidden_norm.weight"


@dataclass(frozen=True, slots=True, eq=False)
class First:
    """The first layer, whose attention takes two rows as one (`joined`)."""

    hidden_norm: Norm
    attention: Attention
    mlp: MLP


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """Another one."""

    attention: Attention
    mlp: MLP


class Eagle(Base[EagleSpec]):
    """See `fwd.models.draft.model.DraftModel`."""

    def __init__(self, spec: EagleSpec, target: Target, context: int) -> None:
        super().__init__(spec, target)
        check(self._ops, spec, replace(spec.body, vocab=spec.vocab))
        with Checkpoint(spec.folder, quietly) as checkpoint:
            weights = Weights(spec.body, self._ops, checkpoint, self.dtype)
            self._take(weights, target)
            self._targets = _targets(checkpoint, spec, target.spec.vocab, self._ops) if spec.mapped else None
            checkpoint.finish(is_unused)
            self.weights_hash = checkpoint.digest()
        self._target_vocab = target.spec.vocab
        self._rope = rope_table(spec.body.rope, spec.rotated, context).to(self._ops.device)

    def _take(self, weights: Weights, target: Target) -> None:
        spec, width = self.spec, self.spec.hidden
        self._fc = weights.packed(("fc",), (width,), spec.features)
        self._input_norm = weights.norm("input_norm.weight", spec.features) if spec.norm_before_fc else None
        names = [f"fc_norm.{index}.weight" for index in range(len(spec.taps) * spec.fc_norm)]
        self._feature_norms = [weights.norm(name, target.spec.hidden) for name in names]
        self._first = take_first(weights, spec.first)
        self._rest = [take_layer(weights, spec.prefix(index)) for index in range(1, spec.body.layers)]
        self._norm = weights.norm("norm.weight", width)
        self._embedding: QTensor = target.embedding
        if spec.own_embedding:
            self._embedding = weights.table("embed_tokens", target.spec.vocab, width)
        self._head: QTensor = target.head
        if spec.own_head:
            self._head = self._ops.pack_head(weights.matrix(("lm_head",), (spec.vocab,), width))
        self._ones = Norm(torch.ones_like(self._norm.weight), spec.body.eps) if spec.norm_output else None

    def fuse(self, features: Tensor) -> Tensor:  # noqa: D102
        if self._input_norm is not None:
            features = normed(features, self._input_norm)
        if self._feature_norms:
            parts = features.chunk(len(self._feature_norms), dim=1)
            features = torch.cat([normed(*each) for each in zip(parts, self._feature_norms, strict=True)], dim=1)
        return self.product(features, self._fc)

    def forward(self, ids: Tensor, hidden: Tensor | None, rows: Rows, cache: KVCache) -> Tensor:  # noqa: D102
        assert hidden is not None, "it takes features"
        first, (kv, *others) = self._first, heads_of(cache)
        both = joined(self._ops.embed(ids, self._embedding), hidden, self.spec.body.eps)
        residual = normed(hidden, first.hidden_norm) if self.spec.norm_before_residual else hidden
        hidden = first.mlp.run(self._ops, self._attend(first.attention, both, residual, rows, kv))
        for layer, cells in zip(self._rest, others, strict=True):
            hidden = layer.mlp.run(self._ops, self._attend(layer.attention, hidden, hidden, rows, cells))
        return normed(hidden, self._norm) if self.spec.norm_output else hidden

    def logits(self, hidden: Tensor) -> Tensor:  # noqa: D102
        if self._ones:  # the head's norm only scales a row that is normed already: back to its length
            length = hidden.float().square().mean(dim=1, keepdim=True).add_(self._ones.eps).sqrt_()
            found = self._ops.head(hidden, self._ones, self._head).mul_(length)
        else:
            found = self._ops.head(hidden, self._norm, self._head)
        if self._targets is None:
            return found
        return found.new_full((len(found), self._target_vocab), ABSENT).index_copy_(1, self._targets, found)

    def _attend(self, attention: Attention, x: Tensor, residual: Tensor, rows: Rows, kv: KV) -> Tensor:
        """Return residual + attention of the rows of x, which may be wider."""
        attend = self._ops.decode_attention if rows.chunk < 0 else self._ops.prefill_attention
        q = self._ops.qkv(x, attention.qkv, self._rope, rows, kv)  # [rows, heads, head_dim]
        return self._ops.linear(attend(q, rows, kv), attention.output, residual, attention.output_bias)


def joined(embedded: Tensor, hidden: Tensor, eps: float) -> Tensor:
    """Return rows [rows, 2·width + FILL] that `ops.qkv` norms to both halves, each normed by itself.

    It divides a row by the root of its mean square. So each half is divided by its own first, and what is filled in,
    whose weights are 0, brings the mean square of the whole to 1.
    """
    width = embedded.shape[1]
    halves = torch.stack((embedded, hidden), dim=1)  # [rows, 2, width]
    halves = F.rms_norm(halves, (width,), None, eps).flatten(1)
    total = halves.float().square().sum(dim=1, keepdim=True)  # 2·width at most, but for rounding
    fill = ((2 * width + FILL - total) / FILL).clamp_(min=0).sqrt_().to(halves.dtype)
    return torch.cat((halves, fill.expand(-1, FILL)), dim=1)


def take_first(weights: Weights, prefix: str) -> First:
    """The first layer at `prefix`."""
    spec, width, modules = weights.spec, weights.spec.hidden, weights.under(prefix, QKV_PROJ)
    widths = (spec.heads * spec.head_dim, *[spec.kv_heads * spec.head_dim] * 2)
    norms = F.pad(weights.vector((prefix + INPUT_NORM, prefix + HIDDEN_NORM), (width, width)), (0, FILL))
    qkv = QKV(
        norm=Norm(norms, 0.0),
        weight=weights.ops.pack(QTensor.plain(F.pad(weights.matrix(modules, widths, 2 * width).data, (0, FILL)))),
        bias=weights.bias(modules, widths) if spec.qkv_bias else None,
        q_norm=weights.norm(prefix + Q_NORM, spec.head_dim) if spec.qk_norm else None,
        k_norm=weights.norm(prefix + K_NORM, spec.head_dim) if spec.qk_norm else None,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
    )
    output = weights.packed((prefix + OUTPUT,), (width,), spec.heads * spec.head_dim)
    bias = weights.bias((prefix + OUTPUT,), (width,)) if spec.output_bias else None
    return First(
        Norm(norms[width : 2 * width], spec.eps), Attention(qkv, output, bias, None), MLP.take(weights, prefix)
    )


def take_layer(weights: Weights, prefix: str) -> Layer:
    """Another layer at `prefix`."""
    return Layer(Attention.take(weights, prefix), MLP.take(weights, prefix))


def _targets(checkpoint: Source, spec: EagleSpec, vocab: int, ops: Ops) -> Tensor:
    """The target's id of each of the head's, int64 [draft vocabulary]: `d2t` says how far it is away."""
    found = checkpoint.raw("d2t", (spec.vocab,))
    targets = found.long() + torch.arange(spec.vocab)
    if not 0 <= int(targets.min()) <= int(targets.max()) < vocab or len(set(targets.tolist())) < spec.vocab:
        raise ModelError(f"{checkpoint.entries['d2t'].path}: d2t does not lead to different ids below {vocab}")
    return targets.to(ops.device)
