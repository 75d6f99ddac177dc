"""The order in which kernels stream a bfloat16 matrix."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fwd.kernels.qtensor import QTensor

GROUP = 8  # outputs
BLOCK = 32  # inputs
TILE = 16  # outputs of a tensor core's tile, two groups; a matrix has whole tiles


def pack(data: Tensor) -> Tensor:
    """Return bfloat16 [out, in] as [groups, blocks, 8, 32], 16-byte loads in the order they are issued.

    Outputs stand in groups of 8, inputs in blocks of 32; outputs are padded with zeros to a multiple of 16, inputs to
    one of 32. With B = ⌈in / 32⌉ blocks a group, weight [o, i] begins at byte

        (o // 8)·B·512 + (i // 32)·512 + (o % 8)·64 + (i % 32)·2.

    So the 512 bytes of a block are one load of a warp: lane 4r + c has its 16 bytes of inputs 8c … 8c+7 of output r,
    which is what `mma.m16n8k16` wants of A in two steps. Any two groups make a tile: what belongs together (gate and
    up, both halves of a head) meets in one lane, whichever groups it stands in.
    """
    assert data.dtype == torch.bfloat16, data.dtype
    outputs, inputs = data.shape
    whole = data.new_zeros(-(-outputs // TILE) * TILE, -(-inputs // BLOCK) * BLOCK)
    whole[:outputs, :inputs] = data
    return whole.view(-1, GROUP, whole.shape[1] // BLOCK, BLOCK).transpose(1, 2).contiguous()


def unpack(weight: "QTensor", outputs: slice = slice(None), scratch: Tensor | None = None) -> Tensor:
    """Return the `outputs` (from a multiple of 8) of a packed weight as bfloat16 [outputs, in], rows 32·B apart.

    They are put in `scratch` [numbers], if given, which holds at least as many as their blocks.
    """
    assert weight.packed, "stands row by row"
    start, stop, step = outputs.indices(weight.shape[0])
    assert start % GROUP == 0, start
    assert step == 1, step
    found = weight.data[start // GROUP : -(-stop // GROUP)].transpose(1, 2)  # [groups, 8, blocks, 32]
    if scratch is None:
        scratch = weight.data.new_empty(found.numel())
    rows = scratch[: found.numel()].view(found.shape).copy_(found).view(-1, weight.data.shape[1] * BLOCK)
    return rows[: stop - start, : weight.shape[1]]
