"""Random quantised weights, and what they are by the formula of `QTensor`, number by number."""

import numpy as np
import torch

from fwd.kernels.qtensor import QTensor

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
FORMATS = ("fp8", "mxfp4", "nvfp4", "nvfp4-divides", "int4", "int4-zeros", "int4-groups")


def quantised(form, *shape, block=None, seed=0):
    """A weight [out, in] or [experts, out, in] in a format."""
    generator = torch.Generator().manual_seed(seed)
    *lead, outputs, inputs = shape

    def byte(*dims, low=0, high=256):
        return torch.randint(low, high, (*lead, *dims), generator=generator, dtype=torch.uint8)

    def uniform(*dims):
        return torch.rand(*lead, *dims, generator=generator) + 0.1

    def cells(rows, columns):
        return -(-outputs // rows), -(-inputs // columns)

    if form == "fp8":
        block = block or (16, 48)
        data = (uniform(outputs, inputs) * 6 - 3).to(torch.float8_e4m3fn)
        return QTensor(data, "fp8", shape, block=block, scales=uniform(*cells(*block)))
    data = byte(outputs, inputs // 2)
    if form == "mxfp4":
        return QTensor(data, "mxfp4", shape, block=(1, 32), scales=byte(*cells(1, 32), low=120, high=132))
    if form.startswith("nvfp4"):
        scales, outer = uniform(*cells(1, 16)).to(torch.float8_e4m3fn), uniform(outputs)
        divides = form.endswith("divides")
        return QTensor(data, "nvfp4", shape, block=(1, 16), scales=scales, outer=outer, divides=divides)
    scales = uniform(*cells(1, 32)).half()
    zeros = byte(*cells(1, 32), high=17) if form == "int4-zeros" else None
    groups = None
    if form == "int4-groups":
        groups = torch.randint(0, cells(1, 32)[1], (*lead, inputs), generator=generator, dtype=torch.int32)
    return QTensor(data, "int4", shape, block=(1, 32), scales=scales, zeros=zeros, groups=groups)


def meant(weight):
    """float32 [out, in], entry by entry."""
    out = torch.empty(weight.shape)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            out[o, i] = float(entry(weight, o, i))
    return out


def entry(weight, o, i):
    column = i // weight.block[1] if weight.groups is None else int(weight.groups[i])
    cell = o // weight.block[0], column
    scale = np.float32(weight.scales[cell].float().item())
    if weight.format == "fp8":
        return np.float32(weight.data[o, i].float().item()) * scale
    code = int(weight.data[o, i // 2]) >> 4 * (i % 2) & 15
    if weight.format == "int4":
        return np.float32(code - (8 if weight.zeros is None else int(weight.zeros[cell]))) * scale
    number = np.float32(float(E2M1[code & 7]) * (-1.0 if code > 7 else 1.0))
    if weight.format == "mxfp4":
        return number * np.float32(2.0 ** (int(weight.scales[cell]) - 127))
    outer = np.float32(weight.outer[o].item())
    return number * (scale / outer if weight.divides else scale * outer)
