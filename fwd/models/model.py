"""What the engine sees of a model, whatever its family."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fwd.kernels.kv import KVCache
from fwd.kernels.ops import Ops
from fwd.kernels.rows import Rows
from fwd.models.layout import KVFormat
from fwd.models.spec import ModelSpec
from fwd.models.taps import Taps


class Model(Protocol):
    """A loaded model. Shapes: `ids` int64 [rows], hidden [rows, hidden] in `dtype`, logits float32 [rows, vocab]."""

    spec: ModelSpec
    dtype: torch.dtype
    weights_hash: str
    kept: dict[str, int]  # bytes of tensors that were left in the files for the speculation side, by prefix of names

    @property
    def ops(self) -> Ops:
        """What executes its steps."""
        ...

    def new_cache(self, units: Sequence[int], page_size: int, kv: KVFormat) -> KVCache:
        """Return an empty cache of `units[g]` pages (states: records) for group g of `groups(spec.cache)`.

        It takes exactly Σ units[g] · group.unit_bytes(page_size, kv) bytes, which are touched as they are written.
        """
        ...

    def forward(self, ids: Tensor, rows: Rows, cache: KVCache, taps: Taps | None = None) -> Tensor:
        """Run the layers over the rows of a step, write their KV; return hidden [rows, hidden] before the last norm.

        Where there are `taps` they are given hidden rows on the way.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits float32 of any rows of hidden."""
        ...
