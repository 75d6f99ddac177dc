"""Mixtures of experts as kernels, in bfloat16 over packed weights: decode rows, or all rows of a prefill chunk.

`cuda/route.cu` chooses and sorts visits by expert; `cuda/experts_*.cu`, and of a chunk `cuda/chunk_experts_*.cu`, take
them in items of one expert and up to so many rows. A row has the same bits in both, and in any company.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fwd.kernels import chunk_experts, gemv
from fwd.kernels.chunk_experts import CHUNK_ITEM
from fwd.kernels.expert_items import EARLY, MEMBERS, PITCH, THREADS, WARPS, Workspace, item_bytes, pairs, turns
from fwd.kernels.launch import Kernel, Launcher
from fwd.kernels.ops import Active, Experts, Routed, Router
from fwd.kernels.packing import TILE, name_of
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import Rows
from fwd.kernels.sizes import ITEM, MAX_ROWS, mixture_products

MAX_EXPERTS, MAX_TOP_K, MAX_GROUPS = 512, 16, 32  # visits of 16 rows fit in shared memory
MAX_HIDDEN = 12288  # so do 8 rows of a router
_AHEAD = 16 << 20  # bytes that are fetched ahead at most: what experts of few rows leave of an L2 of 50 MB
_SCORINGS = {"softmax": 0, "topk_softmax": 1, "sigmoid": 2}


def supports(*, hidden: int, intermediate: int, experts: int, top_k: int, groups: int = 1) -> str | None:
    """Return what of a mixture these kernels do not take, or None."""
    for name, size in (("hidden", hidden), ("expert intermediate", intermediate)):
        if size % 8:
            return f"{name} size {size}: the expert kernels take multiples of 8"
    for name, size, most in (
        ("experts", experts, MAX_EXPERTS),
        ("experts a row", top_k, MAX_TOP_K),
        ("groups", groups, MAX_GROUPS),
        ("numbers a row", hidden, MAX_HIDDEN),
    ):
        if size > most:
            return f"{size} {name}: the expert kernels take up to {most}"
    return None


class Ahead(NamedTuple):
    """How the first `nbytes` of weights come to L2 while a router chooses: by planes of as many blocks as it has.

    Block i of all of them fetches bytes i·each … (i + 1)·each, as far as they are among these.
    """

    nbytes: int
    planes: int
    each: int

    @classmethod
    def of(cls, size: int, blocks: int, multiprocessors: int) -> "Ahead":
        """For weights of `size` bytes, beside `blocks` blocks that choose: one on each multiprocessor that is left."""
        nbytes = min(size, _AHEAD) // 16 * 16
        if not nbytes:
            return cls(0, 0, 0)
        planes = max(1, multiprocessors // blocks - 1)
        return cls(nbytes, planes, -(-nbytes // (16 * planes * blocks)) * 16)


def route(launcher: Launcher, workspace: Workspace, hidden: Tensor, router: Router, rows: Rows) -> Routed:
    """See `fwd.kernels.ops.ExpertOps.route`; the table of the workspace is of these rows from here on."""
    count, inputs = hidden.shape
    experts, top_k = router.weight.shape[0], router.top_k
    _check_router(hidden, router, rows)
    parts = -(-count // ITEM)
    assert workspace.logits.numel() >= count * experts, (count, experts)
    assert workspace.table.numel() >= 4 + 8 * count * top_k, (count, top_k)
    assert len(workspace.counters) > parts, parts
    routed = Routed(
        launcher.empty((count, inputs), torch.bfloat16),
        launcher.empty((count, top_k), torch.int32),
        launcher.empty((count, top_k), torch.float32),
    )
    shared = route_bytes(count, inputs, top_k)
    tiles = gemv.blocks(-(-experts // TILE), launcher, shared)
    later = None if router.ahead is None or count > MAX_ROWS else router.ahead.data  # a chunk unpacks weights anyway
    ahead = Ahead.of(0 if later is None else later.nbytes, tiles * parts, launcher.multiprocessors)
    launcher.launch(
        Kernel("route.cu", "route"),
        (tiles, parts, 1 + ahead.planes),
        THREADS,
        shared,
        *(hidden, router.norm.weight, router.norm.eps, router.weight.data, router.bias, router.correction),
        *(rows.sequences, *routed, workspace.table, workspace.logits, workspace.counters),
        *(count, inputs, experts, top_k, router.groups, router.top_groups, _SCORINGS[router.scoring]),
        *(int(router.normalize), router.scale, _item(count), later, ahead.nbytes, ahead.each),
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
    launch = chunk_experts.gate_up if count > MAX_ROWS else _step_gate_up
    launch(launcher, workspace, routed, experts, active)
    return active


def _step_gate_up(launcher: Launcher, workspace: Workspace, routed: Routed, experts: Experts, active: Active) -> None:
    count, top_k, width = active.experts.shape
    shared_width = 0 if active.shared is None else active.shared.shape[1]
    ahead = experts.down.data if name_of(experts.down) == name_of(experts.gate_up) else None
    for turn in turns(experts.gate_up, experts.shared_gate_up):
        units = turn.total(count * top_k * pairs(width), count * pairs(shared_width))
        launcher.launch(
            Kernel(f"experts_{turn.name}.cu", "expert_gate_up"),
            (gemv.blocks(units, launcher, item_bytes(ITEM)), 1, 1),
            THREADS,
            item_bytes(ITEM),
            *(routed.x, *turn.weights(experts.gate_up_bias), ahead if turn.own else None),
            *(workspace.table, *active, count, top_k, routed.x.shape[1], width, shared_width),
            int(experts.activation == "clamped"),
        )


def expert_down(
    launcher: Launcher, workspace: Workspace, active: Active, routed: Routed, experts: Experts, *, residual: Tensor
) -> Tensor:
    """See `fwd.kernels.ops.ExpertOps.expert_down`; `residual` is overwritten and returned."""
    count, top_k, inputs = active.experts.shape
    outputs = residual.shape[1]
    own, shared = experts.down, experts.shared_down
    _check_matrix(own, inputs, outputs)
    if shared is not None:
        assert active.shared is not None, "the shared expert's down comes with its gate and up"
        _check_matrix(shared, active.shared.shape[1], outputs)
    _check_bias(experts.down_bias, own)
    assert residual.dtype == torch.bfloat16, residual.dtype
    assert residual.is_contiguous(), residual.stride()
    assert len(residual) == len(routed.experts) == count, (len(residual), count)
    assert workspace.products.numel() >= mixture_products(count, top_k) * outputs, (count, outputs)
    launch = chunk_experts.down if count > MAX_ROWS else _step_down
    launch(launcher, workspace, active, routed, experts, residual=residual)
    return residual


def _step_down(
    launcher: Launcher, workspace: Workspace, active: Active, routed: Routed, experts: Experts, *, residual: Tensor
) -> None:
    count, top_k, inputs = active.experts.shape
    outputs, launches = residual.shape[1], turns(experts.down, experts.shared_down)
    shared_inputs = 0 if active.shared is None else active.shared.shape[1]
    for turn in launches:
        size = down_bytes(count * top_k if turn.own else 0, count if turn.shared else 0)
        launcher.launch(
            Kernel(f"experts_{turn.name}.cu", "expert_down"),
            (gemv.blocks(-(-outputs // TILE), launcher, size), 1, 1),
            THREADS,
            size,
            *(active.experts, active.shared, *turn.weights(experts.down_bias)),
            *(workspace.table, routed.experts, routed.weights, residual),
            *(workspace.products if launches[1:] else None, count, top_k, inputs, shared_inputs, outputs),
        )


def route_bytes(rows: int, inputs: int, top_k: int) -> int:
    """Bytes of shared memory of a block of `route`: its normed rows, then its scores, then all visits."""
    staged = gemv.staged_bytes(min(rows, ITEM), inputs)
    return max(staged, 4 * WARPS * MAX_EXPERTS, 4 * (rows * top_k + WARPS))


def down_bytes(visits: int, shared: int) -> int:
    """Bytes of shared memory of a block of `expert_down` for visits to experts, and rows that visit the shared one."""
    items = visits + -(-shared // ITEM)
    return 4 * (3 * visits + MEMBERS * PITCH * (visits + shared) + EARLY * items)


def _item(rows: int) -> int:
    return ITEM if rows <= MAX_ROWS else CHUNK_ITEM


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
