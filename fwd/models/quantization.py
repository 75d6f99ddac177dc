"""In which format each matrix of a checkpoint is: what its config says, or its files, which win. No torch here."""

from dataclasses import dataclass
from typing import Literal

Format = Literal["fp32", "fp16", "bf16", "fp8", "mxfp4", "nvfp4", "int4"]  # of `fwd.kernels.qtensor`


@dataclass(frozen=True, slots=True)
class Stored:
    """The format of one matrix, and how many outputs and inputs share a scale (0: all of them)."""

    format: Format
    block: tuple[int, int] = (1, 1)
    zeros: bool = False  # int4: zero points are stored

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of the matrix as a `QTensor`: numbers, scales, zeros and outer factors."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Quantization:
    """The scheme of a checkpoint; without one every matrix is plain."""

    def format_of(self, module: str) -> Stored | None:  # noqa: ARG002
        """Return the format of the matrix of a module (`model.layers.0.mlp.up_proj`); None: plain."""
        return None


PLAIN = Quantization()
