"""How the kernels of `cuda/` are launched: one interface, executed by a GPU or by the CPU (`fwd.kernels.host`)."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Argument = Tensor | int | float | None  # a pointer (None: null), an int32, a float


@dataclass(frozen=True, slots=True)
class Kernel:
    """One `extern "C" __global__` function of a file in `cuda/`."""

    source: str  # "gemv.cu"
    name: str


class Launcher(Protocol):
    """Launches kernels in order, each after all before it as far as memory is concerned. Not thread-safe."""

    name: str  # "cuda" or "host"
    device: torch.device  # of every tensor that a kernel is given
    multiprocessors: int
    shared_limit: int  # bytes of dynamic shared memory a block may take
    dependent: bool  # launches overlap: programmatic dependent launch

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        *arguments: Argument,
        cooperative: bool = False,
    ) -> None:
        """Launch `grid` blocks of `threads` threads with `shared` bytes of dynamic shared memory each.

        Arguments must match the kernel's parameters, which are pointers, `int` and `float`. All blocks of a cooperative
        grid run at once; the caller sees to it that they fit. Raises `KernelError` if the launch is refused.
        """
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory for a kernel's output, its contents undefined (`host` fills it with poison)."""
        ...
