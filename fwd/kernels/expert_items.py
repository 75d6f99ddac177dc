"""How the work of experts is cut and launched, of decode rows and of a chunk: items of visits, formats in turn."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fwd.kernels.launch import Launcher
from fwd.kernels.packing import TILE, name_of
from fwd.kernels.qtensor import QTensor
from fwd.kernels.sizes import ITEM, MAX_ROWS, mixture_products

THREADS, WARPS, TEAMS = 256, 8, 2
MEMBERS = WARPS // TEAMS
PITCH = 20  # floats from the sums of a visit to those of the next
EARLY = 32  # floats of an item's biases and factors


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """What kernels leave for each other between `route` and `expert_down`, for layers that take turns.

    `table` holds the number of items; from word 4 on the items, by expert: number, first of its visits in order, how
    many, 0; then the visits in order, row · top_k + place; their rows; where each visit stands there; and its item.
    """

    table: Tensor  # int32 [4 + 8 · visits]
    logits: Tensor  # float32 [rows · experts]
    products: Tensor  # float32 [(visits + rows) · hidden]; of decode rows: the shared expert's in another format
    counters: Tensor  # int32 [rows / 8 + 1]: 0 between launches

    @classmethod
    def of(cls, launcher: Launcher, hidden: int, experts: int, top_k: int, *, rows: int = MAX_ROWS) -> "Workspace":
        """Return one for steps of up to `rows` rows: `sizes.mixture_bytes`."""
        return cls(
            launcher.empty((4 + 8 * rows * top_k,), torch.int32),
            launcher.empty((rows * experts,), torch.float32),
            launcher.empty((mixture_products(rows, top_k) * hidden,), torch.float32),
            torch.zeros(-(-rows // ITEM) + 1, dtype=torch.int32, device=launcher.device),
        )


class Turn(NamedTuple):
    """A launch over weights of one format."""

    name: str  # of the format
    own: QTensor | None  # the experts that rows choose
    shared: QTensor | None

    def total(self, own: int, shared: int) -> int:
        """Return how much of both it takes."""
        return own * (self.own is not None) + shared * (self.shared is not None)

    def weights(self, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return what a kernel is given: of the experts numbers, factors and bias, of the shared one the first two."""
        return (*_pointers(self.own), bias, *_pointers(self.shared))


def turns(own: QTensor, shared: QTensor | None) -> list[Turn]:
    """Return the launches of both: a shared expert in another format goes first, alone."""
    if shared is None or name_of(shared) == name_of(own):
        return [Turn(name_of(own), own, shared)]
    return [Turn(name_of(shared), None, shared), Turn(name_of(own), own, None)]


def pairs(width: int) -> int:
    """Units of an item: pairs of tiles, each of 8 places that have gate and up, or of 16 outputs of twice as many."""
    return -(-width // TILE)


def item_bytes(item: int) -> int:
    """Bytes of shared memory of a block that takes items of up to `item` rows: sums and what is early, twice."""
    return 2 * 4 * TEAMS * (MEMBERS * PITCH * item + EARLY)


def _pointers(weight: QTensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if weight is None else (weight.data, weight.outer)
