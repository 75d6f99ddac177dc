"""What the loop has executed for it, and what it measures of its own part."""

import time
from collections.abc import Sequence
from typing import Protocol

from fwd.engine.pages import Copy
from fwd.engine.request import Drawn, Prefilled
from fwd.engine.scheduler import Chunk, Span


class Runner(Protocol):
    """Executes work on the device, in the order in which it is given."""

    ahead: bool  # a step can be launched before the one before it is collected: it reads its ids where they are drawn
    deferred: bool  # `launch` returns before the step is computed

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy pages, in order, before what is launched next."""

    def prefill(self, chunk: Chunk) -> Prefilled:
        """Run one chunk: a drawn token for each of `chunk.drawing`, and the scores that are wanted."""

    def launch(self, spans: Sequence[Span]) -> None:
        """Launch one decode step."""

    def collect(self) -> Sequence[Sequence[Drawn]]:
        """Wait for the oldest step that is not collected: what each span that draws commits, in their order.

        Of a row that is not finite nothing is committed but that it is not, and that comes last.
        """


class HostWork:
    """Measures what the host does between reading one step and having launched the next."""

    WEIGHT = 1 / 64  # of the latest in the mean

    def __init__(self) -> None:
        self._since: float | None = None
        self.mean_us = 0.0

    def collected(self) -> None:
        """A step was read."""
        self._since = time.perf_counter()

    def launched(self) -> None:
        """The next one is launched."""
        if self._since is not None:
            spent = (time.perf_counter() - self._since) * 1e6
            self.mean_us += (spent - self.mean_us) * (self.WEIGHT if self.mean_us else 1.0)
        self._since = None

    def stop(self) -> None:
        """What comes next is no step, or nothing."""
        self._since = None
