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
_POWERS = torch.tensor([math.ldexp(1, code - 127) for code in range(255)] + [math.nan])  # e8m0, OCP 5.4.1


def dequantize(weight: "QTensor", start: int, stop: int) -> Tensor:
    """Return outputs start…stop−1 of a quantised weight in float32 [.., stop − start, in]."""
    numbers = _numbers(weight, start, stop)
    if weight.format == "int4":
        numbers.sub_(_of_each_input(weight, _zeros(weight, start, stop)))
    return numbers.mul_(_of_each_input(weight, _scales(weight, start, stop)))


def _numbers(weight: "QTensor", start: int, stop: int) -> Tensor:
    data = weight.data[..., start:stop, :]
    if weight.format == "fp8":
        return data.float()
    return F.embedding(data.int(), _INTEGERS if weight.format == "int4" else _FLOATS).flatten(-2)


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
    wide = _POWERS[found.long()] if weight.format == "mxfp4" else found.float()
    if height > 1:
        wide = wide.repeat_interleave(height, dim=-2)[..., start - first * height : stop - first * height, :]
    if weight.outer is None:
        return wide
    outer = weight.outer[..., start:stop, None]
    return wide / outer if weight.divides else wide * outer


def _of_each_input(weight: "QTensor", values: Tensor) -> Tensor:
    """[.., outputs, in] of values [.., outputs, columns]."""
    if weight.groups is None:
        return values.repeat_interleave(weight.block[1], dim=-1)[..., : weight.shape[-1]]
    columns = weight.groups.long().unsqueeze(-2).expand(*values.shape[:-1], -1)
    return values.gather(-1, columns)
