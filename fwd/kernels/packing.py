"""The order in which kernels stream a matrix, in each format that they take."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fwd.errors import ModelError
from fwd.kernels import packing_formats as formats
from fwd.kernels.preparing import prepared

if TYPE_CHECKING:
    from fwd.kernels.qtensor import QTensor

GROUP = 8  # outputs
BLOCK = 32  # inputs of a sub-block: of a block of bfloat16
TILE = 16  # outputs of a tensor core's tile, two groups; a matrix has whole tiles
NUMBERS = 512  # bytes of the numbers of a block
_SLAB = 4 << 20  # bytes of numbers that are packed at a time: what it takes beside the weight is a few times as much


class Layout(NamedTuple):
    """How a format is streamed."""

    subs: int  # sub-blocks of 32 inputs in a block
    scales: int  # bytes of a block's scales
    pack: Callable[["QTensor", int, int], Tensor]
    restore: Callable[["QTensor", Tensor], "QTensor"]

    @property
    def inputs(self) -> int:
        """Of a block."""
        return self.subs * BLOCK

    @property
    def nbytes(self) -> int:
        """Of a block."""
        return NUMBERS + self.scales


LAYOUTS = {
    "fp8": Layout(2, 0, formats.pack_fp8, formats.restore_fp8),
    "mxfp4": Layout(4, 32, formats.pack_mxfp4, formats.restore_mxfp4),
    "nvfp4": Layout(4, 64, formats.pack_nvfp4, formats.restore_nvfp4),
    "int4_32": Layout(4, 96, formats.pack_int4_32, formats.restore_int4_32),
    "int4_128": Layout(4, 32, formats.pack_int4_128, formats.restore_int4_128),
}


def name_of(weight: "QTensor") -> str:
    """Return what a packed weight's kernels are named after."""
    assert weight.packed, "a weight in rows"
    return f"int4_{weight.block[1]}" if weight.format == "int4" else weight.format


def inputs_of(weight: "QTensor") -> int:
    """Return the inputs of a block of a packed weight."""
    return BLOCK if weight.format == "bf16" else LAYOUTS[name_of(weight)].inputs


def pack(weight: "QTensor") -> "QTensor":
    """Return a weight [out, in], or each of [experts, out, in] one after the other, as [groups, blocks, bytes].

    Outputs stand in groups of 8, inputs in sub-blocks of 32, of which a block has S: 1 of bf16, 2 of fp8, 4 of the
    others. Outputs are padded with zeros to a multiple of 16, inputs to one of 32·S. A block begins with 512 bytes of
    numbers, 16 of each lane of a warp: lane 4r + c has, of output r of the group, inputs 32j + 8c … +7 of each
    sub-block j, one after the other: what `mma.m16n8k16` wants of A in two steps. Any two groups make a tile: what
    belongs together (gate and up, both halves of a head) meets in one lane, whichever groups it stands in. Scales
    follow the numbers of their block, as `packing_formats` says; what is of whole outputs is in `outer`, float32
    [groups, 8 + …].

    So bfloat16 stands as [groups, blocks, 8, 32]: with B blocks a group, weight [o, i] begins at byte

        (o // 8)·B·512 + (i // 32)·512 + (o % 8)·64 + (i % 32)·2.

    Raises ModelError for a weight that this cannot hold exactly.
    """
    assert not weight.packed, "packed twice"
    return _matrix(weight) if len(weight.shape) == 2 else _stack(weight)


def _matrix(weight: "QTensor") -> "QTensor":
    if weight.format == "bf16":
        return replace(weight, data=_bf16(weight), packed=True)
    if weight.format not in {"fp8", "mxfp4", "nvfp4", "int4"}:
        raise ModelError(f"the kernels take no weights in {weight.format}: use --dtype bfloat16 or --device cpu")
    ready = prepared(weight)
    layout = LAYOUTS[name_of(replace(ready, packed=True))]
    data = _slabs(ready, layout)
    return replace(ready, data=data, scales=None, zeros=None, outer=formats.factors(ready), packed=True)


