"""What stands in a block of each quantised format, byte by byte; `fwd.kernels.packing` says where blocks stand.

Words are of 32 bits, the lowest byte first; a lane is 4r + c, r an output of the group. Behind 512 bytes of numbers:

fp8: nothing; word 2j + w of a lane holds inputs 32j + 8c + 4w … +3 as `spread.E4M3` says. `factors` of a group hold
the scales of its 8 outputs, then those of each 128 inputs; what does not apply is 1.
mxfp4, 32 bytes: word j of a lane holds inputs 32j + 8c … +7 as `spread.E2M1` says; word r behind them holds the scales
s + 66 of output r, of sub-block j in byte j, rotated to the left by 7: an exponent of bf16 in place.
nvfp4, 64 bytes: numbers as mxfp4; word 2r + h holds those of the 16 inputs 32j + 16h … +15 in byte j, rotated to the
left by 4: 5 bits of exponent, 3 of mantissa, of the scale times 2^117 as bf16. `factors`: 2^9·outer of 8 outputs.
int4 in groups of 32, 96 bytes: word j of a lane holds inputs 32j + 8c … +7, the even ones in the lower half, four bits
each; word r has the scales of sub-blocks 0 and 1, word 8 + r those of 2 and 3, word 16 + r the zero points of all four
in bytes. A scale is 16 bits: 6 of exponent from 2^−32 on, 10 of mantissa.
int4 in groups of 128, 32 bytes: the same numbers; word r is the scale and, in byte 2, the zero point.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.kernels import spread
from fwd.kernels.preparing import CELL, INT4_ZERO, MXFP4_ONE, divided

if TYPE_CHECKING:
    from fwd.kernels.qtensor import QTensor

GROUP, TILE, NUMBERS = 8, 16, 512
_MXFP4_RAISED, _MXFP4_LEFT = 66, 7  # what is added to codes; where they stand in bf16
_NVFP4_LOWERED, _NVFP4_LEFT = 8 * (224 - 117), 4  # the same of a bf16's upper 12 bits
_NVFP4_FACTOR = 2.0**9  # numbers come out times 2^−126, scales times 2^117
_INT4_LOWERED = (127 - 32) << 10  # from the upper 19 bits of a float32


def factors(weight: "QTensor") -> Tensor | None:
    """Return what the sums of a group's outputs are multiplied by, float32 [.., groups, 8 + …]; None: nothing."""
    if weight.format == "nvfp4":
        assert weight.outer is not None, weight.format
        return _by_groups(weight.outer * _NVFP4_FACTOR)
    if weight.format != "fp8":
        return None
    assert weight.scales is not None, weight.format
    outputs, inputs = weight.shape[-2:]
    lead = weight.shape[:-2]
    if weight.block[0] == 1:
        rows = _by_groups(weight.scales[..., 0])
        cells = rows.new_ones(*rows.shape[:-1], -(-inputs // CELL[1]))
    else:
        rows = _by_groups(weight.scales.new_ones(*lead, outputs))
        cells = F.pad(weight.scales, (0, 0, 0, rows.shape[-2] - weight.scales.shape[-2]), value=1.0)
    return torch.cat((rows, cells), dim=-1)


def pack_fp8(weight: "QTensor", start: int, stop: int) -> Tensor:
    """Return outputs start … stop − 1 as uint8 [groups, blocks, 512]."""
    data = weight.data[start:stop].view(torch.uint8)
    whole = _padded(data, -(-data.shape[1] // 64) * 64, 0)
    words = spread.words_of(whole.view(-1, GROUP, whole.shape[1] // 64, 2, 4, 2, 4), spread.E4M3)
    return _bytes(words.permute(0, 2, 1, 4, 3, 5))  # [groups, 8, blocks, j, c, w] as [.., blocks, 8, c, j, w]


def restore_fp8(weight: "QTensor", data: Tensor) -> "QTensor":
    """Return the rows of uint8 [.., groups, blocks, 512]."""
    assert weight.outer is not None, weight.format
    words = divided(_words(data), GROUP, 4, 2, 2)  # [.., blocks, 8, c, j, w]
    found = spread.bytes_of(words.transpose(-3, -2), spread.E4M3).flatten(-4)
    numbers = _ungrouped(found, weight.shape, 1).view(torch.float8_e4m3fn)
    rows, cells = weight.outer[..., :GROUP], weight.outer[..., GROUP:]
    if weight.block[0] == 1:
        scales = rows.flatten(-2)[..., : weight.shape[-2], None]
    else:
        scales = cells[..., : -(-weight.shape[-2] // GROUP), :]
    return replace(weight, data=numbers, scales=scales.contiguous(), outer=None)


def pack_mxfp4(weight: "QTensor", start: int, stop: int) -> Tensor:
    """Return outputs start … stop − 1 as uint8 [groups, blocks, 544]."""
    assert weight.scales is not None, weight.format
    numbers = _nibbles(weight.data[start:stop], spread.E2M1)
    codes = _padded(weight.scales[start:stop], numbers.shape[1] * 4, MXFP4_ONE) + _MXFP4_RAISED
    words = spread.rotated(_words(_grouped(codes, 4)), _MXFP4_LEFT)  # [groups, blocks, 8, 1]
    return torch.cat((numbers, _bytes(words)), dim=-1)


def restore_mxfp4(weight: "QTensor", data: Tensor) -> "QTensor":
    """Return the rows of uint8 [.., groups, blocks, 544]."""
    words = spread.rotated(_words(data[..., NUMBERS:]), 32 - _MXFP4_LEFT)  # [.., groups, blocks, 8]
    scales = _ungrouped(words.unsqueeze(-1).view(torch.uint8) - _MXFP4_RAISED, weight.shape, 32)
    return replace(weight, data=_nibble_rows(weight, data, spread.E2M1), scales=scales)


def pack_nvfp4(weight: "QTensor", start: int, stop: int) -> Tensor:
    """Return outputs start … stop − 1 as uint8 [groups, blocks, 576]."""
    assert weight.scales is not None, weight.format
    numbers = _nibbles(weight.data[start:stop], spread.E2M1)
    wide = _padded(weight.scales[start:stop].bfloat16(), numbers.shape[1] * 8, 1)
    codes = ((wide.view(torch.int16) >> 4) - _NVFP4_LOWERED).to(torch.uint8)
    by_half = divided(_grouped(codes, 8), 4, 2).transpose(-1, -2)  # [groups, blocks, 8, h, j]
    return torch.cat((numbers, _bytes(spread.rotated(_words(by_half), _NVFP4_LEFT))), dim=-1)


def restore_nvfp4(weight: "QTensor", data: Tensor) -> "QTensor":
    """Return the rows of uint8 [.., groups, blocks, 576]."""
    assert weight.outer is not None, weight.format
    words = divided(spread.rotated(_words(data[..., NUMBERS:]), 32 - _NVFP4_LEFT), GROUP, 2, 1)
    codes = words.view(torch.uint8).transpose(-1, -2).flatten(-2)  # [.., groups, blocks, 8, 8]
    wide = ((codes.to(torch.int16) + _NVFP4_LOWERED) << 4).view(torch.bfloat16)
    scales = _ungrouped(wide.to(torch.float8_e4m3fn).view(torch.uint8), weight.shape, 16)
    outer = (weight.outer / _NVFP4_FACTOR).flatten(-2)[..., : weight.shape[-2]].contiguous()
    numbers = _nibble_rows(weight, data, spread.E2M1)
    return replace(weight, data=numbers, scales=scales.view(torch.float8_e4m3fn), outer=outer)


def pack_int4_32(weight: "QTensor", start: int, stop: int) -> Tensor:
    """Return outputs start … stop − 1 as uint8 [groups, blocks, 608]."""
    numbers, codes, zeros = _int4(weight, start, stop, 4)
    scales = _words(codes.to(torch.int16)).transpose(-1, -2)  # [groups, blocks, 2, 8]
    return torch.cat((numbers, _bytes(scales), _bytes(_words(zeros))), dim=-1)


def restore_int4_32(weight: "QTensor", data: Tensor) -> "QTensor":
    """Return the rows of uint8 [.., groups, blocks, 608]."""
    scales, zeros = data[..., NUMBERS : NUMBERS + 64], data[..., NUMBERS + 64 :]
    pairs = divided(_words(scales), 2, GROUP).transpose(-1, -2).contiguous().view(torch.int16)
    return _int4_rows(weight, data, pairs.int() & 0xFFFF, divided(zeros, GROUP, 4))


def pack_int4_128(weight: "QTensor", start: int, stop: int) -> Tensor:
    """Return outputs start … stop − 1 as uint8 [groups, blocks, 544]."""
    numbers, codes, zeros = _int4(weight, start, stop, 1)
    return torch.cat((numbers, _bytes(codes | zeros.int() << 16)), dim=-1)


def restore_int4_128(weight: "QTensor", data: Tensor) -> "QTensor":
    """Return the rows of uint8 [.., groups, blocks, 544]."""
    words = _words(data[..., NUMBERS:]).unsqueeze(-1)
    return _int4_rows(weight, data, words & 0xFFFF, (words >> 16).to(torch.uint8))


# ---- what formats share ----


def _int4(weight: "QTensor", start: int, stop: int, each: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [groups, blocks, 512], scales' codes int32 and zero points uint8 [groups, blocks, 8, each]."""
    assert weight.scales is not None, weight.format
    assert weight.zeros is not None, weight.format
    numbers = _nibbles(weight.data[start:stop], spread.NIBBLE, INT4_ZERO * 0x11)
    columns = numbers.shape[1] * each
    wide = _grouped(_padded(weight.scales[start:stop], columns, 1), each)
    zeros = _grouped(_padded(weight.zeros[start:stop], columns, INT4_ZERO), each)
    return numbers, (wide.view(torch.int32) >> 13) - _INT4_LOWERED, zeros


def _int4_rows(weight: "QTensor", data: Tensor, codes: Tensor, zeros: Tensor) -> "QTensor":
    wide = ((codes + _INT4_LOWERED) << 13).view(torch.float32)
    return replace(
        weight,
        data=_nibble_rows(weight, data, spread.NIBBLE),
        scales=_ungrouped(wide, weight.shape, weight.block[1]),
        zeros=_ungrouped(zeros, weight.shape, weight.block[1]),
    )


def _nibbles(data: Tensor, how: spread.Spread, filler: int = 0) -> Tensor:
    """uint8 [outputs, in / 2] as [groups, blocks, 512]."""
    whole = _padded(data, -(-data.shape[1] // 64) * 64, filler)
    words = spread.words_of(whole.view(-1, GROUP, whole.shape[1] // 64, 4, 4, 4), how)  # [groups, 8, blocks, j, c]
    return _bytes(words.permute(0, 2, 1, 4, 3))


def _nibble_rows(weight: "QTensor", data: Tensor, how: spread.Spread) -> Tensor:
    """uint8 [.., outputs, in / 2] of [.., groups, blocks, bytes]."""
    words = divided(_words(data[..., :NUMBERS]), GROUP, 4, 4)  # [.., groups, blocks, 8, c, j]
    found = spread.bytes_of(words.transpose(-1, -2), how).flatten(-3)  # [.., groups, blocks, 8, 64]
    return _ungrouped(found, weight.shape, 2)


def _by_groups(values: Tensor) -> Tensor:
    """[.., outputs] as [.., groups, 8], padded with ones to whole tiles."""
    return divided(F.pad(values, (0, -values.shape[-1] % TILE), value=1.0), -1, GROUP)


def _padded(values: Tensor, columns: int, filler: int) -> Tensor:
    """[outputs, …] with more columns, and outputs to a whole tile."""
    return F.pad(values, (0, columns - values.shape[1], 0, -len(values) % TILE), value=filler)


def _grouped(values: Tensor, columns: int) -> Tensor:
    """[outputs, blocks · columns] as [groups, blocks, 8, columns]."""
    return values.view(-1, GROUP, values.shape[1] // columns, columns).transpose(1, 2).contiguous()


def _ungrouped(values: Tensor, shape: tuple[int, ...], each: int) -> Tensor:
    """[.., groups, blocks, 8, columns] as [.., outputs, ⌈inputs / each⌉]: a column is of `each` inputs."""
    rows = values.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return rows[..., : shape[-2], : -(-shape[-1] // each)].contiguous()


def _words(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.int32)


def _bytes(words: Tensor) -> Tensor:
    """int32 [groups, blocks, …] as uint8 [groups, blocks, bytes]."""
    return words.contiguous().flatten(2).view(torch.uint8)
