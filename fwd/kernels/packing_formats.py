"""What stands in a block of each quantised format, byte by byte; `fwd.kernels.packing` says where blocks stand.

With G groups of 8 outputs, B blocks and S sub-blocks of 32 inputs in a block, words of 32 bits, the lowest byte first:

mxfp4, 544 bytes: word j of lane 4r + c holds inputs 32j + 8c … +7 of output r as `spread.E2M1` says; behind the numbers
word r holds the scales of output r, of sub-block j in byte j, as s + 66, all of it rotated to the left by 7.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.errors import ModelError
from fwd.kernels import spread

if TYPE_CHECKING:
    from fwd.kernels.qtensor import QTensor

GROUP, TILE = 8, 16
MXFP4_SCALES = (62, 188)  # codes that a factor of bf16 and a power of two hold: 2^−65 to 2^61
_ONE, _RAISED, _LEFT = 127, 66, 7  # of mxfp4: code of scale 1; what is added to codes; where they stand in bf16


def prepared(weight: "QTensor") -> "QTensor":
    """Return the weight with what its format cannot say in a block said otherwise; it is the same numbers.

    mxfp4: blocks of nothing but zeros have scale 1. Raises ModelError for scales that are no factor of bf16.
    """
    return _prepared_mxfp4(weight)


def factors(weight: "QTensor") -> Tensor | None:
    """Return what the sums of a group's outputs are multiplied by, float32 [.., groups, 8 + …]; see `cuda/quant.cuh`."""
    return None


# ---- mxfp4 ----


def _prepared_mxfp4(weight: "QTensor") -> "QTensor":
    assert weight.scales is not None, weight.format
    lowest, highest = MXFP4_SCALES
    outside = (weight.scales < lowest) | (weight.scales > highest)
    if not outside.any():
        return weight
    magnitudes = _by_columns(weight.data & 0x77, 16).amax(dim=-1)
    scales = torch.where(magnitudes == 0, _ONE, weight.scales)
    if ((scales < lowest) | (scales > highest)).any():
        raise ModelError(
            f"MXFP4 scales outside 2^{lowest - 127} … 2^{highest - 127} are no factors of bfloat16: use --device cpu"
        )
    return replace(weight, scales=scales)


def pack_mxfp4(weight: "QTensor", start: int, stop: int) -> Tensor:
    """Return outputs start … stop − 1 as uint8 [groups, blocks, 544]."""
    assert weight.scales is not None, weight.format
    numbers = _nibbles(weight.data[start:stop], spread.E2M1)
    codes = _padded(weight.scales[start:stop], numbers.shape[1] * 4, _ONE) + _RAISED
    words = spread.rotated(_grouped(codes, 4).view(torch.int32), _LEFT)  # [groups, blocks, 8, 1]
    return torch.cat((numbers, words.flatten(2).view(torch.uint8)), dim=-1)


def restore_mxfp4(weight: "QTensor", data: Tensor) -> "QTensor":
    """Return the rows of uint8 [.., groups, blocks, 544]."""
    words = _words(data[..., 512:])  # [.., groups, blocks, 8]
    codes = spread.rotated(words, 32 - _LEFT).unsqueeze(-1).view(torch.uint8) - _RAISED
    scales = _ungrouped(codes, *weight.shape[-2:], 32)
    return replace(weight, data=_nibble_rows(weight, data, spread.E2M1), scales=scales)


# ---- what formats share ----


def _nibbles(data: Tensor, how: spread.Spread, filler: int = 0) -> Tensor:
    """uint8 [outputs, in / 2] as [groups, blocks, 512]."""
    whole = _padded(data, -(-data.shape[1] // 64) * 64, filler)
    words = spread.words_of(whole.view(-1, GROUP, whole.shape[1] // 64, 4, 4, 4), how)  # [groups, 8, blocks, j, c]
    return words.permute(0, 2, 1, 4, 3).contiguous().flatten(2).view(torch.uint8)


def _nibble_rows(weight: "QTensor", data: Tensor, how: spread.Spread) -> Tensor:
    """uint8 [.., outputs, in / 2] of [.., groups, blocks, bytes]."""
    words = _words(data[..., :512]).unflatten(-1, (GROUP, 4, 4))  # [.., groups, blocks, 8, c, j]
    found = spread.bytes_of(words.transpose(-1, -2), how).flatten(-3)  # [.., groups, blocks, 8, 64]
    return _ungrouped(found, weight.shape[-2], weight.shape[-1], 2)


def _padded(values: Tensor, columns: int, filler: int) -> Tensor:
    """[outputs, …] with more columns, and outputs to a whole tile."""
    return F.pad(values, (0, columns - values.shape[1], 0, -len(values) % TILE), value=filler)


def _grouped(values: Tensor, columns: int) -> Tensor:
    """[outputs, blocks · columns] as [groups, blocks, 8, columns]."""
    return values.view(-1, GROUP, values.shape[1] // columns, columns).transpose(1, 2).contiguous()


def _ungrouped(values: Tensor, outputs: int, inputs: int, each: int) -> Tensor:
    """[.., groups, blocks, 8, columns] as [.., outputs, ⌈inputs / each⌉]: a column is of `each` inputs."""
    rows = values.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return rows[..., :outputs, : -(-inputs // each)].contiguous()


def _words(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.int32)


def _by_columns(data: Tensor, size: int) -> Tensor:
    """[.., columns · size], the last column padded with zeros, as [.., columns, size]."""
    return F.pad(data, (0, -data.shape[-1] % size)).unflatten(-1, (-1, size))
