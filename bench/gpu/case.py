"""One operation at one size, as `gpu.cases` and `gpu.sparse` make them and kernels.py times them."""

from dataclasses import dataclass

import torch

from gpu.timing import Work

PAGE = 16
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One operation at one size."""

    name: str
    ours: list[Work]
    theirs: list[Work]
    read: int = 0  # bytes that a launch must read
    operations: int = 0  # or what it must compute
    per_step: int = 0  # launches in a decode step
    call: str = ""  # of torch's
