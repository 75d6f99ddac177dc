"""The ring of steps in flight: each place has buffers of its own, so that the host fills one while another runs."""

import time
from collections.abc import Sequence
from itertools import islice

import torch

from fwd.engine.lines import Lines
from fwd.engine.plan import Plan
from fwd.engine.request import Drawn, Request
from fwd.engine.sampler import NO_TOP, mask_of
from fwd.engine.scheduler import BUCKETS, Span
from fwd.engine.speculate.verify import verified
from fwd.engine.step import CPU, Step, Table
from fwd.errors import EngineError
from fwd.kernels.drawing import FIELDS, new_outcome
from fwd.kernels.sizes import MAX_ROWS
from fwd.protocol.values import TopLogprobs

SPINS = 20_000  # looks at the stamp before the host waits between them: some milliseconds
PAUSE = 50e-6  # seconds; the kernel makes twice that of it


class Slot:
    """One place: the inputs of a step, and where the device writes what comes of it, in memory that the host reads.

    The stamp is polled, since it is written last and a look at it costs nothing; an event says if it never comes.
    """

    def __init__(self, plan: Plan, tables: Sequence[Table], lines: Lines, device: torch.device) -> None:
        self._step = Step(plan, MAX_ROWS, 1, tables, device=device, fields={"numbers": torch.int64, **FIELDS})
        self._lines, self._vocab = lines, plan.spec.vocab
        arrays = self._step.block.arrays
        self._numbers, self._kinds, self._places = arrays["numbers"], arrays["kinds"], arrays["places"]
        self._told: list[tuple[Request | None, int]] = [(None, -1)] * MAX_ROWS
        self._wanted: list[tuple[Span, int]] = []  # those that draw, and the first of their rows that does
        self._done = torch.cuda.Event() if device != CPU else None  # type: ignore[no-untyped-call]
        self.outcome = new_outcome(MAX_ROWS, plan.max_seqs, device, pinned=device != CPU)
        self._stamp = self.outcome.stamp.numpy()
        self.drawing = lines.drawing(self._step)
        self.number = self._step.block.tensors["numbers"][:1]
        self.ids = {size: self._step.ids[:size] for size in BUCKETS}
        self.rows = {size: self._step.rows(size) for size in BUCKETS}

    def fill(self, spans: Sequence[Span], number: int) -> int:
        """Fill in a step, its `number` being new, and send it to the device; the rows of its bucket."""
        lines, step = self._lines.assign(spans), self._step
        size, drawing = step.decode(spans, lines)
        self._numbers[0] = number
        if len(drawing) < size:
            self._silence(set(range(size)) - set(drawing))
        self._wanted.clear()
        rows = iter(drawing)
        for line, span in zip(lines, spans, strict=True):
            if span.draws:
                self._want(line, span, list(islice(rows, len(span.drafts) + 1)))
        step.block.upload()
        self._lines.upload()
        return size

    def _want(self, line: int, span: Span, rows: Sequence[int]) -> None:
        for place, row in enumerate(rows, span.end):
            self._draw(row, line, span.request, place)
        self._wanted.append((span, rows[0]))

    def _silence(self, rows: set[int]) -> None:
        for row in rows:
            self._kinds[row], self._told[row] = 0, (None, -1)

    def _draw(self, row: int, line: int, request: Request, place: int) -> None:
        """Have the row draw what comes at `place`: that is all to be told, if it drew for the request before."""
        if self._told[row] == (request, line) and self._lines.owns(line, request):
            self._places[row] = place
        else:
            steady = self._lines.fill(self._step, row, line, request, place)
            self._told[row] = (request, line) if steady else (None, -1)
        if (wanted := mask_of(request, place)) is not None:
            self._lines.constrain(row, wanted)

    def launched(self) -> None:
        """All of the step is launched."""
        if self._done:
            self._done.record()

    def collect(self, number: int) -> list[Sequence[Drawn]]:
        """Wait for the step and return what its spans commit; raises `EngineError` if it never came to its end.

        The device has verified the drafts already: what the next step reads does not wait for the host.
        """
        self._wait(number)
        found = self.outcome
        ids, logprobs, finite = found.ids.tolist(), found.logprobs.tolist(), found.finite.tolist()

        def drawn(span: Span, first: int) -> list[Drawn]:
            tops, rows = span.request.submit.sampling.logprobs, range(first, first + len(span.drafts) + 1)
            return [Drawn(ids[row], logprobs[row], self._top(row, tops), finite[row] != 0) for row in rows]

        return [verified(span.drafts, drawn(span, first)) for span, first in self._wanted]

    def _wait(self, number: int) -> None:
        for _ in range(SPINS):
            if self._stamp[0] == number:
                return
        while self._stamp[0] != number:
            ended = self._done is None or self._done.query()  # type: ignore[no-untyped-call]  # raises what went wrong on the device
            if ended and self._stamp[0] != number:
                raise EngineError(f"step {number} ended and left no result (the last one is of step {self._stamp[0]})")
            time.sleep(PAUSE)

    def _top(self, row: int, count: int) -> TopLogprobs:
        if count < 0:
            return NO_TOP
        count = min(count, self._vocab)
        ids, logprobs = self.outcome.top_ids[row, :count], self.outcome.top_logprobs[row, :count]
        return TopLogprobs(ids=tuple(ids.tolist()), logprobs=tuple(logprobs.tolist()))
