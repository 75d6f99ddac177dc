"""What drafters see of a model beside its ids: hidden rows after some of its blocks, copied while it runs."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Taps:
    """A buffer at a fixed address; of a launch it holds as many rows as that has, the rest is left as it was."""

    blocks: tuple[int, ...]  # numbers of blocks, ascending
    rows: Tensor  # [capacity, len(blocks)·hidden], the model's dtype: after the first of `blocks`, after the next, …

    def take(self, block: int, hidden: Tensor) -> None:
        """Copy hidden [rows, hidden] as the block leaves it, if that is wanted."""
        if block in self.blocks:
            begin = self.blocks.index(block) * hidden.shape[1]
            self.rows[: len(hidden), begin : begin + hidden.shape[1]].copy_(hidden)
