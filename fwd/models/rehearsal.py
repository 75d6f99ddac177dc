"""A load without the weights: what headers and scales can tell is refused before any weight is allocated or read."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fwd.kernels.qtensor import QTensor
from fwd.models.reader import ask, fill
from fwd.models.source import Source, memory


class Rehearsal(Source):
    """Checks names, shapes, dtypes and use as a `Checkpoint` does; tensors are torch's `meta`, which have no memory.

    Only `values` reads, which scales, their orders and biases that must be zero are checked by: 6 % of an MXFP4
    checkpoint, 11 % of an NVFP4 one, 3 % of 4-bit integers in groups of 128, less than 1 % of FP8 in large blocks.
    Loading finds them in the page cache again.
    """

    device = torch.device("meta")

    def digest(self) -> str:
        """Nothing, for nothing is hashed."""
        return ""

    def _read(self, names: Sequence[str], parts: Iterable[Tensor]) -> None:
        pass

    def _values(self, names: Sequence[str], found: Tensor) -> Tensor:
        out = torch.empty_like(found, device="cpu")
        entries = [self.entries[name] for name in names]
        for entry in entries:
            ask(self._of[entry.path], entry.begin, entry.end)
        for entry, part in zip(entries, out, strict=True):
            fill(self._of[entry.path], entry.begin, memory(part))
        return out


class Unpacked:
    """What taking weights needs of `fwd.kernels.ops.Ops`."""

    device = Rehearsal.device

    def pack(self, weight: QTensor) -> QTensor:
        """Return it as it is."""
        return weight

    pack_head = pack_router = pack_experts = pack


def rehearse(folder: Path, build: Callable[[Source, Unpacked], object]) -> None:
    """Build a model of nothing but shapes; raises the ModelError that loading it would raise much later."""
    with Rehearsal(folder) as rehearsal:
        build(rehearsal, Unpacked())
