"""A weight matrix in the format it is stored in: what every op takes as its weight."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fwd.kernels import packing
from fwd.kernels.blocking import common_rows
from fwd.kernels.dequantize import dequantize

Format = Literal["fp32", "fp16", "bf16", "fp8", "mxfp4", "nvfp4", "int4"]

PLAIN: dict[torch.dtype, Format] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_SLAB = 1024  # outputs that are dequantised at a time


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """A weight of `shape` [out, in], or [experts, out, in]; `data` holds it as `format` says, leading dims as in shape.

    fp32, fp16, bf16: the matrix, in any layout. The others are numbers in blocks that share a scale, of `block` =
    (outputs, inputs), the last of each dimension may be ragged:

        weight[o, i] = (number[o, i] − zero[block]) · (scale[block] · outer[o]), or scale / outer where it `divides`

    The scale with its outer factor is rounded to float32, then the product is, as those who write the formats do it;
    all else is exact.

    fp8: data float8_e4m3fn [out, in]; scales float32; any block.
    mxfp4: data uint8 [out, in/2], the even input in the low nibble, e2m1 codes 0, .5, 1, 1.5, 2, 3, 4, 6 and from 8 on
    their negatives; scales uint8, 2^(s − 127), block (1, 32).
    nvfp4: data as mxfp4; scales float8_e4m3fn, block (1, 16); outer float32 [out].
    int4: data uint8 [out, in/2], nibbles 0…15 as mxfp4's; scales float16, bfloat16 or float32, block (1, group); zeros
    uint8 like scales, without them 8.
    """

    data: Tensor
    format: Format
    shape: tuple[int, ...]
    packed: bool = False  # as `fwd.kernels.packing.pack` leaves it: scales and zeros are within `data`
    block: tuple[int, int] = (1, 1)
    scales: Tensor | None = None  # [.., ⌈out / block[0]⌉, ⌈in / block[1]⌉]
    zeros: Tensor | None = None
    outer: Tensor | None = None  # float32 [.., out]; packed: [.., groups, 8 + …], of fp8 as well
    divides: bool = False
    groups: Tensor | None = None  # int4 with activation order: int32 [.., in], the column of `scales` of each input

    @classmethod
    def plain(cls, data: Tensor) -> "QTensor":
        """Wrap an unquantised matrix [out, in] or stack of them."""
        assert data.dim() in {2, 3}, tuple(data.shape)
        return cls(data.contiguous(), PLAIN[data.dtype], tuple(data.shape))

    def pack(self) -> "QTensor":
        """Return the same weight in the order that kernels stream it; raises ModelError for one they do not take."""
        return packing.pack(self)

    def dequantize(self, outputs: slice = slice(None)) -> Tensor:
        """Return the matrix, or some of its outputs, in float32 (a copy unless it is float32 already)."""
        start, stop, step = outputs.indices(self.shape[-2])
        assert step == 1, step
        if self.packed:
            first = start - start % packing.GROUP
            return packing.restore(self, slice(first, stop)).dequantize(slice(start - first, None))
        if self.scales is not None:
            return dequantize(self, start, stop)
        return (self.data.to_dense() if self.data.is_mkldnn else self.data)[..., start:stop, :].float()

    def rounded(self) -> "QTensor":
        """Return the weight in bfloat16, row by row."""
        assert not self.packed, "for the reader of a checkpoint"
        data = torch.empty(self.shape, dtype=torch.bfloat16, device=self.data.device)
        step = max(1, _SLAB // math.prod(self.shape[:-2]))
        for start in range(0, self.shape[-2], step):
            data[..., start : start + step, :] = self.dequantize(slice(start, start + step))
        return QTensor.plain(data)

    def expert(self, index: int) -> "QTensor":
        """Return one matrix of a stack, a view."""
        assert len(self.shape) == 3, self.shape
        return replace(_each(self, lambda tensor: tensor[index]), shape=self.shape[1:])

    def rows(self, order: Tensor) -> "QTensor":
        """Return the matrix [out, in] with outputs order[0], order[1], …: int64, any number of them.

        Blocks of several outputs stay where each block of the order is within one, else they become single outputs.
        """
        assert not self.packed, "stands as kernels stream it"
        height = self.block[0]
        blocks = order // height
        firsts = blocks[::height]
        if not torch.equal(firsts.repeat_interleave(height)[: len(blocks)], blocks):
            height, firsts = 1, blocks
        return replace(
            self,
            data=_take(self.data, order),
            shape=(len(order), self.shape[1]),
            block=(height, self.block[1]),
            scales=None if self.scales is None else _take(self.scales, firsts),
            zeros=None if self.zeros is None else _take(self.zeros, firsts),
            outer=None if self.outer is None else _take(self.outer, order),
        )

    def to(self, device: torch.device) -> "QTensor":
        """Return the weight on a device."""
        return _each(self, lambda tensor: tensor.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes a step reads when it uses the whole matrix."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Return what the weight is made of, in the order of its fields."""
        tensors = (self.data, self.scales, self.zeros, self.outer, self.groups)
        return [tensor for tensor in tensors if tensor is not None]