def _stack(weight: "QTensor") -> "QTensor":
    """Matrix by matrix: what it takes beside is what one takes."""
    parts = (_matrix(weight.expert(index)) for index in range(weight.shape[0]))
    first = next(parts)
    data = first.data.new_empty(weight.shape[0], *first.data.shape)
    outer = None if first.outer is None else first.outer.new_empty(weight.shape[0], *first.outer.shape)
    for index, part in enumerate(chain((first,), parts)):
        data[index] = part.data
        if outer is not None and part.outer is not None:
            outer[index] = part.outer
    return replace(first, data=data, outer=outer, shape=weight.shape)


def restore(weight: "QTensor", outputs: slice = slice(None)) -> "QTensor":
    """Return the `outputs` (from a multiple of 8) of a packed weight row by row again, number by number the same.

    What `preparing.prepared` changes stays changed.
    """
    assert weight.packed, "stands row by row"
    start, stop, step = outputs.indices(weight.shape[-2])
    assert (start % GROUP, step) == (0, 1), outputs
    shape = (*weight.shape[:-2], stop - start, weight.shape[-1])
    if weight.format == "bf16":
        return replace(weight, data=_rows(weight, start, stop), shape=shape, packed=False)
    groups = slice(start // GROUP, -(-stop // GROUP))
    outer = None if weight.outer is None else weight.outer[..., groups, :]
    part = replace(weight, data=weight.data[..., groups, :, :], outer=outer, shape=shape)
    return replace(LAYOUTS[name_of(weight)].restore(part, part.data), shape=shape, packed=False)


def unpack(weight: "QTensor", outputs: slice = slice(None), scratch: Tensor | None = None) -> Tensor:
    """Return the `outputs` (from a multiple of 8) of a packed weight as bfloat16 [outputs, in], rows 32·B apart.

    They are put in `scratch` [numbers], if given, which holds at least as many as their blocks.
    """
    assert weight.packed, "stands row by row"
    assert weight.format == "bf16", weight.format
    start, stop, step = outputs.indices(weight.shape[0])
    assert start % GROUP == 0, start
    assert step == 1, step
    found = weight.data[start // GROUP : -(-stop // GROUP)].transpose(1, 2)  # [groups, 8, blocks, 32]
    if scratch is None:
        scratch = weight.data.new_empty(found.numel())
    rows = scratch[: found.numel()].view(found.shape).copy_(found).view(-1, weight.data.shape[1] * BLOCK)
    return rows[: stop - start, : weight.shape[1]]


def _bf16(weight: "QTensor") -> Tensor:
    """bfloat16 [groups, blocks, 8, 32]."""
    outputs, inputs = weight.shape
    whole = weight.data.new_zeros(-(-outputs // TILE) * TILE, -(-inputs // BLOCK) * BLOCK)
    whole[:outputs, :inputs] = weight.data
    return whole.view(-1, GROUP, whole.shape[1] // BLOCK, BLOCK).transpose(1, 2).contiguous()


def _rows(weight: "QTensor", start: int, stop: int) -> Tensor:
    """bfloat16 [.., stop − start, in], a copy."""
    found = weight.data[..., start // GROUP : -(-stop // GROUP), :, :, :].transpose(-3, -2)
    rows = found.reshape(*found.shape[:-4], -1, found.shape[-2] * BLOCK)
    return rows[..., : stop - start, : weight.shape[-1]].contiguous()


def _slabs(weight: "QTensor", layout: Layout) -> Tensor:
    """uint8 [groups, blocks, bytes]."""
    outputs, inputs = weight.shape
    groups, blocks = -(-outputs // TILE) * TILE // GROUP, -(-inputs // layout.inputs)
    whole = torch.empty(groups, blocks, layout.nbytes, dtype=torch.uint8, device=weight.data.device)
    step = max(1, _SLAB // (blocks * NUMBERS * 2)) * TILE
    for start in range(0, outputs, step):
        part = layout.pack(weight, start, min(start + step, outputs))
        whole[start // GROUP : start // GROUP + len(part)] = part
    return whole
