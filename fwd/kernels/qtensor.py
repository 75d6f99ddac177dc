"""A weight matrix in the format it is stored in: what every op takes as its weight."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fwd.kernels import packing

Format = Literal["fp32", "fp16", "bf16"]

FORMATS: dict[torch.dtype, Format] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """A weight of `shape` [out, in]; `data` holds it as `format` says (plain formats: the matrix, in any layout)."""

    data: Tensor
    format: Format
    shape: tuple[int, int]
    packed: bool = False  # `data` stands as `fwd.kernels.packing.pack` leaves it

    @classmethod
    def plain(cls, data: Tensor) -> "QTensor":
        """Wrap an unquantised matrix [out, in]."""
        assert data.dim() == 2, tuple(data.shape)
        return cls(data.contiguous(), FORMATS[data.dtype], (data.shape[0], data.shape[1]))

    def pack(self) -> "QTensor":
        """Return the same weight, which is bfloat16, in the order that kernels stream it."""
        assert not self.packed, "packed twice"
        return replace(self, data=packing.pack(self.data), packed=True)

    def dequantize(self) -> Tensor:
        """Return the matrix [out, in] in float32 (a copy unless it is float32 already)."""
        return packing.unpack(self).float() if self.packed else self.data.to_dense().float()

    @property
    def nbytes(self) -> int:
        """Bytes a step reads when it uses the whole matrix."""
        return self.data.nbytes
