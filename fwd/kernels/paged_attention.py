"""Attention of decode rows over a paged cache: how a context is split, what that takes, the launch.

A split is a function of how many keys a row sees, so that its bits depend on nothing else (`cuda/paged_attention.cu`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fwd.kernels.kv import KV
from fwd.kernels.launch import Kernel, Launcher
from fwd.kernels.rows import Rows
from fwd.kernels.sizes import MAX_ROWS, PIECES

GROUP = 16  # query heads of a kv head, at most
HEAD_DIMS = (64, 128, 256)
KV_DTYPES = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}
_SPREAD, _SHORT, _GRAIN = 32, 256, 64  # pieces of up to SHORT keys are made longer to be SPREAD at most
_THREADS = 128


class _Shape(NamedTuple):
    """How a kernel of one head_dim runs; sizes as in `cuda/paged_items.cuh`."""

    slots: int
    blocks: int  # on a multiprocessor


_SHAPES = {64: _Shape(4, 3), 128: _Shape(3, 2), 256: _Shape(3, 1)}


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """What blocks leave for the one that sums the pieces of a row; every launch leaves `arrivals` as it was."""

    sums: Tensor  # float32 [rows, heads, PIECES, head_dim]
    marks: Tensor  # float32 [rows, heads, PIECES, 2], maximum and total
    arrivals: Tensor  # int32 [rows, kv_heads], zeros

    @classmethod
    def new(cls, launcher: Launcher, heads: int, kv_heads: int, head_dim: int, *, rows: int = MAX_ROWS) -> "Workspace":
        """Return the workspace of a model's layers, which take turns."""
        sums = launcher.empty((rows, heads, PIECES, head_dim), torch.float32)
        marks = launcher.empty((rows, heads, PIECES, 2), torch.float32)
        return cls(sums, marks, torch.zeros((rows, kv_heads), dtype=torch.int32, device=launcher.device))


def piece_length(length: int) -> int:
    """Keys in a piece of a context of `length` keys, a multiple of 64; `piece_length` of the kernel is the same."""
    spread = _up(length, _SPREAD)
    return max(spread, _GRAIN) if spread <= _SHORT else max(_up(length, PIECES), _SHORT)


def piece_count(length: int) -> int:
    """Pieces of a context of `length` keys."""
    return max(1, -(-length // piece_length(length)))


def _up(length: int, pieces: int) -> int:
    return -(-length // (pieces * _GRAIN)) * _GRAIN


def grid(head_dim: int, multiprocessors: int) -> int:
    """Blocks of a launch, whatever the rows and contexts: as many as run at once."""
    return multiprocessors * _SHAPES[head_dim].blocks


def shared_bytes(head_dim: int) -> int:
    """Bytes of shared memory of a block: its slots, a tag of 32 bytes to each, maxima and totals of its warps."""
    return _SHAPES[head_dim].slots * 4 * (64 * head_dim + 32) + 4 * GROUP * 8


def supports(heads: int, kv_heads: int, head_dim: int, page_size: int) -> str | None:
    """Return what of a model's attention these kernels do not take, or None."""
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim}: the attention kernels take 64, 128 and 256"
    if heads % kv_heads or heads // kv_heads > GROUP:
        return f"{heads} heads on {kv_heads} kv heads: the attention kernels take 1 to {GROUP} on each"
    if page_size % 4:
        return f"page_size {page_size}: the attention kernels take multiples of 4"
    return None


def decode_attention(
    launcher: Launcher, workspace: Workspace, q: Tensor, rows: Rows, kv: KV, *, sinks: Tensor | None = None
) -> Tensor:
    """See `fwd.kernels.ops.Ops.decode_attention`: q bfloat16 [rows, heads, head_dim], 1 to 16 rows.

    A row without a sequence gives zeros.
    """
    assert rows.chunk < 0, "prefill rows"
    check(q, kv, sinks)
    count, heads, head_dim = q.shape
    assert 1 <= count <= MAX_ROWS, f"{count} rows"
    assert workspace.sums.shape[1:] == (heads, PIECES, head_dim), (tuple(q.shape), tuple(workspace.sums.shape))
    assert workspace.arrivals.shape[1] == kv.keys.shape[1], (tuple(kv.keys.shape), tuple(workspace.arrivals.shape))
    cells = rows.cells[kv.group]
    assert cells.tables.is_contiguous(), cells.tables.stride()
    out = launcher.empty((count, heads * head_dim), torch.bfloat16)
    launcher.launch(
        Kernel("paged_attention.cu", f"decode_attention_{KV_DTYPES[kv.keys.dtype]}_{head_dim}"),
        (grid(head_dim, launcher.multiprocessors), 1, 1),
        _THREADS,
        shared_bytes(head_dim),
        *(out, q, kv.keys, kv.values, kv.key_scales, kv.value_scales, sinks),
        *(rows.positions, rows.sequences, rows.parents, cells.slots, cells.tables),
        *(workspace.sums, workspace.marks, workspace.arrivals),
        *(count, heads // kv.keys.shape[1], kv.keys.shape[1], cells.tables.shape[1], kv.page_size, kv.window),
        head_dim**-0.5,
    )
    return out


def check(q: Tensor, kv: KV, sinks: Tensor | None) -> None:
    """Assert that the attention kernels take q [rows, heads, head_dim] over this cache."""
    _, heads, head_dim = q.shape
    _, kv_heads, kv_dim = kv.keys.shape
    assert q.dtype == torch.bfloat16, q.dtype
    assert q.is_contiguous(), q.stride()
    assert head_dim == kv_dim, (tuple(q.shape), tuple(kv.keys.shape))
    refusal = supports(heads, kv_heads, head_dim, kv.page_size)
    assert refusal is None, refusal
    assert kv.keys.dtype in KV_DTYPES, kv.keys.dtype
    assert (kv.keys.dtype == torch.float8_e4m3fn) == (kv.key_scales is not None), kv.keys.dtype
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == (heads,)), (sinks, heads)
