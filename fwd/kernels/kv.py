"""What a model keeps of the tokens it has seen: keys and values, or latents, in pages."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

LATENT_BLOCK = 128  # numbers of a latent that share a scale in fp8


@dataclass(frozen=True, slots=True, eq=False)
class KV:
    """Keys and values of one layer; a cell is one token: cell = page · page_size + offset. Contents start undefined.

    The KV dtype is float32, bfloat16 or fp8, whatever the model's. Vectors are rounded to it (to nearest, ties to even)
    from the model's dtype as they are written, once, and to the model's dtype as attention reads them. In fp8 (e4m3) a
    cell holds x / scale, clamped to ±448 and rounded; scale = max|x| / 448 of that token and head, 1 where that is 0.
    What is read is number · scale in float32, rounded to the model's dtype.
    """

    keys: Tensor  # [cells, kv_heads, head_dim], the KV dtype
    values: Tensor  # the same
    page_size: int  # tokens, a multiple of 4: every page then starts at 16 bytes
    group: int = 0  # index in `Rows.cells`
    window: int = 0  # tokens that a row sees, itself included; 0: all
    key_scales: Tensor | None = None  # fp8: float32 [cells, kv_heads]
    value_scales: Tensor | None = None  # the same

    def copy(self, source: int, target: int) -> None:
        """Copy the cells of page `source` to page `target`."""
        _copy((self.keys, self.values, self.key_scales, self.value_scales), self.page_size, source, target)


@dataclass(frozen=True, slots=True, eq=False)
class LatentKV:
    """Latents and rotated keys of one layer, one of each a token (MLA, DeepSeek-V2 2024); cells as in `KV`.

    In fp8 the latent alone is, in blocks of LATENT_BLOCK numbers with a scale each, by the rule of `KV`; the rotated
    key is bfloat16 then. So a cell of 512 + 64 numbers takes 656 bytes, as FlashMLA's does.
    """

    latents: Tensor  # [cells, latent], the KV dtype
    keys: Tensor  # [cells, rope], the KV dtype; fp8: bfloat16
    page_size: int  # tokens
    group: int = 0  # index in `Rows.cells`
    scales: Tensor | None = None  # fp8: float32 [cells, ⌈latent / LATENT_BLOCK⌉]

    window = 0  # all of the sequence is seen

    def copy(self, source: int, target: int) -> None:
        """Copy the cells of page `source` to page `target`."""
        _copy((self.latents, self.keys, self.scales), self.page_size, source, target)


def _copy(tensors: Iterable[Tensor | None], size: int, source: int, target: int) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor[target * size : (target + 1) * size] = tensor[source * size : (source + 1) * size]


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """The paged cache of a model: the pages of a group hold the same cells in each of its layers."""

    layers: tuple[KV, ...] | tuple[LatentKV, ...]

    def copy(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """Copy pages, in order: each (group, source, target) in all layers of the group."""
        for group, source, target in copies:
            for kv in self.layers:
                if kv.group == group:
                    kv.copy(source, target)
