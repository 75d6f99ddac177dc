"""How long launches take: captured in one graph and replayed on a GPU, called one by one elsewhere.

Caches must be cold: a caller gives launches that together read several times the L2, so that none finds what an earlier
one left. Times are per launch in the graph, where a launch overlaps the one before it, as in a decode step.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from fwd.kernels.launch import Launcher

Work = Callable[[], object]
COLD = 4  # times the L2 that must pass before something is read again
WARM_UP = 3


class Clock(Protocol):
    """Times work in seconds."""

    def samples(self, launches: Sequence[Work], repeats: int) -> list[float]:
        """Seconds of one launch, in each of `repeats` runs of all of them."""
        ...


class GraphClock:
    """Events around replays of a captured graph."""

    def samples(self, launches: Sequence[Work], repeats: int) -> list[float]:
        """As `Clock`; every launch has run once before the capture."""
        graph, keep = _captured(launches)
        for _ in range(WARM_UP):
            graph.replay()
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in marks:
            begin.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        del keep
        return [begin.elapsed_time(end) / 1e3 / len(launches) for begin, end in marks]


class WallClock:
    """The host's clock, for dry runs."""

    def samples(self, launches: Sequence[Work], repeats: int) -> list[float]:
        """As `Clock`; every launch has run once before, so that nothing is compiled in it."""
        _seconds(launches)
        return [_seconds(launches) / len(launches) for _ in range(repeats)]


def clock(device: str) -> Clock:
    """The clock of a device."""
    return GraphClock() if device == "cuda" else WallClock()


def launcher(device: str, *, dependent: bool = True) -> Launcher:
    """What launches kernels on `cuda` or `host`, plainly or not; raises `KernelError` where that cannot be."""
    if device == "cuda":
        from fwd.kernels.cuda import CudaLauncher  # noqa: PLC0415  # it needs a driver

        return CudaLauncher(dependent=dependent)
    from fwd.kernels.host import HostLauncher  # noqa: PLC0415  # it needs a compiler

    return HostLauncher()


def copies(size: int, l2: int, most: int = 512) -> int:
    """How many buffers of `size` bytes to use in turns so that each is cold when its turn comes again."""
    return min(most, max(2, -(-COLD * l2 // size)))


def _captured(launches: Sequence[Work]) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """The graph, and what the launches returned: its memory stays in use until the graph is gone."""
    for work in launches:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        keep = [work() for work in launches]
    return graph, keep


def _seconds(launches: Sequence[Work]) -> float:
    began = time.perf_counter()
    for work in launches:
        work()
    return time.perf_counter() - began
