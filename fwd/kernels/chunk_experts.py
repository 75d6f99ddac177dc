"""Experts of all rows of a prefill chunk (`cuda/chunk_experts_*.cu`): what `fwd.kernels.expert_kernels` launches then.

An item has more rows than one of a decode step has, and results stand in float32 until each row's are summed.
"""

from torch import Tensor

from fwd.kernels import gemv
from fwd.kernels.expert_items import THREADS, Workspace, item_bytes, pairs, turns
from fwd.kernels.launch import Argument, Kernel, Launcher
from fwd.kernels.ops import Active, Experts, Routed

CHUNK_ITEM = 32  # rows of an item


def gate_up(launcher: Launcher, workspace: Workspace, routed: Routed, experts: Experts, active: Active) -> None:
    """Write what experts make of rows."""
    x, (count, top_k, width) = routed.x, active.experts.shape
    shared_width = 0 if active.shared is None else active.shared.shape[1]
    for turn in turns(experts.gate_up, experts.shared_gate_up):
        units = turn.total(count * top_k * pairs(width), count * pairs(shared_width))
        _launch(
            launcher,
            turn.name,
            units,
            *(x, x, *turn.weights(experts.gate_up_bias), workspace.table, *active, None),
            *(count, top_k, x.shape[1], x.shape[1], 2 * width, 2 * shared_width),
            int(experts.activation == "clamped"),
        )


def down(
    launcher: Launcher, workspace: Workspace, active: Active, routed: Routed, experts: Experts, *, residual: Tensor
) -> None:
    """Add to `residual` what each row's experts give, weighted."""
    count, top_k, inputs = active.experts.shape
    outputs, shared_inputs = residual.shape[1], 0 if active.shared is None else active.shared.shape[1]
    for turn in turns(experts.down, experts.shared_down):
        _launch(
            launcher,
            turn.name,
            turn.total(count * top_k, count) * pairs(outputs // 2),
            *(active.experts, active.shared, *turn.weights(experts.down_bias)),
            *(workspace.table, None, None, workspace.products),
            *(count, top_k, inputs, shared_inputs, outputs, outputs, 0),
        )
    given = (workspace.products, routed.experts, routed.weights, residual)
    shared = int(experts.shared_down is not None)
    launcher.launch(Kernel("route.cu", "combine"), (count, 1, 1), THREADS, 0, *given, count, top_k, outputs, shared)


def _launch(launcher: Launcher, name: str, units: int, *arguments: Argument) -> None:
    size = item_bytes(CHUNK_ITEM)
    kernel = Kernel(f"chunk_experts_{name}.cu", "chunk_experts")
    launcher.launch(kernel, (gemv.blocks(units, launcher, size, resident=1), 1, 1), THREADS, size, *arguments)
