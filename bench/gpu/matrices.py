"""Random matrices in the formats that models are published in, as `QTensor`s, on the device of a generator."""

import math

import torch
from torch import Generator, Tensor

from fwd.kernels.qtensor import QTensor
from fwd.models.quantization import Stored
from gpu.tensors import E2M1_RMS, E4M3_RMS, draw_bytes, draw_e4m3, draw_near, draw_powers


def matrix(stored: Stored | None, shape: tuple[int, ...], generator: Generator) -> QTensor:
    """A matrix [out, in], or a stack of them, that keeps the size of what it multiplies; `stored` None: bfloat16."""
    outputs, inputs = shape[-2:]
    lead, deviation = shape[:-2], inputs**-0.5

    def draw(how: object, *size: int) -> Tensor:
        return how(math.prod(lead) * math.prod(size), generator).view(*lead, *size)  # type: ignore[operator]

    if stored is None:
        numbers = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
        return QTensor.plain(numbers.mul_(deviation))
    height, width = (size or whole for size, whole in zip(stored.block, (outputs, inputs), strict=True))
    size = -(-outputs // height), -(-inputs // width)
    if stored.format == "fp8":
        numbers = draw(draw_e4m3, outputs, inputs).to(torch.float8_e4m3fn)
        scales = draw(draw_near(deviation / E4M3_RMS), *size)
        return QTensor(numbers, "fp8", shape, block=(height, width), scales=scales)
    numbers = draw(draw_bytes, outputs, inputs // 2)
    if stored.format == "mxfp4":
        scales = draw(draw_powers(deviation / E2M1_RMS), *size)
        return QTensor(numbers, "mxfp4", shape, block=(1, 32), scales=scales)
    assert stored.format == "nvfp4", stored.format
    scales = draw(draw_near(E4M3_RMS), *size).to(torch.float8_e4m3fn)
    outer = torch.full((*lead, outputs), deviation / (E2M1_RMS * E4M3_RMS), device=generator.device)
    return QTensor(numbers, "nvfp4", shape, block=(1, 16), scales=scales, outer=outer)
