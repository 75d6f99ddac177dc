"""A weight matrix in the format it is stored in: what every op takes as its weight."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fwd.kernels import packing

Format = Literal["fp32", "fp16", "bf16", "fp8", "mxfp4", "nvfp4", "int4"]

PLAIN: dict[torch.dtype, Format] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """A weight of `shape` [out, in], or [experts, out, in]; `data` holds it as `format` says, leading dims as in shape.

    fp32, fp16, bf16: the matrix, in any layout. The others are numbers in blocks that share a scale, of `block` =
    (outputs, inputs), the last of each dimension may be ragged:

        weight[o, i] = (number[o, i] − zero[block]) · scale[block] · outer[o]

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
    packed: bool = False  # `data` stands as `fwd.kernels.packing.pack` leaves it
    block: tuple[int, int] = (1, 1)
    scales: Tensor | None = None  # [.., ⌈out / block[0]⌉, ⌈in / block[1]⌉]
    zeros: Tensor | None = None
    outer: Tensor | None = None  # float32 [.., out]
    groups: Tensor | None = None  # int4 with activation order: int32 [in], the column of `scales` of each input

    @classmethod
    def plain(cls, data: Tensor) -> "QTensor":
        """Wrap an unquantised matrix [out, in] or stack of them."""
        assert data.dim() in {2, 3}, tuple(data.shape)
        return cls(data.contiguous(), PLAIN[data.dtype], tuple(data.shape))

    def pack(self) -> "QTensor":
        """Return the same weight, which is bfloat16, in the order that kernels stream it."""
        assert not self.packed, "packed twice"
        return replace(self, data=packing.pack(self.data), packed=True)

    def dequantize(self) -> Tensor:
        """Return the matrix in float32, exactly (a copy unless it is float32 already)."""
        return packing.unpack(self).float() if self.packed else self.data.to_dense().float()

    @property
    def nbytes(self) -> int:
        """Bytes a step reads when it uses the whole matrix."""
        tensors = (self.data, self.scales, self.zeros, self.outer, self.groups)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
