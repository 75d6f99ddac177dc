"""A layer that predicts further tokens, as DeepSeek-V3 and GLM-4.5 and later have it in their own checkpoints.

hidden' = block(eh_proj·[enorm(embedding of t_{p+1}); hnorm(h_p)]) (DeepSeek-V3, Liu et al. 2024). As vLLM has it
(deepseek_mtp.py): h_p of the target is normed by its last norm, of the layer itself it is its block's output as it is;
the embedding at position 0 is zero. Embedding and head are the target's, of which the layer stores copies.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fwd.errors import ModelError
from fwd.kernels.kv import KVCache
from fwd.kernels.reference import normed
from fwd.kernels.rows import Rows
from fwd.models.checkpoint import Checkpoint
from fwd.models.draft.mtp_config import PROJECTION, UNUSED, MtpSpec
from fwd.models.draft.shared import Base, Target, quietly
from fwd.models.quantization import is_needless
from fwd.models.source import Source
from fwd.models.spec import ModelSpec
from fwd.models.weights import Weights


class Mtp(Base[MtpSpec]):
    """See `fwd.models.draft.model.DraftModel`. Its block is of the target's family, and turns by the target's table."""

    def __init__(self, spec: MtpSpec, target: Target) -> None:
        super().__init__(spec, target)
        self._target, width = target, spec.hidden
        with Checkpoint(spec.folder, quietly) as checkpoint:
            weights = Weights(_with_layer(spec), target.ops, checkpoint, target.dtype)
            self._enorm, self._hnorm, self._norm = (
                weights.norm(f"{spec.prefix}{name}.weight", width) for name in ("enorm", "hnorm", "shared_head.norm")
            )
            self._projection = weights.packed((spec.prefix + PROJECTION,), (width,), 2 * width)
            self._layer = target.layer(weights, spec.prefix, spec.layer)
            _finish(checkpoint, spec.target.prefix + spec.prefix)
        self.weights_hash = target.weights_hash  # which is of all tensors of the folder

    def fuse(self, features: Tensor) -> Tensor:  # noqa: D102
        return normed(features, self._target.last_norm)

    def forward(self, ids: Tensor, hidden: Tensor | None, rows: Rows, cache: KVCache) -> Tensor:  # noqa: D102
        assert hidden is not None, "it takes features"
        x = self.product(self._both(ids, hidden, rows), self._projection)  # [rows, hidden]
        found: Tensor = self._target.block(x, self._layer, rows, cache.layers[0])
        return found

    def _both(self, ids: Tensor, hidden: Tensor, rows: Rows) -> Tensor:
        """Embedding and hidden, each normed: [rows, 2·hidden]."""
        embedded = self._ops.embed(ids, self._target.embedding)
        embedded = torch.where(rows.positions.unsqueeze(1) == 0, 0, embedded)
        return torch.cat((normed(embedded, self._enorm), normed(hidden, self._hnorm)), dim=1)

    def logits(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self._ops.head(hidden, self._norm, self._target.head)


def _with_layer(spec: MtpSpec) -> ModelSpec:
    """The target with one layer more, which has experts where its tensors say so."""
    target = spec.target
    layers = (*target.moe.layers, spec.layer) if target.moe and spec.mixed else ()
    return replace(target, moe=replace(target.moe, layers=layers) if target.moe else None)


def _finish(checkpoint: Source, prefix: str) -> None:
    """Raise ModelError for a tensor of the layer that has no place in it."""
    known = tuple(prefix + name for name in UNUSED)
    for name in checkpoint.left():
        if name.startswith(prefix) and name not in known and not is_needless(name):
            path = checkpoint.entries[name].path
            raise ModelError(f"{path}: tensor {name} has no place in a layer that predicts further tokens")
