"""A step as one launch: captured once for each number of rows and each place in the ring, replayed from then on.

Nothing is allocated after the capture, and each kernel has run before it: it loads no module and fills no cache.
"""

import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

Run = Callable[[], None]


class Eager:
    """Runs a step by launching its kernels one by one: where there is no stream to capture."""

    def __init__(self, run: Callable[[int, int], None]) -> None:
        self._run = run

    def launch(self, slot: int, size: int) -> None:
        """Run the step in `slot` of the ring with `size` rows."""
        self._run(slot, size)


class Graphs:
    """The captured steps, which share one memory pool: they never run at once, and keep nothing of what they take."""

    def __init__(self, run: Callable[[int, int], None], keys: Iterable[tuple[int, int]]) -> None:
        """Capture `run(slot, size)` for each of `keys` on torch's current stream."""
        wanted = sorted(keys, key=lambda key: -key[1])  # the widest first: the others fit in what it takes
        for slot, size in wanted:
            run(slot, size)
        torch.cuda.synchronize()
        gc.collect()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        self._graphs = {key: _capture(partial(run, *key), pool, stream) for key in wanted}

    def launch(self, slot: int, size: int) -> None:
        """Launch the step in `slot` of the ring with `size` rows."""
        self._graphs[slot, size].replay()


def _capture(run: Run, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph
