"""The matrix-vector kernels (`cuda/gemv*.cu`, `cuda/qkv*.cu`): 1–16 rows, bfloat16, over packed weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fwd.errors import ModelError
from fwd.kernels.kv import KV
from fwd.kernels.launch import Kernel, Launcher
from fwd.kernels.ops import QKV, Norm
from fwd.kernels.packing import BLOCK, TILE, inputs_of, name_of
from fwd.kernels.paged_attention import HEAD_DIMS, KV_DTYPES
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import Rows
from fwd.kernels.sizes import MAX_ROWS

_THREADS = 256
_WARPS = 8
_COLUMN = 8  # rows: the width of a tensor core's tile
_SUMS = 8 * 20 * 4  # bytes of a warp's sums of a tile and a column
_RESIDENT = 2  # blocks that share a multiprocessor's registers
_RESERVED = 1024  # bytes of shared memory that every block takes besides its own
_CROWDED = 5  # rows from which reading them again for every tile costs as much as the blocks it spares


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """What the blocks of a `qkv` leave for each other, for the widest layer; no two launches at once share one."""

    projected: Tensor  # bfloat16 [MAX_ROWS · heads of q, k and v · head_dim]
    counters: Tensor  # int32 [heads of q, k and v]: 0 between launches

    @classmethod
    def of(cls, device: torch.device, heads: int, head_dim: int) -> "Workspace":
        """Return one for `heads` heads of q, k and v together: `sizes.projection_bytes`."""
        projected = torch.empty(MAX_ROWS * heads * head_dim, dtype=torch.bfloat16, device=device)
        return cls(projected, torch.zeros(heads, dtype=torch.int32, device=device))


def check_model(*, hidden: int, intermediate: int, head_dim: int) -> None:
    """Raise ModelError if a model has shapes that the kernels do not take."""
    for field, value in (("hidden_size", hidden), ("intermediate_size", intermediate)):
        if value % 8:
            raise ModelError(f"{field} is {value}: the kernels take multiples of 8; use --device cpu")
    if head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        raise ModelError(f"head_dim is {head_dim}: the kernels take one of {known}; use --device cpu")


def qkv(
    launcher: Launcher, workspace: Workspace, hidden: Tensor, layer: QKV, rope: Tensor, *, rows: Rows, kv: KV
) -> Tensor:
    """See `fwd.kernels.ops.Ops.qkv`; q of a padding row is that of its position, its slot is −1."""
    count, inputs = _checked(hidden, layer.norm, layer.weight)
    heads = layer.weight.shape[0] // layer.head_dim - 2 * layer.kv_heads
    slots = rows.cells[kv.group].slots
    _check_qkv(layer, rope, kv)
    assert workspace.projected.numel() >= count * layer.weight.shape[0], tuple(workspace.projected.shape)
    assert len(workspace.counters) >= heads + 2 * layer.kv_heads, tuple(workspace.counters.shape)
    assert rows.positions.dtype == slots.dtype == torch.int64, (rows.positions.dtype, slots.dtype)
    assert len(rows.positions) == len(slots) == count, (len(rows.positions), len(slots), count)
    q = launcher.empty((count, heads, layer.head_dim), torch.bfloat16)
    q_norm, k_norm = layer.q_norm, layer.k_norm
    whole = layer.weight.format != "bf16" or q_norm is not None or kv.key_scales is not None
    name, block = "qkv_whole" if whole else "qkv_paired", inputs_of(layer.weight)
    for part in parts(count, inputs, launcher.shared_limit, block):
        at_once = part.stop - part.start
        shared = staged_bytes(at_once, inputs, block)
        launcher.launch(
            Kernel(_source("qkv", layer.weight), f"{name}_{_columns(at_once) * _COLUMN}"),
            (blocks(layer.weight.shape[0] // TILE, launcher, shared), 1, 1),
            _THREADS,
            shared,
            *(hidden[part], layer.norm.weight, layer.norm.eps, layer.weight.data, layer.weight.outer, layer.bias),
            *(q_norm.weight if q_norm else None, q_norm.eps if q_norm else 0.0),
            *(k_norm.weight if k_norm else None, k_norm.eps if k_norm else 0.0),
            *(rope, rows.positions[part], slots[part], kv.keys, kv.values, kv.key_scales, kv.value_scales),
            *(q[part], workspace.projected, workspace.counters),
            *(at_once, inputs, len(rope), heads, layer.kv_heads, layer.head_dim),
        )
    return q


def linear(launcher: Launcher, x: Tensor, weight: QTensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `fwd.kernels.ops.Ops.linear`; `residual` is overwritten and returned."""
    count, inputs = _checked(x, None, weight)
    outputs = weight.shape[0]
    assert residual.shape == (count, outputs), (tuple(residual.shape), count, outputs)
    assert residual.is_contiguous(), residual.stride()
    assert residual.dtype == torch.bfloat16, residual.dtype
    assert bias is None or bias.shape == (outputs,), outputs
    columns = _columns(count)
    wide = tiles_at_once(outputs, count, launcher.multiprocessors) if weight.format == "bf16" else 1
    shared = 2 * _WARPS * wide * columns * _SUMS
    resident = 1 if wide * columns > _RESIDENT else _RESIDENT
    launcher.launch(
        Kernel(_source("gemv", weight), f"linear_{wide}x{columns * _COLUMN}"),
        (blocks(-(-outputs // (wide * TILE)), launcher, shared, resident), 1, 1),
        _THREADS,
        shared,
        *(x, weight.data, weight.outer, residual, bias, count, inputs, outputs),
    )
    return residual


def gate_up(launcher: Launcher, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor:
    """See `fwd.kernels.ops.Ops.gate_up`; the intermediate width is a multiple of 8."""
    width = weight.shape[0] // 2
    assert width % 8 == 0, width
    out = launcher.empty((len(hidden), width), torch.bfloat16)
    _normed(launcher, "gate_up", hidden, norm, weight, out=out)
    return out


def head(launcher: Launcher, hidden: Tensor, norm: Norm, weight: QTensor) -> Tensor:
    """See `fwd.kernels.ops.Ops.head`."""
    logits = launcher.empty((len(hidden), weight.shape[0]), torch.float32)
    _normed(launcher, "head", hidden, norm, weight, out=logits)
    return logits


def embed(launcher: Launcher, ids: Tensor, weight: QTensor, next_ids: Tensor | None = None) -> Tensor:
    """See `fwd.kernels.ops.Ops.embed`; the weight may be packed, as a head is that shares it.

    An id −1−i is `next_ids[i]` (int64 [lines]), the token that line i drew in the step before. Ids that are none, as
    those of padding rows may be, become the next that is one.
    """
    vocab, inputs = weight.shape
    assert weight.data.dtype == torch.bfloat16, weight.data.dtype
    assert inputs % 8 == 0, inputs
    assert ids.dtype == torch.int64, ids.dtype
    assert next_ids is None or next_ids.dtype == torch.int64, next_ids
    hidden = launcher.empty((len(ids), inputs), torch.bfloat16)
    lines = 0 if next_ids is None else len(next_ids)
    arguments = (ids, next_ids, weight.data, hidden, lines, inputs, vocab, int(weight.packed))
    launcher.launch(Kernel("gemv.cu", "embed"), (len(ids), 1, 1), _THREADS, 0, *arguments)
    return hidden


# ---- how work is cut: none of it shapes a result ----


def staged_bytes(rows: int, inputs: int, block: int = BLOCK) -> int:
    """Bytes of shared memory of a block that norms `rows` rows: they, the norm's weight, sums, places (gemv.cuh).

    The weights stand in blocks of `block` inputs.
    """
    pitch = -(-inputs // block) * block * 2 | 64
    return (rows + 1) * pitch + rows * (_WARPS * 4 + 8) + 2 * _WARPS * _columns(rows) * _SUMS


def parts(rows: int, inputs: int, limit: int, block: int = BLOCK) -> Iterator[slice]:
    """Cut rows where so many do not fit in `limit` bytes of shared memory: the weights are then read once a part."""
    at_once = rows
    while staged_bytes(at_once, inputs, block) > limit:
        assert at_once > 1, f"a row of {inputs} inputs does not fit in {limit} bytes of shared memory"
        at_once = max(8 * (at_once > 8), at_once // 2)
    return (slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once))


def blocks(tiles: int, launcher: Launcher, shared: int, resident: int = _RESIDENT) -> int:
    """Blocks of a grid that works off `tiles` in turn: as many as run at once."""
    fit = (launcher.shared_limit + _RESERVED) // (shared + _RESERVED)
    return min(tiles, launcher.multiprocessors * max(1, min(resident, fit)))


def tiles_at_once(outputs: int, rows: int, multiprocessors: int) -> int:
    """Tiles that a block of `linear` takes at once: two halve what is read of many rows, if enough blocks remain."""
    whole, many = outputs % (2 * TILE) == 0, outputs // (2 * TILE) >= 0.9 * multiprocessors
    return 2 if whole and many and rows >= _CROWDED else 1


# ---- what must be read and written, whatever the kernel: the ceiling of a bench ----


def qkv_bytes(rows: int, hidden: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of weights, hidden, q and new cells in bfloat16."""
    outputs = (heads + 2 * kv_heads) * head_dim
    return 2 * (outputs * hidden + hidden + rows * (hidden + outputs))


def linear_bytes(rows: int, inputs: int, outputs: int) -> int:
    """Bytes of weights, x, residual and result."""
    return 2 * (outputs * inputs + rows * (inputs + 2 * outputs))


def gate_up_bytes(rows: int, hidden: int, intermediate: int) -> int:
    """Bytes of weights, hidden and result."""
    return 2 * (2 * intermediate * hidden + hidden + rows * (hidden + intermediate))


def head_bytes(rows: int, hidden: int, vocab: int) -> int:
    """Bytes of weights, hidden and logits."""
    return 2 * (vocab * hidden + hidden + rows * hidden) + 4 * rows * vocab


def embed_bytes(rows: int, hidden: int) -> int:
    """Bytes of ids, weights and hidden."""
    return rows * (8 + 2 * 2 * hidden)


def _normed(launcher: Launcher, name: str, hidden: Tensor, norm: Norm, weight: QTensor, *, out: Tensor) -> None:
    count, inputs = _checked(hidden, norm, weight)
    block = inputs_of(weight)
    for part in parts(count, inputs, launcher.shared_limit, block):
        at_once = part.stop - part.start
        shared = staged_bytes(at_once, inputs, block)
        launcher.launch(
            Kernel(_source("gemv", weight), f"{name}_{_columns(at_once) * _COLUMN}"),
            (blocks(-(-weight.shape[0] // TILE), launcher, shared), 1, 1),
            _THREADS,
            shared,
            *(hidden[part], norm.weight, norm.eps, weight.data, weight.outer),
            *(out[part], at_once, inputs, out.shape[1]),
        )


def _source(family: str, weight: QTensor) -> str:
    return f"{family}.cu" if weight.format == "bf16" else f"{family}_{name_of(weight)}.cu"


def _columns(rows: int) -> int:
    return -(-rows // _COLUMN)


def _checked(x: Tensor, norm: Norm | None, weight: QTensor) -> tuple[int, int]:
    """The shape of the rows, which fits the norm and the weight."""
    assert weight.packed, "a weight in rows"
    assert weight.data.dtype == (torch.bfloat16 if weight.format == "bf16" else torch.uint8), weight.data.dtype
    assert x.dtype == torch.bfloat16, x.dtype
    assert x.is_contiguous(), x.stride()
    count, inputs = x.shape
    assert 1 <= count <= MAX_ROWS, f"{count} rows of 1 to {MAX_ROWS}"
    assert inputs == weight.shape[1], (inputs, weight.shape)
    assert inputs % 8 == 0, inputs
    assert norm is None or (norm.weight.shape == (inputs,) and norm.weight.dtype == torch.bfloat16), inputs
    return count, inputs


def _check_qkv(layer: QKV, rope: Tensor, kv: KV) -> None:
    dim = layer.head_dim
    assert dim % TILE == 0, dim
    assert dim <= max(HEAD_DIMS), dim
    assert rope.shape[1:] == (2, dim // 2), tuple(rope.shape)
    assert rope.dtype == torch.float32, rope.dtype
    assert rope.is_contiguous(), rope.stride()
    assert kv.keys.dtype in KV_DTYPES, kv.keys.dtype
    assert (kv.key_scales is None) == (kv.keys.dtype == torch.bfloat16), kv.keys.dtype
    assert (layer.q_norm is None) == (layer.k_norm is None), "one norm of heads"
    for cells in (kv.keys, kv.values):
        assert cells.shape[1:] == (layer.kv_heads, dim), (tuple(cells.shape), layer.kv_heads, dim)
        assert cells.is_contiguous(), cells.stride()
