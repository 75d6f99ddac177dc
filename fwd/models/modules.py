"""The tensors of quantised modules as files hold them: taken together, and checked before anything is made of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fwd.errors import ModelError
from fwd.kernels.qtensor import QTensor
from fwd.models.quantization import LAYOUTS, Stored
from fwd.models.source import DTYPES, Source

_LARGEST = {"fp8": 448.0, "mxfp4": 6.0, "nvfp4": 6.0, "int4": 16.0}  # numbers (of int4: minus their zeros)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # that have the order of floats from 0 on


@dataclass(frozen=True, slots=True)
class Modules:
    """Modules of one shape and format, each with tensors of its own."""

    checkpoint: Source
    names: Sequence[str]
    stored: Stored
    outputs: int
    inputs: int

    def take(self, suffix: str, *shapes: tuple[int, ...]) -> Tensor:
        """Return a tensor of each module, as it is stored and in one of these shapes: [modules, *shape]."""
        entry = self.checkpoint.entries[self.names[0] + suffix]
        shape = entry.shape if entry.shape in shapes else shapes[0]
        return self.checkpoint.stack([name + suffix for name in self.names], shape, DTYPES[entry.dtype])

    def check(
        self,
        suffix: str,
        found: Tensor,
        wrong: Mapping[str, Callable[[Tensor], Tensor]],
        fine: Callable[[Tensor], bool] = lambda _values: False,
    ) -> None:
        """Raise ModelError for the first module that a test finds wrong, by its reason.

        Tests get the values of some of the modules of `found` [modules, …] and return bool [some modules, …]; where
        `fine` says at once that all are fine they are not asked.
        """
        for names, values in self.checkpoint.values([name + suffix for name in self.names], found):
            for reason, test in () if fine(values) else wrong.items():
                self._refuse(names, test(values), reason)

    def _refuse(self, names: Sequence[str], wrong: Tensor, reason: str) -> None:
        bad = wrong.reshape(len(names), -1).any(1).tolist()
        if any(bad):
            name = names[bad.index(True)]
            raise ModelError(f"{self.checkpoint.entries[name].path}: {name} {reason}")

    def has(self, suffix: str) -> bool:
        """Whether the modules have a tensor that not all have."""
        return self.names[0] + suffix in self.checkpoint.entries

    def scales(self, suffix: str, *shapes: tuple[int, ...], signed: bool = False) -> Tensor:
        """Return scales as they are stored: finite, and so is what they are of the largest number."""
        found = self.take(suffix, *shapes)
        largest = _LARGEST[self.stored.format]
        wrong = {"holds a scale that is not finite": lambda scales: ~(scales.float() * largest).isfinite()}
        if not signed:
            wrong["holds a negative scale"] = lambda scales: scales.float() < 0
        self.check(suffix, found, wrong, _are_usual)
        return found

    def powers(self, suffix: str, shape: tuple[int, ...]) -> Tensor:
        """Return scales that are powers of two: uint8, 2^(s − 127)."""
        found = self.take(suffix, shape).view(torch.uint8)
        wrong = {"holds a scale that is NaN or makes weights infinite": lambda codes: codes > 252}
        self.check(suffix, found, wrong, lambda codes: bool(codes.numpy().max() <= 252))
        return found

    def outer(self, suffix: str, *, divides: bool) -> Tensor:
        """Return one factor a module as float32 [modules, outputs]."""
        found = self.take(suffix, (), (1,)).reshape(-1, 1)
        largest = 448.0 * _LARGEST[self.stored.format]

        def wrong(factors: Tensor) -> Tensor:
            extreme = largest / factors if divides else largest * factors
            return ~(extreme.isfinite() & (extreme > 0))

        self.check(suffix, found, {"is no scale: it must be positive and leave weights finite": wrong})
        return found.expand(-1, self.outputs).contiguous()

    def order(self, suffix: str, columns: int) -> Tensor | None:
        """Return the column of scales of each input, int32 [modules, inputs]; None where they stand in order."""
        found = self.take(suffix, (self.inputs,))
        wrong = {f"holds a group that is not among {columns}": lambda order: (order < 0) | (order >= columns)}
        if not self.stored.groups:
            straight = torch.arange(self.inputs) // (self.stored.block[1] or self.inputs)
            reason = "is out of order, though the config has no activation order (desc_act)"
            wrong[reason] = lambda order: order != straight
        self.check(suffix, found, wrong)
        return found if self.stored.groups else None

    def check_order(self, orders: Tensor, parts: int) -> None:
        """Raise ModelError where not all of `parts` modules, which become one matrix, have the same order of inputs."""
        suffix = next(name for name in LAYOUTS[self.stored.layout].extras if name.endswith("g_idx"))
        names = [name + suffix for name in self.names]
        found = torch.cat([values for _, values in self.checkpoint.values(names, orders)])
        wrong = found != found[::parts].repeat_interleave(parts, dim=0)
        self._refuse(names, wrong, "is another order than that of a matrix with which this one is fused")

    def matrix(self, data: Tensor, scales: Tensor, **fields: Tensor | bool | None) -> QTensor:
        """Return what stands in `data` and `scales`: [modules, outputs, inputs]."""
        (rows, columns), shape = self.stored.block, (len(data), self.outputs, self.inputs)
        block = (rows or self.outputs, columns or self.inputs)
        return QTensor(data, self.stored.format, shape, block=block, scales=scales, **fields)  # type: ignore[arg-type]


def _are_usual(scales: Tensor) -> bool:
    """Whether all are from 0 to 2^100, by their bits in one thread: many times faster than their arithmetic."""
    most = torch.tensor(min(2.0**100, torch.finfo(scales.dtype).max)).to(scales.dtype)
    bits, top = (values.contiguous().view(_BITS[scales.itemsize]).numpy() for values in (scales, most))
    return bool(bits.min() >= 0 and bits.max() <= top)