def concat(parts: Sequence[QTensor]) -> QTensor:
    """Return matrices [out, in] of one format one above the other; blocks of several outputs shrink to fit.

    They are copied, unless there is only one. Parts in activation order have the same one.
    """
    heights, first = [part.shape[0] for part in parts], parts[0]
    height = common_rows([part.block[0] for part in parts], heights)
    fitted = [_with_rows(part, height) for part in parts]
    return replace(
        fitted[0],
        data=joined([part.data for part in fitted]),
        shape=(sum(heights), first.shape[1]),
        scales=_cat([part.scales for part in fitted]),
        zeros=_cat([part.zeros for part in fitted]),
        outer=_cat([part.outer for part in fitted]),
    )


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors one after the other along the first dimension, a copy unless there is only one."""
    if not tensors[1:]:
        return tensors[0]
    heights = [len(tensor) for tensor in tensors]
    out = tensors[0].new_empty((sum(heights), *tensors[0].shape[1:]))
    for into, tensor in zip(out.split_with_sizes(heights), tensors, strict=True):
        into.copy_(tensor)  # NOTE: torch.cat of tensors that are only shapes imports torch's compiler: seconds
    return out


def fold(weight: QTensor, parts: int) -> QTensor:
    """Return [matrices, out, in] as [matrices / parts, parts·out, in]: as many at a time one above the other, a view.

    Blocks of several outputs shrink to fit. Parts in activation order have the same one.
    """
    count, outputs, inputs = weight.shape
    fitted = _with_rows(weight, common_rows([weight.block[0]] * parts, [outputs] * parts))
    folded = _each(replace(fitted, groups=None), lambda tensor: tensor.reshape(count // parts, -1, *tensor.shape[2:]))
    groups = None if weight.groups is None else weight.groups[::parts].clone()  # a view would keep all of them
    return replace(folded, shape=(count // parts, parts * outputs, inputs), groups=groups)


def _each(weight: QTensor, change: Callable[[Tensor], Tensor]) -> QTensor:
    """The weight with all its tensors changed."""

    def changed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else change(tensor)

    return replace(
        weight,
        data=change(weight.data),
        scales=changed(weight.scales),
        zeros=changed(weight.zeros),
        outer=changed(weight.outer),
        groups=changed(weight.groups),
    )


def _with_rows(weight: QTensor, height: int) -> QTensor:
    """The weight in blocks of fewer outputs, each of which is within one block."""
    if height == weight.block[0]:
        return weight
    assert weight.scales is not None, weight.format
    lines = torch.arange(0, weight.shape[-2], height) // weight.block[0]
    return replace(weight, block=(height, weight.block[1]), scales=weight.scales.index_select(-2, lines))


def _take(tensor: Tensor, order: Tensor) -> Tensor:
    """Rows of a tensor of any dtype."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).index_select(0, order).view(tensor.dtype)
    return tensor.index_select(0, order)


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    assert len(found) in {0, len(tensors)}, "some parts have what others have not"
    return joined(found) if found else None
