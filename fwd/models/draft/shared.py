"""What draft models share: an empty cache, a product of their own, the check of what kernels take."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Generic, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from fwd.errors import ModelError
from fwd.kernels import device as kernels
from fwd.kernels.device import DeviceOps
from fwd.kernels.kv import KV, KVCache
from fwd.kernels.ops import Ops
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import Rows
from fwd.models import cache as caches
from fwd.models.decoder import Decoder
from fwd.models.draft.spec import DraftSpec
from fwd.models.layout import KVFormat, groups
from fwd.models.load import shape
from fwd.models.spec import ModelSpec

Target: TypeAlias = Decoder[Any, Any, Any]
Spec = TypeVar("Spec", bound=DraftSpec)


class Base(Generic[Spec]):
    """What a `fwd.models.draft.model.DraftModel` has, whatever its kind; what its kind has not is not called."""

    weights_hash: str

    def __init__(self, spec: Spec, target: Target) -> None:
        self.spec, self.dtype = spec, target.dtype
        self._ops: Ops = target.ops

    @property
    def ops(self) -> Ops:  # noqa: D102
        return self._ops

    def new_cache(self, pages: int, page_size: int, kv: KVFormat) -> KVCache:  # noqa: D102
        layouts = self.spec.cache
        cache = caches.new_cache(layouts, [pages] * len(groups(layouts)), page_size, kv, self._ops.device)
        for layer in cache.layers:
            for field in fields(layer):
                if isinstance(tensor := getattr(layer, field.name), Tensor):
                    tensor.view(torch.uint8).zero_()
        return cache

    def fuse(self, features: Tensor) -> Tensor:  # noqa: D102
        raise NotImplementedError(self.spec.kind)

    def forward(self, ids: Tensor, hidden: Tensor | None, rows: Rows, cache: KVCache) -> Tensor:  # noqa: D102
        raise NotImplementedError(self.spec.kind)

    def absorb(self, ids: Tensor, hidden: Tensor | None, rows: Rows, cache: KVCache) -> None:  # noqa: D102
        self.forward(ids, hidden, rows, cache)

    def draft(self, ids: Tensor, ends: Tensor, rows: Rows, cache: KVCache) -> Tensor:  # noqa: D102
        raise NotImplementedError(self.spec.kind)

    def product(self, x: Tensor, weight: QTensor) -> Tensor:
        """Return x·Wᵀ [rows, out] in the dtype of x."""
        return self._ops.linear(x, weight, x.new_zeros(len(x), weight.shape[0]))


def heads_of(cache: KVCache) -> Sequence[KV]:
    """The layers of a cache, which keep keys and values."""
    return cast("Sequence[KV]", cache.layers)


def check(ops: Ops, spec: DraftSpec, body: ModelSpec) -> None:
    """Raise ModelError for layers that the target's kernels do not take; the reference takes all."""
    if not isinstance(ops, DeviceOps):
        return
    try:
        kernels.check("host" if ops.device.type == "cpu" else "cuda", shape(body))
    except ModelError as error:
        raise ModelError(f"draft_model: {spec.folder}: {error.message}, or --draft-model none") from None


def quietly(_done: int, _total: int) -> None:
    """Progress that nobody is told of: a drafter is small beside its target."""
