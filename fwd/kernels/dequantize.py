"""The numbers behind a quantised matrix: what `fwd.kernels.qtensor.QTensor` says, in float32."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

if TYPE_CHECKING:
    from fwd.kernels.qtensor import QTensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling Formats v1.0, 5.3.3: codes 0…7; 8…15: negatives
ZERO = 8  # of int4 without zero points


def _pairs(values: list[float]) -> Tensor:
    """What a byte holds: float32 [256, 2], its low nibble first."""
    return torch.tensor([(values[byte & 15], values[byte >> 4]) for byte in range(256)])


_FLOATS = _pairs([*E2M1, *(-value for value in E2M1)])
_INTEGERS = _pairs([float(value) for value in range(16)])
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
_POWERS = torch.tensor([math.ldexp(1, code - 127) for code in range(255)] + [math.nan])  # e8m0, OCP 5.4.1


def dequantize(weight: "QTensor", start: int, stop: int) -> Tensor:
    """Return outputs start…stop−1 of a quantised weight in float32 [.., stop − start, in]."""
    numbers = _numbers(weight, start, stop)
    if weight.format == "int4":
        view, zeros = _meeting(weight, numbers, _zeros(weight, start, stop))
        view.sub_(zeros)
    view, scales = _meeting(weight, numbers, _scales(weight, start, stop))
    view.mul_(scales)
    return numbers


def _numbers(weight: "QTensor", start: int, stop: int) -> Tensor:
    data = weight.data[..., start:stop, :]
    if weight.format == "fp8":
        return _E4M3.to(data.device).index_select(0, data.reshape(-1).view(torch.uint8).int()).view(data.shape)
    table = _INTEGERS if weight.format == "int4" else _FLOATS
    return F.embedding(data.int(), table.to(data.device)).flatten(-2)


def _zeros(weight: "QTensor", start: int, stop: int) -> Tensor:
    """float32 [.., stop − start, columns]."""
    assert weight.scales is not None, weight.format
    if weight.zeros is None:
        return torch.full_like(weight.scales[..., start:stop, :], ZERO, dtype=torch.float32)
    return weight.zeros[..., start:stop, :].float()


def _scales(weight: "QTensor", start: int, stop: int) -> Tensor:
    """Outer factors included: float32 [.., stop − start, columns]."""
    assert weight.scales is not None, weight.format
    height = weight.block[0]
    first = start // height
    found = weight.scales[..., first : -(-stop // height), :]
    wide = _POWERS.to(found.device)[found.long()] if weight.format == "mxfp4" else found.float()
    if height > 1:
        wide = wide.repeat_interleave(height, dim=-2)[..., start - first * height : stop - first * height, :]
    if weight.outer is None:
        return wide
    outer = weight.outer[..., start:stop, None]
    return wide.div_(outer) if weight.divides else wide.mul_(outer)  # of float8 scales, so `wide` is a copy


def _meeting(weight: "QTensor", numbers: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [.., outputs, in] and the values [.., outputs, columns] of their blocks, as views that broadcast."""
    size, inputs = weight.block[1], weight.shape[-1]
    if weight.groups is not None:
        columns = weight.groups.long().unsqueeze(-2).expand(*values.shape[:-1], -1)
        return numbers, values.gather(-1, columns)
    if inputs % size:
        return numbers, values.repeat_interleave(size, dim=-1)[..., :inputs]
    return numbers.view(*numbers.shape[:-1], -1, size), values.unsqueeze(-1)
