"""Latent attention as kernels (`cuda/latent_*.cu`): what they take, how a context is split, four launches a layer.

First the down projection, whose last block writes the cells; then queries, whose last block of a head takes them to
latents; attention over pieces of the context; the pieces summed and taken to values. How work is cut shapes no result.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fwd.kernels import gemv
from fwd.kernels.kv import LATENT_BLOCK, LatentKV
from fwd.kernels.launch import Kernel, Launcher
from fwd.kernels.ops import Latents, Norm
from fwd.kernels.packing import TILE, inputs_of, name_of
from fwd.kernels.paged_attention import KV_DTYPES
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import Rows
from fwd.kernels.sizes import LATENT_PIECES as PIECES
from fwd.kernels.sizes import MAX_ROWS

LATENT, ROPE = 512, 64  # numbers of a cell, at most
MAX_HEADS = 128
_SPREAD, _SHORT, _GRAIN = 64, 256, 64  # pieces of up to SHORT keys are made longer to be SPREAD at most
_THREADS = 256
_KEYS = 64  # of a tile
_VALUES = 128  # of a block
_COLUMN = 8  # rows
_SECOND = 2 * 8 * 8 * 20 * 4  # bytes of the sums of a second column of rows (`kSums` of gemv.cuh)


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """What launches leave for each other, for the layers of a model in turn; every launch leaves `counters` zeros.

    `latent_qkv` returns `queries`, and leaves them in `absorbed` as `decode_latent_attention` scores them.
    """

    narrow: Tensor  # bfloat16 [rows, q_rank], query latents
    projected: Tensor  # bfloat16 [rows, latent + rope]
    queries: Tensor  # bfloat16 [rows, heads, nope + rope]
    absorbed: Tensor  # bfloat16 [rows, heads, latent + rope]
    sums: Tensor  # bfloat16 [rows, heads, PIECES, latent]
    marks: Tensor  # float32 [rows, heads, PIECES, 2], maximum and total
    counters: Tensor  # int32 [1 + heads]

    @classmethod
    def new(cls, launcher: Launcher, layer: Latents) -> "Workspace":
        """Return the workspace of a model that has such layers: `sizes.latent_bytes`."""
        heads, nope, latent = layer.up_key.shape
        rank, rope = query_rank(layer), layer.rope

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return launcher.empty((MAX_ROWS, *shape), dtype)

        return cls(
            narrow=empty(rank),
            projected=empty(latent + rope),
            queries=empty(heads, nope + rope),
            absorbed=empty(heads, latent + rope),
            sums=empty(heads, PIECES, latent),
            marks=empty(heads, PIECES, 2, dtype=torch.float32),
            counters=torch.zeros(1 + heads, dtype=torch.int32, device=launcher.device),
        )


def piece_length(length: int) -> int:
    """Keys in a piece of a context of `length` keys, a multiple of 64; `piece_length` of the kernels is the same."""
    spread = _up(length, _SPREAD)
    return max(spread, _GRAIN) if spread <= _SHORT else max(_up(length, PIECES), _SHORT)


def piece_count(length: int) -> int:
    """Pieces of a context of `length` keys."""
    return -(-length // piece_length(length))


def _up(length: int, pieces: int) -> int:
    return -(-length // (pieces * _GRAIN)) * _GRAIN


def supports(heads: int, rank: int, latent: int, nope: int, rope: int) -> str | None:
    """Return what of a model's latent attention these kernels do not take, or None; it may have values of any size."""
    if not 1 <= heads <= MAX_HEADS:
        return f"{heads} heads: the kernels over latents take 1 to {MAX_HEADS}"
    if latent % 16 or not 16 <= latent <= LATENT:
        return f"kv_lora_rank {latent}: the kernels over latents take multiples of 16 up to {LATENT}"
    if rope % 8 or not 8 <= rope <= ROPE:
        return f"qk_rope_head_dim {rope}: the kernels over latents take multiples of 8 up to {ROPE}"
    for field, value in (("qk_nope_head_dim", nope), ("q_lora_rank", rank)):
        if value % 8:
            return f"{field} {value}: the kernels over latents take multiples of 8"
    return None


# ---- decode rows ----


