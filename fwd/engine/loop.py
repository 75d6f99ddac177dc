"""The engine's loop: messages in, one launch, committed tokens out. It blocks when idle and never sleeps with work."""

import time
from collections.abc import Sequence
from typing import Protocol

from fwd.engine.pages import Copy
from fwd.engine.request import Drawn, Prefilled, Request
from fwd.engine.scheduler import Chunk, Scheduler, Span
from fwd.engine.space import Space
from fwd.errors import BadFrameError, NonFiniteError
from fwd.protocol.frames import Channel
from fwd.protocol.messages import (
    Cancel,
    Failed,
    Finished,
    Hello,
    Load,
    Message,
    Ping,
    Pong,
    Prefilling,
    PromptLogprobs,
    Reason,
    Submit,
    Timing,
    ToEngine,
    Tokens,
)


class Runner(Protocol):
    """Executes work on the device."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy pages, in order, before what is launched next."""

    def prefill(self, chunk: Chunk) -> Prefilled:
        """Run one chunk: a drawn token for each of `chunk.drawing`, and the scores that are wanted."""

    def decode(self, spans: Sequence[Span]) -> Sequence[Drawn]:
        """Run one step: a drawn token for each span that draws, in their order."""


class Loop:
    """Serves one front over `channel` until it closes. `chunk` is the prefill chunk in tokens."""

    def __init__(self, channel: Channel[ToEngine], runner: Runner, space: Space, *, max_seqs: int, chunk: int) -> None:
        self._channel = channel
        self._runner = runner
        self._space = space
        self._scheduler = Scheduler(space, max_seqs, chunk)
        self._requests: dict[int, Request] = {}
        self._out: list[Message] = []
        self.steps = 0
        self.computed = 0

    def run(self) -> None:
        """Loop until end of file."""
        while True:
            try:
                self._receive()
            except EOFError:
                return
            if self._scheduler:
                self._step()
            self._flush()

    def _receive(self) -> None:
        """Handle what has arrived; wait for it only when there is nothing to do."""
        message = self._channel.receive(0 if self._scheduler or self._out else None)
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
            case Hello() | Load():
                raise BadFrameError(f"{type(message).__name__} came after the model was loaded")

    def _submit(self, submit: Submit) -> None:
        request = Request(submit)
        request.clock.arrived = time.monotonic()
        self._requests[request.id] = request
        self._scheduler.add(request)

    def _pong(self, seq: int) -> Pong:
        pool, scheduler = self._space.main, self._scheduler
        return Pong(
            seq=seq,
            steps=self.steps,
            running=scheduler.running,
            waiting=scheduler.waiting,
            pages_free=pool.free,
            pages_total=pool.total,
            pages_cached=pool.cached,
            computed=self.computed,
            prefilling=[
                Prefilling(id=each.id, done=(each.leader or each).computed, total=each.prompt)
                for each in scheduler.prefilling
            ],
        )

    def _step(self) -> None:
        work = self._scheduler.next()
        if not work:
            assert not self._scheduler, "the scheduler holds requests and found nothing to run"
            return
        self.steps += 1
        if copies := self._space.take_copies():
            self._runner.copy(copies)
        if isinstance(work, Chunk):
            self._prefill(work)
        else:
            self._decode(work)

    def _prefill(self, chunk: Chunk) -> None:
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

    def _decode(self, spans: Sequence[Span]) -> None:
        drawn = iter(self._runner.decode(spans))
        for span in spans:
            span.request.clock.steps += 1
            draws = span.draws
            self.computed += span.end - span.start
            self._space.commit(span.request, span.end)
            if draws:
                self._settle(span.request, next(drawn))

    def _score(self, request: Request, start: int, scores: Sequence[Drawn]) -> None:
        if request.id not in self._requests:
            return
        if not all(score.finite for score in scores):
            self._fail_non_finite(request)
            return
        self._out.append(
            PromptLogprobs(
                id=request.id,
                start=start,
                logprobs=[score.logprob for score in scores],
                top=[score.top for score in scores],
            )
        )

    def _settle(self, request: Request, drawn: Drawn | None) -> None:
        """Commit what was drawn, tell the reader, and end the request if its last token is known."""
        if request.id not in self._requests:
            return
        if drawn and not drawn.finite:
            self._fail_non_finite(request)
            return
        if drawn:
            self._commit(request, [drawn])
        last = request.ids[-1]
        if request.output and last in request.stop_ids:
            self._finish(request, "stop", last)
        elif request.length == request.limit:
            self._finish(request, "length")

    def _commit(self, request: Request, drawn: Sequence[Drawn]) -> None:
        ids = [token.id for token in drawn]
        wanted = request.submit.sampling.logprobs >= 0
        self._out.append(
            Tokens(
                id=request.id,
                start=request.output,
                ids=ids,
                logprobs=[token.logprob for token in drawn] if wanted else [],
                top=[token.top for token in drawn] if wanted else [],
            )
        )
        request.append(ids)

    def _fail_non_finite(self, request: Request) -> None:
        error = NonFiniteError("the model produced NaN or infinity for this request")
        self._out.append(Failed(id=request.id, code=error.code, message=error.message))
        self._drop(request)

    def _finish(self, request: Request, reason: Reason, stop_id: int = -1) -> None:
        self._out.append(Finished(id=request.id, reason=reason, stop_id=stop_id, timing=_timing(request)))
        self._drop(request)
        self._scheduler.retain(request)

    def _drop(self, request: Request) -> None:
        self._scheduler.remove(request)
        del self._requests[request.id]

    def _flush(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self._channel.send(*out)


def _timing(request: Request) -> Timing:
    clock, now = request.clock, time.monotonic()
    started = clock.started or now
    prefilled = clock.prefilled or now
    return Timing(
        queue_ms=(started - clock.arrived) * 1e3,
        prefill_ms=(prefilled - started) * 1e3,
        decode_ms=(now - prefilled) * 1e3,
        steps=clock.steps,
        cached_tokens=max(0, request.cached),
        cache_miss=request.miss,
        differs_at=request.differs_at,
    )
