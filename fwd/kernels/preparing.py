"""Quantised weights as the blocks that kernels stream can say them: the same numbers, by other scales where need be."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.errors import ModelError

if TYPE_CHECKING:
    from fwd.kernels.qtensor import QTensor

CELL = (8, 128)  # outputs and inputs that share a scale of FP8 in blocks
MXFP4_SCALES = (62, 188)  # codes that a factor of bf16 and a power of two hold: 2^−65 to 2^61
INT4_GROUPS = (32, 128)  # inputs
MXFP4_ONE, INT4_ZERO = 127, 8  # the code of scale 1; the number that is 0 without zero points
_EVEN_OUT = 0x88  # two int4 that are 0 where the zero point is 8
_INT4_SCALES = (2.0**-32, 2.0**32)  # from, and below
WAY_OUT = "use --device cpu"


def prepared(weight: "QTensor") -> "QTensor":
    """Return a quantised weight [out, in] or [experts, out, in] in the blocks of its kernels.

    fp8: scales of an output, block (1, in), or of `CELL`; mxfp4, nvfp4 and int4: groups of nothing but zeros, or of
    scale zero, are zeros of scale one; nvfp4: outer factors multiply (where they divided, 1 / outer is rounded); int4:
    groups of 32 or 128 inputs, zero points for all, scales float32. Raises ModelError for what no block says exactly.
    """
    assert weight.scales is not None, weight.format
    return {"fp8": _fp8, "mxfp4": _mxfp4, "nvfp4": _nvfp4, "int4": _int4}[weight.format](weight, weight.scales)


def _fp8(weight: "QTensor", scales: Tensor) -> "QTensor":
    (height, width), (outputs, inputs) = weight.block, weight.shape[-2:]
    if _any(weight.data.view(torch.uint8) & 0x7F == 0x7F):  # e4m3's NaN of either sign
        raise ModelError(f"FP8 weights that are not numbers: {WAY_OUT}")
    if width >= inputs:
        rows = torch.arange(outputs, device=scales.device) // height
        return replace(weight, block=(1, inputs), scales=scales.index_select(-2, rows))
    tall, wide = CELL
    if width % wide or (height % tall and height < outputs):
        raise ModelError(f"FP8 in blocks of {height}×{width}: the kernels take multiples of {tall}×{wide}; {WAY_OUT}")
    rows = torch.arange(0, outputs, tall, device=scales.device) // height
    columns = torch.arange(0, inputs, wide, device=scales.device) // width
    return replace(weight, block=CELL, scales=scales.index_select(-2, rows).index_select(-1, columns))


def _mxfp4(weight: "QTensor", scales: Tensor) -> "QTensor":
    lowest, highest = MXFP4_SCALES
    outside = (scales < lowest) | (scales > highest)
    if not _any(outside):
        return weight
    if _any(outside & (by_columns(weight.data & 0x77, 16).amax(dim=-1) > 0)):
        powers = f"2^{lowest - MXFP4_ONE} … 2^{highest - MXFP4_ONE}"
        raise ModelError(f"MXFP4 scales outside {powers} are no factors of bfloat16: {WAY_OUT}")
    return replace(weight, scales=torch.where(outside, MXFP4_ONE, scales))


def _nvfp4(weight: "QTensor", scales: Tensor) -> "QTensor":
    assert weight.outer is not None, weight.format
    wide = scales.float()
    _refuse_scales("NVFP4", wide)
    outer = 1 / weight.outer if weight.divides else weight.outer
    weight = replace(weight, outer=outer, divides=False)
    if not _any(wide == 0):
        return weight
    one = torch.where(wide == 0, 1.0, wide).to(scales.dtype)
    return replace(weight, data=_filled(weight.data, wide == 0, 8, 0), scales=one)


def _int4(weight: "QTensor", scales: Tensor) -> "QTensor":
    if weight.groups is not None:
        raise ModelError(f"int4 in activation order (desc_act, g_idx): the kernels take groups in order; {WAY_OUT}")
    size, inputs = min(weight.block[1], weight.shape[-1]), weight.shape[-1]
    small, large = INT4_GROUPS
    if size % small or inputs % small:
        raise ModelError(
            f"int4 in groups of {size} of {inputs} inputs: the kernels take multiples of {small}; {WAY_OUT}"
        )
    group = small if size % large or inputs % large else large
    columns = torch.arange(0, inputs, group, device=scales.device) // size
    wide = scales.float().index_select(-1, columns)
    _refuse_scales("int4", wide)
    zeros = torch.full_like(scales, INT4_ZERO, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    zeros, nothing = zeros.index_select(-1, columns), wide == 0
    if _any(nothing):
        data, wide = _filled(weight.data, nothing, group // 2, _EVEN_OUT), torch.where(nothing, 1.0, wide)
        weight, zeros = replace(weight, data=data), torch.where(nothing, INT4_ZERO, zeros)
    lowest, above = _INT4_SCALES
    if _any((wide < lowest) | (wide >= above) | (wide.view(torch.int32) & 0x1FFF != 0)):
        raise ModelError(f"int4 scales that 16 bits do not hold exactly: {WAY_OUT}")
    return replace(weight, block=(1, group), scales=wide, zeros=zeros)


def by_columns(data: Tensor, size: int) -> Tensor:
    """Return [.., numbers], the last column padded with zeros, as [.., columns, size]."""
    return divided(F.pad(data, (0, -data.shape[-1] % size)), -1, size)


def divided(data: Tensor, *sizes: int) -> Tensor:
    """Return [.., numbers] as [.., *sizes]."""
    return data.reshape(*data.shape[:-1], *sizes)


def _filled(data: Tensor, columns: Tensor, size: int, filler: int) -> Tensor:
    """The bytes, of `size` a column, but for some columns."""
    wide = by_columns(data, size)
    return torch.where(columns.unsqueeze(-1), filler, wide).flatten(-2)[..., : data.shape[-1]].contiguous()


def _refuse_scales(name: str, scales: Tensor) -> None:
    if not bool(((scales >= 0) & scales.isfinite()).all()):
        raise ModelError(f"{name} scales below zero, or that are not finite: {WAY_OUT}")


def _any(found: Tensor) -> bool:
    return bool(found.any())
