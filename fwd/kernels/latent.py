"""Latent attention of the reference (MLA, DeepSeek-V2 2024): absorbed for decode rows, expanded for prefill chunks.

Decode rows are computed one by one over pieces that are a function of their own length. The pieces of a chunk are one
of its number; what its live rows must not see or do not know is hidden, or zeros.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.kernels.attention import Part, Piece, online_softmax
from fwd.kernels.kv import LatentKV
from fwd.kernels.ops import Latents
from fwd.kernels.paged import aligned, read_latents
from fwd.kernels.sizes import EXPANDED_HEADS


def decode(q: Tensor, layer: Latents, kv: LatentKV, pieces: Sequence[Sequence[Piece]]) -> Tensor:
    """Return [rows, heads·value] of q [rows, heads, nope + rope]; a row without pieces gives 0."""
    up_key, up_value = layer.up_key.float(), layer.up_value.float().transpose(1, 2)
    out = [q.new_zeros(up_value.shape[0] * up_value.shape[2])] * len(q)
    for row, own in enumerate(pieces):
        if own:
            absorbed = _absorb(aligned(q[row]).float(), up_key, layer.scale)
            mixed = online_softmax(absorbed, _latents(kv, own, q.dtype), up_key.shape[2])
            out[row] = (mixed.view(len(up_value), 1, -1) @ up_value).flatten().to(q.dtype)
    return torch.stack(out)


def prefill(q: Tensor, layer: Latents, kv: LatentKV, pieces: Sequence[Piece]) -> Tensor:
    """Return [C, heads·value] of q [C, heads, nope + rope]."""
    firsts = range(0, q.shape[1], EXPANDED_HEADS)
    mixed = [_prefill_heads(q, layer, slice(first, first + EXPANDED_HEADS), kv, pieces) for first in firsts]
    return torch.cat(mixed, dim=1).flatten(1)


def _absorb(q: Tensor, up_key: Tensor, scale: float) -> Tensor:
    """Return one row's queries of latents and rotated keys: float32 [1, 1, heads, latent + rope]."""
    nope = up_key.shape[1]
    onto_latents = (q[:, None, :nope] @ up_key).squeeze(1)  # [heads, latent]
    return torch.cat((onto_latents, q[:, nope:]), dim=1).mul_(scale)[None, None]


def _latents(kv: LatentKV, pieces: Sequence[Piece], dtype: torch.dtype) -> Iterator[Part]:
    """Latents and rotated keys as the keys of one head that all share, latents as its values."""
    for span, mask in pieces:
        latents, keys = read_latents(kv, span, dtype)
        joined = torch.cat((latents, keys), dim=1).float()[None, None]
        yield Part(joined, joined[..., : latents.shape[1]], mask)


def _prefill_heads(q: Tensor, layer: Latents, heads: slice, kv: LatentKV, pieces: Sequence[Piece]) -> Tensor:
    """Return [C, heads, value] of some of the heads."""
    wide = q[:, heads].transpose(0, 1).float().mul(layer.scale)[None]  # [1, heads, C, nope + rope]
    up = torch.cat((layer.up_key[heads], layer.up_value[heads]), dim=1).float()  # [heads, nope + value, latent]
    nope, value = layer.up_key.shape[1], layer.up_value.shape[1]
    mixed = online_softmax(wide, _expanded(up, nope, kv, pieces, q.dtype), value)
    return mixed[0].transpose(0, 1).to(q.dtype)


def _expanded(up: Tensor, nope: int, kv: LatentKV, pieces: Sequence[Piece], dtype: torch.dtype) -> Iterator[Part]:
    """Keys and values of some heads, made from the latents and rounded to `dtype`."""
    for span, mask in pieces:
        latents, rotated = read_latents(kv, span, dtype)
        made = F.linear(latents.float(), up.flatten(0, 1)).to(dtype).float()
        by_head = made.view(len(made), len(up), -1).transpose(0, 1)  # [heads, keys, nope + value]
        shared = rotated.float().expand(len(up), -1, -1)
        yield Part(torch.cat((by_head[..., :nope], shared), dim=2)[None], by_head[None, ..., nope:], mask)
