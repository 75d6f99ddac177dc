"""What runs next: one prefill chunk, or one decode step of up to `MAX_ROWS` rows."""

from collections import deque
from typing import NamedTuple

from fwd.engine.pages import PagedSpace
from fwd.engine.request import Request

MAX_ROWS = 16


class Chunk(NamedTuple):
    """Prefill chunk `number` of the request's prompt."""

    request: Request
    number: int


class Span(NamedTuple):
    """Decode rows for the known ids [start, end) of a request; a token is drawn if that is all of them."""

    request: Request
    start: int
    end: int

    @property
    def draws(self) -> bool:
        """The last row of the span draws the next token."""
        return self.end == self.request.length


class Scheduler:
    """First come, first served, interactive before background; prefill chunks between decode steps.

    A running stream waits for at most one chunk. When pages run out the youngest request of the lowest class is
    preempted: it gives its pages back and is prefilled and replayed later, so its reader sees a pause only.
    """

    def __init__(self, space: PagedSpace, max_seqs: int, chunk: int) -> None:
        assert max_seqs <= MAX_ROWS
        self._space = space
        self._max_seqs = max_seqs
        self._chunk = chunk
        self._waiting: tuple[deque[Request], deque[Request]] = (deque(), deque())
        self._running: list[Request] = []
        self._chunk_last = False

    @property
    def running(self) -> int:
        """Requests that hold pages."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that hold none."""
        return sum(map(len, self._waiting))

    def __bool__(self) -> bool:
        return bool(self._running) or any(self._waiting)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._waiting[request.background].append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, whatever its state, and free its pages."""
        if request in self._running:
            self._running.remove(request)
            self._space.release(request)
        else:
            self._waiting[request.background].remove(request)

    def next(self) -> Chunk | list[Span]:
        """The next work; an empty list when there is none."""
        self._admit()
        if self._chunk_last or not self._prefills():
            self._chunk_last = False
            if spans := self._spans():
                return spans
        self._chunk_last = True
        if not (prefills := self._prefills()):
            return []
        first = min(prefills, key=lambda request: request.background)
        return Chunk(first, first.computed // self._chunk)

    def _prefills(self) -> list[Request]:
        return [request for request in self._running if request.phase == "prefill"]

    def _admit(self) -> None:
        for queue in self._waiting:
            while queue and len(self._running) < self._max_seqs and self._place(queue[0]):
                self._running.append(queue.popleft())
            if queue:
                return

    def _place(self, request: Request) -> bool:
        """Reserve the known ids and one more; on the chunk grid the cells of padding rows are never written."""
        return self._space.reserve(request, min(request.length + 1, request.limit))

    def _spans(self) -> list[Span]:
        """One row for everyone who decodes, the rest of the rows for whoever has ids to replay, oldest first."""
        deciding = [request for request in self._running if request.phase == "decode"]
        spare = MAX_ROWS - len(deciding)
        spans: list[Span] = []
        for request in deciding:
            rows = min(request.pending, 1 + spare)
            spare -= rows - 1
            spans.append(Span(request, request.computed, request.computed + rows))
        secured = [span for span in spans if self._secure(span)]
        return [span for span in secured if span.request.pages]

    def _secure(self, span: Span) -> bool:
        """Find pages for the span, preempting whom it must; False if that was the request itself."""
        while span.request.pages and not self._space.reserve(span.request, span.end):
            self._preempt(max(self._running, key=lambda request: (request.background, request.clock.arrived)))
        return bool(span.request.pages)

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        self._space.release(request)
        request.restart()
        self._waiting[request.background].appendleft(request)
