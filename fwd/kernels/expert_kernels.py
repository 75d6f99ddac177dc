"""Mixtures of experts as kernels (`cuda/route.cu`, `cuda/experts_*.cu`): 1–16 rows, bfloat16, over packed weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fwd.kernels import gemv
from fwd.kernels.launch import Kernel, Launcher
from fwd.kernels.ops import Active, Experts, Routed, Router
from fwd.kernels.packing import TILE, name_of
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import MAX_ROWS, Rows

MAX_EXPERTS, MAX_TOP_K, MAX_GROUPS = 512, 32, 32
COLUMN = 8  # rows of an item: visits of an expert that one read of its weights is for
_THREADS, _WARPS = 256, 8
_PITCH = 20  # floats from the sums of a visit to those of the next
_EARLY = 32  # floats of an item's biases and factors
_SCORINGS = {"softmax": 0, "topk_softmax": 1, "sigmoid": 2}


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """What kernels leave for each other between `route` and `expert_down`, for layers that take turns.

    `table` holds the number of items; from word 4 on the items, by expert: number, first of its visits in order, how
    many, 0; then the visits in order, row · top_k + place; then where each visit stands there, and its item.
    """

    table: Tensor  # int32 [4 + 7 · visits]
    logits: Tensor  # float32 [rows · experts]
    beside: Tensor  # float32 [rows · hidden], for shared experts in a format of their own
    counters: Tensor  # int32 [rows / 8 + 1]: 0 between launches

    @classmethod
    def of(cls, launcher: Launcher, hidden: int, experts: int, top_k: int, *, rows: int = MAX_ROWS) -> "Workspace":
        """Return one of `workspace_bytes`."""
        parts = -(-rows // COLUMN)
        return cls(
            launcher.empty((4 + 7 * rows * top_k,), torch.int32),
            launcher.empty((rows * experts,), torch.float32),
            launcher.empty((rows * hidden,), torch.float32),
            torch.zeros(parts + 1, dtype=torch.int32, device=launcher.device),
        )


def workspace_bytes(hidden: int, experts: int, top_k: int, rows: int = MAX_ROWS) -> int:
    """Bytes of a `Workspace`."""
    return 4 * (4 + 7 * rows * top_k + rows * (experts + hidden) + -(-rows // COLUMN) + 1)


def supports(*, hidden: int, intermediate: int, experts: int, top_k: int, groups: int = 1) -> str | None:
    """Return what of a mixture these kernels do not take, or None."""
    for name, size in (("hidden", hidden), ("expert intermediate", intermediate)):
        if size % 8:
            return f"{name} size {size}: the expert kernels take multiples of 8"
    for name, size, most in (
        ("experts", experts, MAX_EXPERTS),
        ("experts a row", top_k, MAX_TOP_K),
        ("groups", groups, MAX_GROUPS),
    ):
        if size > most:
            return f"{size} {name}: the expert kernels take up to {most}"
    return None


def route(launcher: Launcher, workspace: Workspace, hidden: Tensor, router: Router, rows: Rows) -> Routed:
    """See `fwd.kernels.ops.ExpertOps.route`; the table of the workspace is of these rows from here on."""
    count, inputs = hidden.shape
    experts, top_k = router.weight.shape[0], router.top_k
    _check_router(hidden, router, rows)
    assert workspace.logits.numel() >= count * experts, (count, experts)
    assert workspace.table.numel() >= 4 + 7 * count * top_k, (count, top_k)
    parts = -(-count // COLUMN)
    assert len(workspace.counters) > parts, parts
    routed = Routed(
        launcher.empty((count, inputs), torch.bfloat16),
        launcher.empty((count, top_k), torch.int32),
        launcher.empty((count, top_k), torch.float32),
    )
    at_once = min(count, COLUMN)
    shared = max(gemv.staged_bytes(at_once, inputs), 4 * _WARPS * MAX_EXPERTS, 4 * (count * top_k + _WARPS))
    launcher.launch(
        Kernel("route.cu", "route"),
        (gemv.blocks(-(-experts // TILE), launcher, shared), parts, 1),
        _THREADS,
        shared,
        *(hidden, router.norm.weight, router.norm.eps, router.weight.data, router.bias, router.correction),
        *(rows.sequences, *routed, workspace.table, workspace.logits, workspace.counters),
        *(count, inputs, experts, top_k, router.groups, router.top_groups, _SCORINGS[router.scoring]),
        *(int(router.normalize), router.scale, COLUMN),
    )
    return routed


def expert_gate_up(launcher: Launcher, workspace: Workspace, routed: Routed, experts: Experts) -> Active:
    """See `fwd.kernels.ops.ExpertOps.expert_gate_up`, of what was routed last with this workspace."""
    count, inputs = routed.x.shape
    top_k, width = routed.experts.shape[1], experts.gate_up.shape[1] // 2
    own, shared = experts.gate_up, experts.shared_gate_up
    shared_width = 0 if shared is None else shared.shape[0] // 2
    _check_matrix(own, inputs, 2 * width)
    if shared is not None:
        _check_matrix(shared, inputs, 2 * shared_width)
    _check_bias(experts.gate_up_bias, own)
    assert width % 8 == shared_width % 8 == 0, (width, shared_width)
    active = Active(
        launcher.empty((count, top_k, width), torch.bfloat16),
        None if shared is None else launcher.empty((count, shared_width), torch.bfloat16),
    )
    for weight, alone in _launches(own, shared):
        given = weight if weight is own else None
        units = (count * top_k * width if given else 0) + (count * shared_width if alone else 0)
        size = 2 * (_WARPS * COLUMN * _PITCH + _EARLY) * 4
        launcher.launch(
            Kernel(_source(weight), "expert_gate_up"),
            (gemv.blocks(units // 8, launcher, size), 1, 1),
            _THREADS,
            size,
            *(routed.x, *_pointers(given), experts.gate_up_bias, *_pointers(alone), workspace.table, *active),
            *(count, top_k, inputs, width, shared_width, int(experts.activation == "clamped")),
        )
    return active


def expert_down(
    launcher: Launcher, workspace: Workspace, active: Active, routed: Routed, experts: Experts, *, residual: Tensor
) -> Tensor:
    """See `fwd.kernels.ops.ExpertOps.expert_down`; `residual` is overwritten and returned."""
    count, top_k, inputs = active.experts.shape
    outputs = residual.shape[1]
    own, shared = experts.down, experts.shared_down
    shared_inputs = 0 if active.shared is None else active.shared.shape[1]
    _check_matrix(own, inputs, outputs)
    if shared is not None:
        _check_matrix(shared, shared_inputs, outputs)
    _check_bias(experts.down_bias, own)
    assert residual.dtype == torch.bfloat16, residual.dtype
    assert residual.is_contiguous(), residual.stride()
    assert len(residual) == len(routed.experts) == count, (len(residual), count)
    launches = _launches(own, shared)
    assert workspace.beside.numel() >= count * outputs, (count, outputs)
    for weight, alone in launches:
        given = weight if weight is own else None
        size = down_bytes(count * top_k if given else 0, count if alone else 0)
        launcher.launch(
            Kernel(_source(weight), "expert_down"),
            (gemv.blocks(-(-outputs // TILE), launcher, size), 1, 1),
            _THREADS,
            size,
            *(active.experts, active.shared, *_pointers(given), experts.down_bias, *_pointers(alone)),
            *(workspace.table, routed.experts, routed.weights, residual),
            *(workspace.beside if len(launches) > 1 else None, count, top_k, inputs, shared_inputs, outputs),
        )
    return residual


def down_bytes(visits: int, shared: int) -> int:
    """Bytes of shared memory of a block of `expert_down` for visits to experts, and rows that visit the shared one."""
    items = visits + -(-shared // COLUMN)
    return 4 * (3 * visits + _WARPS * _PITCH * (visits + shared) + _EARLY * items)


def _launches(own: QTensor, shared: QTensor | None) -> list[tuple[QTensor, QTensor | None]]:
    """Whose format a launch has, and its shared expert: one in another format goes first, alone."""
    if shared is None or name_of(shared) == name_of(own):
        return [(own, shared)]
    return [(shared, shared), (own, None)]


def _pointers(weight: QTensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if weight is None else (weight.data, weight.outer)


def _source(weight: QTensor) -> str:
    return f"experts_{name_of(weight)}.cu"


def _check_router(hidden: Tensor, router: Router, rows: Rows) -> None:
    count, inputs = hidden.shape
    experts = router.weight.shape[0]
    assert count >= 1, count
    assert hidden.dtype == torch.bfloat16, hidden.dtype
    assert hidden.is_contiguous(), hidden.stride()
    assert (router.weight.format, router.weight.packed) == ("bf16", True), router.weight.format
    assert router.weight.shape == (experts, inputs), (router.weight.shape, inputs)
    assert router.norm.weight.shape == (inputs,), tuple(router.norm.weight.shape)
    assert router.norm.weight.dtype == torch.bfloat16, router.norm.weight.dtype
    assert router.top_k <= experts, (router.top_k, experts)
    assert experts % router.groups == 0, (experts, router.groups)
    refusal = supports(hidden=inputs, intermediate=8, experts=experts, top_k=router.top_k, groups=router.groups)
    assert refusal is None, refusal
    for each in (router.bias, router.correction):
        assert each is None or (each.dtype == torch.float32 and each.shape == (experts,)), experts
    assert rows.sequences.dtype == torch.int64, rows.sequences.dtype
    assert len(rows.sequences) == count, (len(rows.sequences), count)


def _check_matrix(weight: QTensor, inputs: int, outputs: int) -> None:
    assert weight.packed, "a weight in rows"
    assert weight.shape[-2:] == (outputs, inputs), (weight.shape, outputs, inputs)
    assert inputs % 8 == outputs % 8 == 0, (inputs, outputs)


def _check_bias(bias: Tensor | None, weight: QTensor) -> None:
    assert bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:2]), weight.shape
    assert bias is None or bias.is_contiguous(), weight.shape
