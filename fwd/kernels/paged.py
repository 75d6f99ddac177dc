"""Where the keys and values of a sequence stand in the pages of a cache, and how they are written and read there."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from numpy.typing import NDArray
from torch import Tensor

from fwd.kernels.kv import KV, LATENT_BLOCK, LatentKV

FP8_MAX = 448.0  # e4m3
_ALIGNED = 64  # bytes; products of float32 have other bits where their operands begin elsewhere
_NOWHERE = slice(0, 0)

Table = NDArray[np.int32]  # [max_pages], one line of `Cells.tables`


class Span(NamedTuple):
    """Consecutive positions of a sequence that are read at once: `length` cells between zeros."""

    place: slice | Tensor  # cells, where the pages stand in order, which saves a copy; else int64 [pages]
    length: int
    skip: int = 0  # cells of the first of the pages that are left out
    before: int = 0  # positions read as zeros
    after: int = 0  # the same
    page_size: int = 0  # tokens of each of the pages, where it is not the cache's


def locate(table: Table, page_size: int, start: int, stop: int) -> Span:
    """Return the span of positions start…stop−1, of which there is one at least."""
    pages = table[start // page_size : -(-stop // page_size)]
    skip, base = start % page_size, int(pages[0])
    if pages[-1] - base == len(pages) - 1 and (np.diff(pages) == 1).all():
        cell = base * page_size + skip
        return Span(slice(cell, cell + stop - start), stop - start)
    return Span(torch.from_numpy(pages.astype(np.int64)), stop - start, skip)


def locate_branch(table: Table, page_size: int, wanted: range, branch: NDArray[np.int64], stop: int) -> Span:
    """Return the span of the positions `wanted`; the last ones before `stop` stand in the cells `branch`."""
    fork = stop - len(branch)
    if wanted.stop <= fork:
        return locate(table, page_size, wanted.start, wanted.stop)
    places = np.arange(wanted.start, max(wanted.start, fork))
    cells = table[places // page_size].astype(np.int64) * page_size + places % page_size
    cells = np.concatenate((cells, branch[max(0, wanted.start - fork) : wanted.stop - fork]))
    return Span(torch.from_numpy(cells), len(cells), page_size=1)


def locate_within(table: Table, page_size: int, wanted: range, known: range) -> Span:
    """Return the span of the positions `wanted`; those not `known` are zeros, their pages are not read."""
    start, stop = max(wanted.start, known.start), min(wanted.stop, known.stop)
    if start >= stop:
        return Span(_NOWHERE, 0, before=len(wanted))
    found = locate(table, page_size, start, stop)
    return found._replace(before=start - wanted.start, after=wanted.stop - stop)


def write(kv: KV, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write the vectors [tokens, kv_heads, head_dim] of tokens to the cells `slots` (int64 [tokens])."""
    _write(kv.keys, kv.key_scales, slots, keys)
    _write(kv.values, kv.value_scales, slots, values)


def read(kv: KV, span: Span, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keys and values of a span, each [before + length + after, kv_heads, head_dim] in `dtype`."""
    keys = _read(kv.keys, kv.key_scales, kv.page_size, span, dtype)
    return keys, _read(kv.values, kv.value_scales, kv.page_size, span, dtype)


def write_latents(kv: LatentKV, slots: Tensor, latents: Tensor, keys: Tensor) -> None:
    """Write latents [tokens, latent] and rotated keys [tokens, rope] to the cells `slots` (int64 [tokens])."""
    if kv.scales is not None:
        latents, scales = quantize_latents(latents)
        _put(kv.scales, slots, scales)
    _put(kv.latents, slots, latents)
    _put(kv.keys, slots, keys)


def read_latents(kv: LatentKV, span: Span, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return latents and rotated keys of a span, each [before + length + after, …] in `dtype`."""
    latents = _read(kv.latents, kv.scales, kv.page_size, span, dtype)
    return latents, _read(kv.keys, None, kv.page_size, span, dtype)


def quantize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp8 numbers [.., dim] and float32 scales [..] of vectors, by the rule of `fwd.kernels.kv.KV`."""
    wide = vectors.float()
    scale = wide.abs().amax(dim=-1) / FP8_MAX
    scale = scale.masked_fill_(scale == 0, 1.0)
    numbers = (wide / scale.unsqueeze(-1)).clamp_(-FP8_MAX, FP8_MAX)
    return numbers.to(torch.float8_e4m3fn), scale


def quantize_latents(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp8 numbers [tokens, latent] and scales [tokens, blocks] of latents: `quantize` of each block."""
    width = latents.shape[-1]
    blocks = F.pad(latents, (0, -width % LATENT_BLOCK)).view(len(latents), -1, LATENT_BLOCK)
    numbers, scales = quantize(blocks)
    return numbers.flatten(1)[:, :width], scales


def aligned(x: Tensor) -> Tensor:
    """Return x, or a copy of it that begins where products have the same bits."""
    return x if x.data_ptr() % _ALIGNED == 0 else x.clone()


def _write(cache: Tensor, scales: Tensor | None, slots: Tensor, vectors: Tensor) -> None:
    if scales is not None:
        vectors, scale = quantize(vectors)
        _put(scales, slots, scale)
    _put(cache, slots, vectors)


def _put(cache: Tensor, slots: Tensor, vectors: Tensor) -> None:
    if cache.dtype != vectors.dtype:
        vectors = vectors.to(cache.dtype)
    if cache.dtype == torch.float8_e4m3fn:
        cache, vectors = cache.view(torch.uint8), vectors.view(torch.uint8)
    cache.index_copy_(0, slots, vectors)


def _read(cache: Tensor, scales: Tensor | None, page_size: int, span: Span, dtype: torch.dtype) -> Tensor:
    found = _gather(cache, page_size, span)
    if scales is not None:
        found = found.float().mul_(_spread(_gather(scales, page_size, span), found))
    if found.dtype != dtype:
        found = found.to(dtype)
    if span.before or span.after:
        return F.pad(found, (0, 0) * (found.dim() - 1) + (span.before, span.after))
    return aligned(found)


def _spread(scales: Tensor, numbers: Tensor) -> Tensor:
    """The scale of each number: of a vector one, or of a latent one a block."""
    if scales.dim() < numbers.dim():
        return scales.unsqueeze(-1)
    return scales.repeat_interleave(LATENT_BLOCK, dim=-1)[..., : numbers.shape[-1]]


def _gather(cache: Tensor, page_size: int, span: Span) -> Tensor:
    if isinstance(span.place, slice):
        return cache[span.place]
    pages = cache.view(-1, span.page_size or page_size, *cache.shape[1:]).index_select(0, span.place)
    return pages.flatten(0, 1)[span.skip : span.skip + span.length]
