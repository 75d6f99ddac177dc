"""What comes to L2 while a router chooses: a part of the next layer's weights, each byte once and none beside them."""

import ctypes
import mmap
from dataclasses import replace

import pytest
import torch
from mixtures import SHAPES, Mixture, steps

from fwd.errors import KernelError
from fwd.kernels import expert_kernels
from fwd.kernels.expert_kernels import _AHEAD, Ahead, Workspace
from fwd.kernels.host import HostLauncher
from fwd.kernels.qtensor import QTensor

MIB = 1 << 20


def weights(lines):
    """Of 64 bytes each: shares of some blocks are uneven."""
    return QTensor.plain(torch.randn(lines, 32).bfloat16()).pack()


def routed(launcher, rows, ahead):
    """What is routed beside weights that are fetched."""
    shape = next(shape for shape in SHAPES if shape.hidden == 72)
    mixture = Mixture(shape, torch.bfloat16, 5)
    router = replace(mixture.router, weight=mixture.router.weight.pack(), ahead=ahead)
    space = Workspace.of(launcher, shape.hidden, shape.experts, shape.top_k, rows=max(rows, 16))
    made = expert_kernels.route(launcher, space, mixture.hidden(rows), router, steps([0] * rows))
    order = space.table[4 + 4 * rows * shape.top_k :][: rows * shape.top_k]
    return [*made, order.clone(), space.counters]


def at_the_end_of_memory(weight):
    """The same weight, behind which nothing may be touched."""
    page, size = mmap.PAGESIZE, weight.data.nbytes
    memory = mmap.mmap(-1, 2 * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + page), page, 0) == 0
    data = torch.frombuffer(memory, dtype=torch.uint8, offset=page - size, count=size)
    data.copy_(weight.data.view(torch.uint8).flatten())
    return replace(weight, data=data.view(weight.data.dtype).view(weight.data.shape))


def fetch(launcher):
    """Of a launcher on three multiprocessors, whose blocks have uneven shares."""
    launcher.multiprocessors = 3
    routed(launcher, 3, at_the_end_of_memory(weights(16)))


@pytest.mark.parametrize("size", [16, 48, 4096, 100_000, 7 * MIB, _AHEAD, _AHEAD + 16, 30 * MIB])
@pytest.mark.parametrize(("blocks", "multiprocessors"), [(8, 132), (2, 132), (16, 148), (4, 4), (300, 132), (1, 1)])
def test_every_byte_is_fetched_once(size, blocks, multiprocessors):
    share = Ahead.of(size, blocks, multiprocessors)
    assert share.nbytes == min(size, _AHEAD)
    assert share.each % 16 == 0
    fetched = [
        min(share.each, share.nbytes - index * share.each)
        for index in range(share.planes * blocks)
        if index * share.each < share.nbytes
    ]
    assert sum(fetched) == share.nbytes
    assert all(count % 16 == 0 for count in fetched)
    if multiprocessors > 2 * blocks:
        assert multiprocessors - 2 * blocks < share.planes * blocks <= multiprocessors - blocks


def test_nothing_ahead_takes_no_blocks():
    assert Ahead.of(0, 8, 132) == Ahead.of(15, 8, 132) == (0, 0, 0)


@pytest.mark.parametrize("rows", [1, 8, 11])
def test_what_is_fetched_changes_no_result(execution, rows):
    alone = execution.everywhere(lambda launcher: routed(launcher, rows, None))
    beside = execution.everywhere(lambda launcher: routed(launcher, rows, weights(40).to(launcher.device)))
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one, other)


def test_nothing_is_fetched_beside_the_weights():
    fetch(HostLauncher())


def test_a_chunk_fetches_nothing(monkeypatch):
    launcher, grids = HostLauncher(), []
    launch = launcher.launch
    monkeypatch.setattr(
        launcher, "launch", lambda kernel, grid, *rest: (grids.append(grid), launch(kernel, grid, *rest))
    )
    for rows in (16, 24):
        routed(launcher, rows, weights(40))
    assert [grid[2] > 1 for grid in grids] == [True, False]


def test_a_share_that_is_not_cut_is_caught(execution):
    launcher = execution.mutant("route.cu", "min(int64_t{each}, bytes - from)", "each")
    with pytest.raises(KernelError, match=r"reads or writes at 0x[0-9a-f]*, where nothing is"):
        fetch(launcher)
