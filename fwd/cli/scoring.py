"""A text of any length through a context: windows, and the log-probability of each token in one of them."""

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fwd.protocol.client import Client, Event
from fwd.protocol.messages import PromptLogprobs

IN_FLIGHT = 2  # one is computed while the next waits: a prefill has the engine to itself


class Window(NamedTuple):
    """Tokens [start, end) of the text; those from `scored` on are scored here."""

    start: int
    end: int
    scored: int


def windows(count: int, size: int, stride: int) -> Iterator[Window]:
    """Windows of `size` over `count` tokens, each `stride` further on; the last one ends with the text.

    Each token is scored once, in the first window that holds it, so with at least size − stride tokens before it,
    unless it is in the first.
    """
    end = min(size, count)
    yield Window(0, end, 0)
    while end < count:
        scored, end = end, min(end + stride, count)
        yield Window(end - size, end, scored)


class Text:
    """The ids of a text, `head` that stands before every window, and the log-probability (natural) of each id.

    Without a head the first id has none: nothing stands before it.
    """

    def __init__(self, head: Sequence[int], ids: Sequence[int]) -> None:
        self.head = head
        self.ids = ids
        self.logprobs = array("d", [math.nan]) * len(ids)

    @property
    def unscored(self) -> int:
        """How many ids at the start have no log-probability."""
        return 0 if self.head else 1

    @property
    def scored(self) -> int:
        """How many have one."""
        return len(self.ids) - self.unscored

    @property
    def nats(self) -> float:
        """The sum of the negative log-probabilities."""
        return -math.fsum(self.logprobs[self.unscored :])

    def score(self, daemon: Client, plan: Iterator[Window], told: Callable[[int], None]) -> None:
        """Have the daemon score every window; `told` hears how many ids are done. Raises what the daemon answers."""
        flight: deque[tuple[Window, Iterator[Event]]] = deque()
        for window in plan:
            flight.append((window, self._submit(daemon, window)))
            if len(flight) == IN_FLIGHT:
                told(self._read(*flight.popleft()))
        while flight:
            told(self._read(*flight.popleft()))

    def _submit(self, daemon: Client, window: Window) -> Iterator[Event]:
        """The events of a request that scores a window and draws nothing; it is on its way."""
        prompt = [*self.head, *self.ids[window.start : window.end]]
        events = daemon.submit(prompt, max_tokens=0, prompt_logprobs=0, cache=False)
        next(events)  # `Accepted`
        return events

    def _read(self, window: Window, events: Iterator[Event]) -> int:
        for event in events:
            if isinstance(event, PromptLogprobs):
                self._keep(window, window.start - len(self.head) + event.start, event.logprobs)
        return window.end

    def _keep(self, window: Window, first: int, logprobs: Sequence[float]) -> None:
        """Keep what this window scores of the ids from `first` on."""
        fresh = logprobs[max(0, window.scored - first) :]
        begin = first + len(logprobs) - len(fresh)
        self.logprobs[begin : begin + len(fresh)] = array("d", fresh)
