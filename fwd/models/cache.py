"""The cache of a model, as its layouts say: one arena, allocated once, of which every layer's tensors are views."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fwd.kernels.kv import KV, LATENT_BLOCK, KVCache, LatentKV
from fwd.models.layout import CacheLayout, KVFormat, Latent, Paged, groups

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def new_cache(
    layouts: tuple[CacheLayout, ...],
    units: Sequence[int],
    page_size: int,
    kv: KVFormat,
    device: torch.device | None = None,
) -> KVCache:
    """Return an empty cache of `units[g]` pages for group g of `groups(layouts)`.

    Takes exactly Σ units[g] · group.unit_bytes(page_size, kv) bytes, which are touched as they are written.
    """
    assert page_size > 0, page_size
    assert page_size % 4 == 0, page_size
    plan = list(zip(groups(layouts), units, strict=True))
    arena = _Arena(sum(pages * group.unit_bytes(page_size, kv) for group, pages in plan), page_size, kv, device)
    layers: dict[int, KV | LatentKV] = {}
    for number, (group, pages) in enumerate(plan):
        for layout in group.layouts:
            layers |= {index: arena.layer(layout, number, pages) for index in layout.layers}
    assert arena.free == 0, f"{arena.free} bytes are nobody's"
    return KVCache(cast("tuple[KV, ...] | tuple[LatentKV, ...]", tuple(layers[index] for index in range(len(layers)))))


class _Arena:
    """Bytes that are handed out front to back."""

    def __init__(self, size: int, page_size: int, kv: KVFormat, device: torch.device | None) -> None:
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self._used = 0
        self._page_size, self._kv = page_size, kv

    @property
    def free(self) -> int:
        return len(self._bytes) - self._used

    def layer(self, layout: CacheLayout, group: int, pages: int) -> KV | LatentKV:
        match layout:
            case Paged():
                return self._heads(layout, group, pages)
            case Latent():
                return self._latents(layout, group, pages)
        raise AssertionError(f"{type(layout).__name__} keeps nothing of a token")

    def _heads(self, layout: Paged, group: int, pages: int) -> KV:
        heads = (pages * self._page_size, layout.kv_heads)
        keys, values = (self._take((*heads, layout.head_dim), _DTYPES[self._kv]) for _ in range(2))
        key_scales, value_scales = (self._take(heads, torch.float32) if self._kv == "fp8" else None for _ in range(2))
        return KV(keys, values, self._page_size, group, layout.window, key_scales, value_scales)

    def _latents(self, layout: Latent, group: int, pages: int) -> LatentKV:
        cells, fp8 = pages * self._page_size, self._kv == "fp8"
        latents = self._take((cells, layout.latent), _DTYPES[self._kv])
        scales = self._take((cells, -(-layout.latent // LATENT_BLOCK)), torch.float32) if fp8 else None
        keys = self._take((cells, layout.rope), torch.bfloat16 if fp8 else _DTYPES[self._kv])
        return LatentKV(latents, keys, self._page_size, group, scales)

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        taken = self._bytes[self._used : self._used + torch.Size(shape).numel() * dtype.itemsize]
        self._used += len(taken)
        return taken.view(dtype).view(shape)
