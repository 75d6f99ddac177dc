"""Attention of the reference: a context is split in pieces, which are summed in their order.

Which pieces there are is a pure function of a row's own length, or of a chunk's number; short contexts are one piece.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.kernels.kv import KV, LatentKV
from fwd.kernels.paged import Span, locate_branch, locate_within, read
from fwd.kernels.rows import Rows
from fwd.kernels.sizes import GRAIN, PIECE, PIECES

_LOWEST = torch.finfo(torch.float32).min


class Piece(NamedTuple):
    """Keys that are scored at once, and what of them is hidden: float [queries, keys], 0 or −inf."""

    span: Span
    mask: Tensor | None


class Part(NamedTuple):
    """Keys and values as they are scored and summed, float32, and what of them is hidden."""

    keys: Tensor  # [1, kv_heads, keys, head_dim]
    values: Tensor  # [1, kv_heads, keys, value]
    mask: Tensor | None  # [queries, keys], 0 or −inf


def split(start: int, stop: int) -> Iterator[range]:
    """Cut positions start…stop−1 into pieces of equal length, the last one shorter."""
    length = PIECE
    if stop - start > PIECE * PIECES:
        length = -(-(stop - start) // (PIECES * GRAIN)) * GRAIN
    return (range(first, min(first + length, stop)) for first in range(start, stop, length))


def decode_pieces(rows: Rows, kv: KV | LatentKV) -> list[list[Piece]]:
    """Return the pieces that each row attends to; of a padding row none."""
    cells = rows.cells[kv.group]
    tables, slots = cells.tables.numpy(), cells.slots.numpy()
    sequences, positions, parents = (x.tolist() for x in (rows.sequences, rows.positions, rows.parents))

    def pieces(row: int) -> Iterator[Piece]:
        line, stop, branch = tables[sequences[row]], positions[row] + 1, slots[_branch(parents, row)]
        for keys in split(_first_seen(positions[row], kv.window), stop):
            yield Piece(locate_branch(line, kv.page_size, keys, branch, stop), None)

    return [list(pieces(row)) if sequences[row] >= 0 else [] for row in range(len(sequences))]


def prefill_pieces(rows: Rows, kv: KV | LatentKV, group: int, dtype: torch.dtype) -> list[Piece]:
    """Return the pieces of a chunk, for C rows of `group` query heads each: masks [group·C, keys] in `dtype`.

    They reach from the first key that the chunk's first row would see to the chunk's end, whichever rows are padding.
    """
    count, tables = len(rows.positions), rows.cells[kv.group].tables.numpy()
    chunk = range(rows.chunk * count, (rows.chunk + 1) * count)
    live = (rows.sequences >= 0).nonzero().flatten().tolist()
    known = range(_first_seen(chunk[live[0]], kv.window), chunk[live[-1]] + 1)
    line = tables[int(rows.sequences[live[0]])]

    def piece(keys: range) -> Piece:
        mask = _mask(chunk, keys, kv.window, dtype)
        span = locate_within(line, kv.page_size, keys, known)
        return Piece(span, None if mask is None else mask.repeat(group, 1))

    return [piece(keys) for keys in split(_first_seen(chunk.start, kv.window), chunk.stop)]


def attend(q: Tensor, kv: KV, pieces: Sequence[Piece], sinks: Tensor | None = None) -> Tensor:
    """Return softmax attention of q [1, kv_heads, queries, head_dim] over the pieces, in the same shape.

    Queries stand head by head; `sinks` float32 [heads] adds a logit without a value to each head.
    """
    if len(pieces) > 1 or sinks is not None:
        return _attend_split(q, kv, pieces, sinks)
    span, mask = pieces[0]
    keys, values = read(kv, span, q.dtype)
    return F.scaled_dot_product_attention(q, _by_head(keys), _by_head(values), mask)


def online_softmax(q: Tensor, parts: Iterable[Part], width: int, sinks: Tensor | None = None) -> Tensor:
    """Return softmax(q·kᵀ)·v over all parts, float32 [1, kv_heads, queries, width]; q float32, scaled already.

    Online softmax (Milakov & Gimelshein 2018): each part rescales what was summed before it.
    """
    out = q.new_zeros((*q.shape[:-1], width))
    peak, total = out.new_full((*q.shape[:-1], 1), _LOWEST), out.new_zeros((*q.shape[:-1], 1))
    if sinks is not None:  # a first key whose value is 0
        by_head = sinks.view(1, q.shape[1], -1, 1)
        peak, total = by_head.repeat_interleave(q.shape[2] // by_head.shape[2], dim=2), total.add_(1)
    for keys, values, mask in parts:
        scores = q @ keys.transpose(2, 3)  # [1, kv_heads, queries, keys]
        if mask is not None:
            scores += mask
        before, peak = peak, torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
        weights, fade = scores.sub_(peak).exp_(), before.sub_(peak).exp_()
        total = total.mul_(fade).add_(weights.sum(dim=-1, keepdim=True))
        out = out.mul_(fade).add_(weights @ values)
    return out.div_(total)


def _attend_split(q: Tensor, kv: KV, pieces: Sequence[Piece], sinks: Tensor | None = None) -> Tensor:
    wide = q.float() * q.shape[-1] ** -0.5
    return online_softmax(wide, _widened(kv, pieces, q.dtype), q.shape[-1], sinks).to(q.dtype)


def _widened(kv: KV, pieces: Sequence[Piece], dtype: torch.dtype) -> Iterator[Part]:
    for span, mask in pieces:
        keys, values = (_by_head(x.float()) for x in read(kv, span, dtype))
        yield Part(keys, values, mask)


def _branch(parents: Sequence[int], row: int) -> list[int]:
    """The drafts that a row sees in their own slots, itself the last; none where it follows the block table."""
    branch: list[int] = []
    while parents[row] >= 0:
        assert parents[row] < row, "a draft stands after its parent"
        branch.append(row)
        row = parents[row]
    return branch[::-1]


def _by_head(x: Tensor) -> Tensor:
    """Return [keys, kv_heads, head_dim] as [1, kv_heads, keys, head_dim]."""
    return x.transpose(0, 1).unsqueeze(0)


def _first_seen(position: int, window: int) -> int:
    return max(0, position + 1 - window) if window else 0


def _mask(queries: range, keys: range, window: int, dtype: torch.dtype) -> Tensor | None:
    """Return float [queries, keys]: −inf where a key stands after the query or behind its window; None: all is seen."""
    later, behind = keys[-1] > queries[0], window > 0 and keys[0] <= queries[-1] - window
    if not (later or behind):
        return None
    age = torch.arange(queries.start, queries.stop).unsqueeze(1) - torch.arange(keys.start, keys.stop)
    hidden = (age < 0) | (age >= window) if window else age < 0
    return torch.zeros(age.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
