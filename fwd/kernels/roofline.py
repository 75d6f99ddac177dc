"""What a device itself can do, launched: `cuda/roofline.cu`. For benches only."""

import torch
from torch import Tensor

from fwd.kernels.launch import Kernel, Launcher

READ = Kernel("roofline.cu", "read_stream")
EMPTY = Kernel("roofline.cu", "empty_step")
MEET = Kernel("roofline.cu", "meet")
THREADS = 512
WARPS = THREADS // 32
TILE = THREADS * 8 * 16  # bytes that a block reads at once
BLOCKS = 2  # on a multiprocessor: 128 KiB of loads in flight


def read_grid(size: int, multiprocessors: int) -> int:
    """Blocks that read `size` bytes: as many as run at once, or one a tile."""
    return max(1, min(BLOCKS * multiprocessors, -(-size // TILE)))


def read_stream(launcher: Launcher, data: Tensor) -> Tensor:
    """Read a contiguous tensor of a multiple of 16 bytes once, as weights are read.

    Returns int32 [blocks·16] sums of its 32-bit words, which add up to the sum of all of them modulo 2^32.
    """
    assert data.is_contiguous(), tuple(data.shape)
    assert data.nbytes % 16 == 0 < data.nbytes < 1 << 35, data.nbytes
    blocks = read_grid(data.nbytes, launcher.multiprocessors)
    sums = launcher.empty((blocks * WARPS,), torch.int32)
    launcher.launch(READ, (blocks, 1, 1), THREADS, 0, data, sums, data.nbytes // 16)
    return sums


def empty_step(launcher: Launcher, steps: Tensor) -> None:
    """Launch a kernel on every multiprocessor that adds 1 to `steps`, int32 [1], and does nothing else."""
    assert steps.dtype == torch.int32, steps.dtype
    launcher.launch(EMPTY, (launcher.multiprocessors, 1, 1), THREADS, 0, steps)


def meet(launcher: Launcher, state: Tensor, steps: Tensor, rounds: int) -> None:
    """Let one block a multiprocessor meet `rounds` times, and count them in `steps`; both int32 [1], `state` 0."""
    assert state.dtype == steps.dtype == torch.int32, (state.dtype, steps.dtype)
    launcher.launch(MEET, (launcher.multiprocessors, 1, 1), THREADS, 0, state, steps, rounds, cooperative=True)
