"""What all families share: embedding, blocks, last norm, head, and the cache between them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Generic, TypeVar, cast

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.kernels.kv import KV, KVCache, LatentKV
from fwd.kernels.ops import Ops
from fwd.kernels.rows import Rows
from fwd.models import cache as caches
from fwd.models.formats import drop_biases
from fwd.models.layout import KVFormat
from fwd.models.quantization import is_needless
from fwd.models.rope import rope_table
from fwd.models.source import Source
from fwd.models.spec import EMBEDDING, HEAD, LAYER, ModelSpec
from fwd.models.taps import Taps
from fwd.models.weights import Weights

LAST_NORM = "model.norm.weight"

Layer = TypeVar("Layer")
Cells = TypeVar("Cells", KV, LatentKV)
Execution = TypeVar("Execution", bound=Ops)


class Decoder(ABC, Generic[Layer, Cells, Execution]):
    """A decoder of one family; see `fwd.models.model.Model` for the methods' contract."""

    def __init__(self, spec: ModelSpec, ops: Execution, dtype: torch.dtype, checkpoint: Source, context: int) -> None:
        self.spec, self.ops, self.dtype = spec, ops, dtype
        weights = Weights(spec, ops, checkpoint, dtype)
        embedding = weights.table(EMBEDDING, spec.vocab, spec.hidden)
        # NOTE: the head first: packing it takes the most memory beside the weights, and now there are few of them.
        self.head = ops.pack_head(weights.head(embedding if spec.tied else None))
        self.embedding = self.head if spec.shares and self.head.packed else embedding
        layers = [self.layer(weights, LAYER.format(index), index) for index in range(spec.layers)]
        self.layers = [self.fetching(layer, after) for layer, after in pairwise(layers)] + layers[-1:]
        self.last_norm = weights.norm(LAST_NORM, spec.hidden)
        self.rope = rope_table(spec.rope, spec.rotated, context).to(ops.device)
        self.kept = self._keep(checkpoint)
        drop_biases(checkpoint, spec.quantization)
        checkpoint.finish(self._needless)
        self.weights_hash = checkpoint.digest()

    @abstractmethod
    def layer(self, weights: Weights, prefix: str, index: int) -> Layer:
        """Take the weights of one block."""

    def fetching(self, layer: Layer, after: Layer) -> Layer:  # noqa: ARG002
        """Return the block, which has what the one `after` begins with fetched where it has time for that."""
        return layer

    @abstractmethod
    def block(self, hidden: Tensor, layer: Layer, rows: Rows, kv: Cells) -> Tensor:
        """Run one block on hidden [rows, hidden], which it may overwrite."""

    def new_cache(self, units: Sequence[int], page_size: int, kv: KVFormat) -> KVCache:
        """Return an empty cache of `units[g]` pages for each group g."""
        return caches.new_cache(self.spec.cache, units, page_size, kv, self.ops.device)

    @torch.inference_mode()
    def forward(self, ids: Tensor, rows: Rows, cache: KVCache, taps: Taps | None = None) -> Tensor:
        """Return hidden [rows, hidden]."""
        count, rows = len(ids), rows.padded(self.ops.row_block)
        hidden = self.ops.embed(_padded(ids, len(rows.positions)), self.embedding)  # [rows, hidden]
        for index, (layer, kv) in enumerate(zip(self.layers, cast("tuple[Cells, ...]", cache.layers), strict=True)):
            hidden = self.block(hidden, layer, rows, kv)
            if taps:
                taps.take(index, hidden)
        return hidden[:count]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits float32 [rows, vocab]."""
        padded = _padded(hidden, len(hidden) + -len(hidden) % self.ops.row_block)
        return self.ops.head(padded, self.last_norm, self.head)[: len(hidden)]

    def _keep(self, checkpoint: Source) -> dict[str, int]:
        """Leave layers that predict further tokens in the files, for the speculation side: bytes by prefix."""
        for index in range(self.spec.layers, self.spec.layers + self.spec.mtp):
            checkpoint.keep(self.spec.prefix + LAYER.format(index))
        return dict(checkpoint.kept)

    def _needless(self, name: str) -> bool:
        """A tensor of which another takes the place, that is not used here, or not the text model's."""
        tied = self.spec.tied and name == f"{self.spec.prefix}{HEAD}.weight"
        unused = name.endswith("rotary_emb.inv_freq") or is_needless(name)
        return tied or unused or name.startswith(self.spec.others)


def _padded(rows: Tensor, count: int) -> Tensor:
    """`rows` and zeros after them; themselves where there are enough, for a step that is captured launches no more."""
    extra = count - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, extra)) if extra else rows