def latent_qkv(
    launcher: Launcher, workspace: Workspace, hidden: Tensor, layer: Latents, rope: Tensor, *, rows: Rows, kv: LatentKV
) -> Tensor:
    """See `fwd.kernels.ops.LatentOps.latent_qkv`; what is returned is a part of the workspace.

    q of a padding row is that of its position, its slot is −1.
    """
    count = len(hidden)
    assert 1 <= count <= MAX_ROWS, f"{count} rows"
    check(layer, rope, rows, kv)
    assert workspace.absorbed.shape[1:] == (len(layer.up_key), kv.latents.shape[1] + layer.rope), layer.up_key.shape
    _down(launcher, workspace, hidden, layer, rope, rows=rows, kv=kv)
    if layer.q_norm is None:
        _query(launcher, workspace, hidden, layer.norm, layer, rope=rope, rows=rows)
    else:
        _query(launcher, workspace, workspace.narrow[:count], layer.q_norm, layer, rope=rope, rows=rows)
    return workspace.queries[:count]


def _down(
    launcher: Launcher, workspace: Workspace, hidden: Tensor, layer: Latents, rope: Tensor, *, rows: Rows, kv: LatentKV
) -> None:
    latent, rank, slots = layer.up_key.shape[2], query_rank(layer), rows.cells[kv.group].slots
    outputs = rank + latent + layer.rope
    assert layer.down.shape[0] == outputs, (layer.down.shape, rank, latent, layer.rope)
    for part, name, grid, shared in _launches(launcher, "latent_down", hidden, layer.norm, layer.down, resident=2):
        launcher.launch(
            *(Kernel(_source(layer.down), name), grid, _THREADS, shared),
            *(hidden[part], layer.norm.weight, layer.norm.eps, layer.down.data, layer.down.outer),
            *(layer.kv_norm.weight, layer.kv_norm.eps, rope, rows.positions[part], slots[part]),
            *(kv.latents, kv.keys, kv.scales, workspace.narrow[part], workspace.projected, workspace.counters),
            *(layer.query.data, part.stop - part.start, hidden.shape[1], len(rope), rank, latent, layer.rope // 2),
            layer.query.data.nbytes,
        )


def _query(
    launcher: Launcher, workspace: Workspace, x: Tensor, norm: Norm, layer: Latents, *, rope: Tensor, rows: Rows
) -> None:
    heads, nope, latent = layer.up_key.shape
    assert layer.query.shape[0] == heads * (nope + layer.rope), (layer.query.shape, heads, nope, layer.rope)
    for part, name, grid, shared in _launches(launcher, "latent_query", x, norm, layer.query, resident=1):
        launcher.launch(
            *(Kernel(_source(layer.query), name), grid, _THREADS, shared),
            *(x[part], norm.weight, norm.eps, layer.query.data, layer.query.outer, layer.up_key, rope),
            *(rows.positions[part], workspace.queries[part], workspace.absorbed[part], workspace.counters[1:]),
            *(part.stop - part.start, x.shape[1], len(rope), heads, nope, latent, layer.rope // 2),
        )


def decode_latent_attention(
    launcher: Launcher, workspace: Workspace, q: Tensor, layer: Latents, *, rows: Rows, kv: LatentKV
) -> Tensor:
    """See `fwd.kernels.ops.LatentOps.decode_latent_attention`; q is what `latent_qkv` returned last."""
    assert rows.chunk < 0, "prefill rows"
    assert q.data_ptr() == workspace.queries.data_ptr(), "q is not what latent_qkv returned of this workspace"
    return attend(launcher, workspace, workspace.absorbed[: len(q)], layer, rows=rows, kv=kv)


def attend(
    launcher: Launcher, workspace: Workspace, absorbed: Tensor, layer: Latents, *, rows: Rows, kv: LatentKV
) -> Tensor:
    """Attention of up to 16 rows whose queries, bfloat16 [rows, heads, latent + rope], are of latents."""
    count, (heads, value, latent) = len(absorbed), layer.up_value.shape
    cells = rows.cells[kv.group]
    assert 1 <= count <= MAX_ROWS, f"{count} rows"
    assert cells.tables.is_contiguous(), cells.tables.stride()
    sixteens = 1 if heads <= 16 else 2
    launcher.launch(
        Kernel("latent_attention.cu", f"latent_attention_{KV_DTYPES[kv.latents.dtype]}_{16 * sixteens}"),
        (launcher.multiprocessors, 1, 1),
        _THREADS,
        shared_bytes(sixteens, kv.latents.element_size()),
        *(workspace.sums, workspace.marks, absorbed, kv.latents, kv.keys, kv.scales),
        *(rows.positions, rows.sequences, rows.parents, cells.slots, cells.tables, layer.up_value),
        *(count, heads, latent, layer.rope, cells.tables.shape[1], kv.page_size, layer.up_value.nbytes, layer.scale),
    )
    out = launcher.empty((count, heads * value), torch.bfloat16)
    parts = heads * -(-value // _VALUES)
    at_once = rows_at_once(count, parts, launcher.multiprocessors)
    launcher.launch(
        Kernel("latent_value.cu", "latent_value"),
        (parts, -(-count // at_once), 1),
        _THREADS,
        VALUE_SHARED,
        *(out, workspace.sums, workspace.marks, layer.up_value, rows.positions, rows.sequences),
        *(count, at_once, heads, latent, value),
    )
    return out


# ---- how work is cut: none of it shapes a result ----

VALUE_SHARED = _COLUMN * ((LATENT * 2 | 64) + PIECES * 4)  # bytes of a block that makes values


def shared_bytes(sixteens: int, itemsize: int) -> int:
    """Bytes of shared memory of a block that attends, for 16 or 32 heads (`Shape` in `cuda/latent_items.cuh`)."""
    heads, tile = 16 * sixteens, _KEYS * 2 * (LATENT + ROPE)
    stage = tile if itemsize == 2 else _KEYS * (LATENT + 2 * ROPE + 16)
    scores = heads * 72 * (4 * 4 + 2) + heads * 4
    return 2 * stage + (0 if stage == tile else tile) + scores


def rows_at_once(rows: int, parts: int, multiprocessors: int) -> int:
    """Rows of a block of `latent_value`: few where there are blocks to spare, for each reads all of a row's pieces."""
    fit = (n for n in (1, 2, 4) if parts * -(-rows // n) <= multiprocessors)
    return next(fit, _COLUMN)


def _launches(
    launcher: Launcher, name: str, x: Tensor, norm: Norm, weight: QTensor, *, resident: int
) -> list[tuple[slice, str, tuple[int, int, int], int]]:
    """Rows, kernel, grid and bytes of shared memory of each launch of a product with normed rows."""
    count, inputs = x.shape
    assert x.dtype == torch.bfloat16, x.dtype
    assert x.is_contiguous(), x.stride()
    assert inputs == weight.shape[1] == len(norm.weight), (inputs, weight.shape, len(norm.weight))
    block, wide = inputs_of(weight), weight.format != "bf16"  # quantised: one kernel, for 16 rows and fewer
    found = []
    for part in gemv.parts(count, inputs, launcher.shared_limit - _SECOND * wide, block):
        at_once = part.stop - part.start
        shared = gemv.staged_bytes(at_once, inputs, block) + (_SECOND if wide and at_once <= _COLUMN else 0)
        blocks = gemv.blocks(-(-weight.shape[0] // TILE), launcher, shared, resident)
        found.append((part, f"{name}_{16 if wide or at_once > _COLUMN else 8}", (blocks, 1, 1), shared))
    return found


def _source(weight: QTensor) -> str:
    return "latent_qkv.cu" if weight.format == "bf16" else f"latent_qkv_{name_of(weight)}.cu"


def query_rank(layer: Latents) -> int:
    """Numbers of a query latent; 0 where there is none."""
    return 0 if layer.q_norm is None else len(layer.q_norm.weight)


def check(layer: Latents, rope: Tensor, rows: Rows, kv: LatentKV) -> None:
    """Assert that the kernels take a layer, its rows and its cells."""
    heads, nope, latent = layer.up_key.shape
    refusal = supports(heads, query_rank(layer), latent, nope, layer.rope)
    assert refusal is None, refusal
    slots = rows.cells[kv.group].slots
    assert rope.dtype == torch.float32, rope.dtype
    assert rope.shape[1:] == (2, layer.rope // 2), tuple(rope.shape)
    assert rows.positions.dtype == slots.dtype == torch.int64, (rows.positions.dtype, slots.dtype)
    assert kv.latents.dtype in KV_DTYPES, kv.latents.dtype
    assert kv.keys.dtype == torch.bfloat16, kv.keys.dtype
    assert (kv.latents.dtype == torch.float8_e4m3fn) == (kv.scales is not None), kv.latents.dtype
    assert kv.latents.shape[1:] == (latent,), (tuple(kv.latents.shape), latent)
    assert kv.keys.shape[1:] == (layer.rope,), (tuple(kv.keys.shape), layer.rope)
    assert kv.scales is None or kv.scales.shape[1:] == (-(-latent // LATENT_BLOCK),), kv.scales.shape
    for up in (layer.up_key, layer.up_value):
        assert up.dtype == torch.bfloat16, up.dtype
        assert up.is_contiguous(), up.stride()
        assert up.shape[::2] == (heads, latent), (tuple(up.shape), heads, latent)
