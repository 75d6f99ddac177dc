"""Packed weights as bfloat16 row by row (`cuda/unpack.cu`), part by part: what a library's product takes."""

import torch
from torch import Tensor

from fwd.kernels import packing
from fwd.kernels.launch import Kernel, Launcher
from fwd.kernels.packing import GROUP, inputs_of, name_of
from fwd.kernels.qtensor import QTensor

_THREADS = 256


def unpack(launcher: Launcher, weight: QTensor, outputs: slice, scratch: Tensor) -> Tensor:
    """Return `outputs` (from a multiple of 8) of a packed matrix as bfloat16 [outputs, in], in rows of whole blocks.

    They are put in `scratch` bfloat16 [numbers]. Each is rounded from float32, once.
    """
    if weight.format == "bf16":
        return packing.unpack(weight, outputs, scratch)
    start, stop, step = outputs.indices(weight.shape[0])
    assert (start % GROUP, step) == (0, 1), outputs
    groups = slice(start // GROUP, -(-stop // GROUP))
    data = weight.data[groups]
    width = data.shape[1] * inputs_of(weight)
    assert scratch.dtype == torch.bfloat16, scratch.dtype
    assert scratch.numel() >= len(data) * GROUP * width, (scratch.numel(), tuple(data.shape), width)
    factors = None if weight.outer is None else weight.outer[groups]
    kernel = Kernel("unpack.cu", f"unpack_{name_of(weight)}")
    launcher.launch(kernel, (len(data), 1, 1), _THREADS, 0, data, factors, scratch, weight.shape[1])
    return scratch[: len(data) * GROUP * width].view(-1, width)[: stop - start, : weight.shape[1]]
