"""The engine's loop: messages in, one launch, committed tokens out. It blocks when idle and never sleeps with work."""

import time
from collections import deque
from collections.abc import Sequence

from msgspec.structs import replace

from fwd.engine.grammar import Grammars
from fwd.engine.reports import dropped, failed, pong, scored, timing, tokens
from fwd.engine.request import Drawn, Request
from fwd.engine.scheduler import Chunk, Scheduler, Span
from fwd.engine.space import Space
from fwd.engine.speculate.drafter import Off, Speculator
from fwd.engine.speculate.verify import until_end
from fwd.engine.work import HostWork, Runner
from fwd.errors import BadFrameError, FwdError, GrammarError, NonFiniteError
from fwd.protocol.frames import Channel
from fwd.protocol.messages import (
    Cancel,
    DropDrafts,
    Finished,
    Hello,
    Load,
    Message,
    Ping,
    Pong,
    Submit,
    ToEngine,
    Vocabulary,
)
from fwd.protocol.values import Reason

LOOK = 0.005  # seconds from look to look for messages while there is nothing but a grammar to wait for


class Loop:
    """Serves one front over `channel` until it closes, in chunks of `chunk` tokens; a bad grammar fails alone."""

    def __init__(
        self,
        channel: Channel[ToEngine],
        runner: Runner,
        space: Space,
        *,
        max_seqs: int,
        chunk: int,
        speculator: Speculator | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self._channel = channel
        self._runner = runner
        self._space = space
        self._speculator = speculator or Off()
        self._scheduler = Scheduler(space, max_seqs, chunk, self._speculator)
        self._grammars = grammars or Grammars(0)
        self._requests: dict[int, Request] = {}
        self._out: list[Message] = []
        self._flight: deque[Sequence[Span]] = deque()  # steps that are launched and not collected
        self._work = HostWork()
        self._since = 0.0  # when the step that is collected next was launched, or the one before it was collected
        self.steps = 0
        self.computed = 0

    def run(self) -> None:
        """Loop until end of file."""
        while True:
            try:
                self._receive()
            except EOFError:
                return
            if self.busy:
                self._step()
            self._flush()

    @property
    def busy(self) -> bool:
        """There is something to do."""
        return bool(self._scheduler or self._flight or self._grammars.busy)

    def _receive(self) -> None:
        """Handle what has arrived; wait for it only when there is nothing to do."""
        message = self._channel.receive(0 if self.busy or self._out else None)
        while message is not None:
            self._handle(message)
            message = self._channel.receive(0)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Cancel():
                if request := self._requests.get(message.id):
                    self._finish(request, "cancelled")
            case Ping():
                self._out.append(self._pong(message.seq))
            case Vocabulary():
                self._grammars.learn(message)
            case DropDrafts():
                self._out.append(dropped(self._speculator))
            case Hello() | Load():
                raise BadFrameError(f"{type(message).__name__} came after the model was loaded")

    def _submit(self, submit: Submit) -> None:
        request = Request(submit)
        request.clock.arrived = time.monotonic()
        self._requests[request.id] = request
        if not submit.grammar:
            self._scheduler.add(request)
            return
        self._grammars.enter(request)
        self._admit()

    def _admit(self, seconds: float = 0.0) -> None:
        """Queue those whose grammar is compiled, after so many seconds at most if there is none."""
        for request, error in self._grammars.leave(seconds):
            if error:
                del self._requests[request.id]
                self._out.append(failed(request, error))
            else:
                self._scheduler.add(request)

    def _pong(self, seq: int) -> Pong:
        found = pong(self._scheduler, self._space, self._speculator)
        host_us = self._work.mean_us if self._runner.deferred else 0.0
        return replace(found, seq=seq, steps=self.steps, computed=self.computed, host_us=host_us)

    def _step(self) -> None:
        """Launch what comes next and read the oldest step; when running ahead, messages are read between the two.

        So a request that is cancelled has one more step at most launched for it.
        """
        begins = not self._flight
        if self._grammars.busy:
            self._admit(LOOK if begins and not self._scheduler else 0.0)
        if begins:
            self._begin()
        elif spans := self._scheduler.follow(self._flight[-1]):
            self._launch(spans)
        if self._flight and not (begins and self._runner.ahead):
            self._collect()

    def _begin(self) -> None:
        work = self._scheduler.next()
        if isinstance(work, Chunk):
            self._enter()
            self._prefill(work)
        elif work:
            self._launch(work)
        else:
            assert not self._scheduler, "the scheduler holds requests and found nothing to run"

    def _enter(self) -> None:
        """Before every launch."""
        self.steps += 1
        if copies := self._space.take_copies():
            self._runner.copy(copies)

    def _launch(self, spans: Sequence[Span]) -> None:
        spans = [span for span in spans if not self._stuck(span.request)]
        if not spans:
            return
        self._enter()
        self._since = self._since if self._flight else time.perf_counter()
        self._runner.launch(spans)
        self._flight.append(spans)
        self._work.launched()

    def _prefill(self, chunk: Chunk) -> None:
        self._work.stop()
        self._speculator.paused()
        everyone = (chunk.request, *chunk.followers)
        for request in everyone:
            request.clock.started = request.clock.started or time.monotonic()
        drawing = chunk.drawing
        drawn, scores, finite = self._runner.prefill(chunk)
        if not finite:
            self._spoil(everyone)
            return
        self._commit_chunk(chunk)
        for request in everyone:
            if scores:
                self._score(request, chunk.start + 1, scores)
            if request.phase == "decode":
                request.clock.prefilled = request.clock.prefilled or time.monotonic()
                self._settle(request, drawn[drawing.index(request)] if request in drawing else None)

    def _spoil(self, requests: Sequence[Request]) -> None:
        """Nobody may go on from rows that are not finite."""
        for request in requests:
            if request.id in self._requests:
                self._fail_non_finite(request)
            else:
                self._scheduler.remove(request)

    def _commit_chunk(self, chunk: Chunk) -> None:
        request, space = chunk.request, self._space
        self.computed += chunk.end - chunk.start
        space.commit(request, chunk.end)
        space.publish(request)
        if request.phase == "decode":
            for follower in chunk.followers:
                space.fork(request, follower)

    def _collect(self) -> None:
        drawn = iter(self._runner.collect())
        self._work.collected()
        spans = self._flight.popleft()
        rows, drafts = sum(span.reach - span.start for span in spans), sum(len(span.drafts) for span in spans)
        before, self._since = self._since, time.perf_counter()
        self._speculator.measured(rows, drafts, self._since - before)
        launched = {span.request.id for later in self._flight for span in later}
        for span in spans:
            verified = next(drawn) if span.draws else ()
            if self._requests.get(span.request.id) is span.request:
                self._keep(span, until_end(span.request, verified), ahead=span.request.id in launched)

    def _keep(self, span: Span, drawn: Sequence[Drawn], *, ahead: bool) -> None:
        """Commit what a span drew as one: ids, cells and records; what rejected drafts left is written over."""
        request, draws, finite = span.request, span.draws, [token for token in drawn if token.finite]
        request.clock.steps += 1
        if finite:
            self._commit(request, finite)
        held = max(0, len(finite) - 1)
        self.computed += span.end - span.start + held
        self._space.commit(request, span.end + held, int(ahead))
        if span.drafts:
            request.count(span.proposal.drafter, len(span.drafts), held)
        if finite:
            self._speculator.settle(request, span.proposal, len(finite))
        if len(finite) < len(drawn):
            self._fail_non_finite(request)
        elif draws:
            self._end(request)

    def _score(self, request: Request, start: int, scores: Sequence[Drawn]) -> None:
        if request.id not in self._requests:
            return
        if not all(score.finite for score in scores):
            self._fail_non_finite(request)
            return
        self._out.append(scored(request, start, scores))

    def _settle(self, request: Request, drawn: Drawn | None) -> None:
        """Commit what was drawn, tell the reader, and end the request if its last token is known."""
        if request.id not in self._requests:
            return
        if drawn and not drawn.finite:
            self._fail_non_finite(request)
            return
        if drawn and (kept := until_end(request, [drawn])):
            self._commit(request, kept)
        self._end(request)

    def _end(self, request: Request) -> None:
        """End the request if its last token is known, or cannot be."""
        last, grammar = request.ids[-1], request.grammar
        if self._stuck(request):
            return
        if request.output and last in request.stop_ids:
            self._finish(request, "stop", last)
        elif grammar and grammar.ended:
            self._finish(request, "stop", last if last in grammar.ends else -1)
        elif request.length == request.limit:
            self._finish(request, "length")

    def _commit(self, request: Request, drawn: Sequence[Drawn]) -> None:
        self._out.append(tokens(request, drawn))
        request.append([token.id for token in drawn])

    def _stuck(self, request: Request) -> bool:
        """Fail a request whose grammar lets it go on no more; whether it is one."""
        if request.grammar is None or not request.grammar.error:
            return False
        self._fail(request, GrammarError(request.grammar.error))
        return True

    def _fail_non_finite(self, request: Request) -> None:
        self._fail(request, NonFiniteError("the model produced NaN or infinity for this request"))

    def _fail(self, request: Request, error: FwdError) -> None:
        self._out.append(failed(request, error))
        self._drop(request)

    def _finish(self, request: Request, reason: Reason, stop_id: int = -1) -> None:
        self._out.append(Finished(id=request.id, reason=reason, stop_id=stop_id, timing=timing(request)))
        self._drop(request)
        self._scheduler.retain(request)

    def _drop(self, request: Request) -> None:
        if not self._grammars.forget(request):
            self._scheduler.remove(request)
        self._speculator.end(request)
        del self._requests[request.id]

    def _flush(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self._channel.send(*out)
