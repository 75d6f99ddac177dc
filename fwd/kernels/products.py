"""Products with weights as they are stored: the float32 definition. Row-invariant for any number of rows.

A weight is dequantised slab by slab, for the product only: in memory it stays what the checkpoint holds.
"""

from collections.abc import Callable

import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from torch import Tensor

from fwd.kernels.paged import aligned
from fwd.kernels.qtensor import QTensor
from fwd.kernels.sizes import SLAB_BYTES

_TILE = 16  # rows of one product, and outputs at least: of torch 2.13's smaller ones rows depend on their number
_SPLIT = 32768  # torch divides an elementwise call of this many elements among threads, in the middle of a row


def product(x: Tensor, weight: QTensor) -> Tensor:
    """Return x·Wᵀ, float32 [rows, out]: x [rows, in] in any float dtype, widened; the weight exact; float32 sums.

    The weight is [out, in], packed in no way. There may be any number of rows: they go in tiles of 16, the last one
    padded, so that a row has the same bits in any company.
    """
    outputs, inputs = weight.shape
    padded = aligned(F.pad(x.float(), (0, 0, 0, -len(x) % _TILE)))
    step = max(_TILE, SLAB_BYTES // (4 * inputs) // _TILE * _TILE)
    total = padded.new_empty(len(padded), outputs)
    for start in range(0, outputs, step):
        slab = _slab(weight, start, start + step)
        for row in range(0, len(padded), _TILE):
            found = F.linear(aligned(padded[row : row + _TILE]), slab)
            total[row : row + _TILE, start : start + step] = found[:, : outputs - start]
    return total[: len(x)]


def by_whole_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the elementwise function of x [rows, width]: a row has the same bits in any company.

    The last elements of what a thread takes may get other bits where they fill no vector, so a call holds whole rows.
    Those of x are halves of wider ones: what follows each other in memory is joined.
    """
    step = max(1, (_SPLIT - 1) // x.shape[1])
    out = x.new_empty(x.shape)
    for row in range(0, len(x), step):
        out[row : row + step] = function(x[row : row + step])
    return out


def _slab(weight: QTensor, start: int, stop: int) -> Tensor:
    slab = weight.dequantize(slice(start, stop))
    missing = -len(slab) % _TILE
    return aligned(F.pad(slab, (0, 0, 0, missing)) if missing else slab)
