"""What the engine sees of a model, whatever its family."""

from typing import Protocol

import torch
from torch import Tensor

from fwd.kernels.ops import KVCache, Ops, Rows
from fwd.models.spec import ModelSpec


class Model(Protocol):
    """A loaded model. Shapes: `ids` int64 [rows], hidden [rows, hidden] in `dtype`, logits float32 [rows, vocab]."""

    spec: ModelSpec
    ops: Ops
    dtype: torch.dtype
    weights_hash: str

    def new_cache(self, pages: int, page_size: int) -> KVCache:
        """Return an empty cache; its memory is touched as it is written."""
        ...

    def forward(self, ids: Tensor, rows: Rows, cache: KVCache) -> Tensor:
        """Run the layers over the rows of a step, write their KV; return hidden [rows, hidden] before the last norm."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits float32 of any rows of hidden."""
        ...
