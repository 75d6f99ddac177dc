"""What HTTP and the local socket share: text in, streams out, and one look at the whole daemon."""

import asyncio
import contextlib
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import structlog
from msgspec.structs import replace

from fwd import __version__
from fwd.config import Config
from fwd.errors import (
    DeadlineError,
    EngineError,
    FwdError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
)
from fwd.front.bounds import bounded, notes
from fwd.front.grammars import GrammarTrials
from fwd.front.prompts import Prompts
from fwd.front.queue import MAX_OPEN, queue_tokens, retry_after
from fwd.front.streams import Stream
from fwd.front.supervisor import Supervisor
from fwd.protocol.local import Requests, Status
from fwd.protocol.messages import Finished, Submit
from fwd.protocol.values import EngineInfo, RequestInfo

log = structlog.get_logger("fwd.request")
SETTLE = 0.5  # seconds for the engine's account of an answer that a stop string ended


class Service:
    """The daemon without its sockets. `stop` is set by whoever runs it; `observers` hear of every ended stream.

    `shed` counts by wire code the requests that were refused for what will pass.
    """

    def __init__(self, config: Config, supervisor: Supervisor) -> None:
        self.config = config
        self.supervisor = supervisor
        self.draining = False
        self._prompts: Prompts | None = None
        self.listening: list[str] = []
        self.stop: Callable[[], None] = lambda: None
        self.observers: list[Callable[[Stream], None]] = []
        self.tokens_out = 0
        self.shed = Counter({OverloadedError.code: 0, NotReadyError.code: 0})
        self._ids = count(1)
        self._streams: dict[int, Stream] = {}
        self._trials: GrammarTrials | None = None
        self._started = time.monotonic()

    @property
    def prompts(self) -> Prompts:
        """The text side; raises `NotReadyError` until it is loaded."""
        if self._prompts is None:
            raise NotReadyError("not ready: the tokenizer is loading", retry_after=1)
        return self._prompts

    @prompts.setter
    def prompts(self, prompts: Prompts) -> None:
        self._prompts = prompts

    async def check_grammar(self, grammar: str, param: str = "grammar") -> None:
        """Raise, as `GrammarTrials.check` does, unless engines can follow a grammar in bounded time and memory."""
        if self._trials is None:
            self._trials = GrammarTrials(lambda: self.prompts.vocabulary)
        await self._trials.check(grammar, param)

    def close(self) -> None:
        """End what runs beside the engine."""
        if self._trials:
            self._trials.close()

    @property
    def streams(self) -> Iterable[Stream]:
        """The open streams, oldest first."""
        return self._streams.values()

    def info(self) -> EngineInfo:
        """What the engine loaded; raises `NotReadyError` until it has, `EngineError` if it never will."""
        keeper = self.supervisor.active
        if keeper.state == "failed":
            raise EngineError(f"the engine cannot be started: {keeper.reason}")
        if self.draining:
            raise NotReadyError("not ready: the daemon is stopping", retry_after=5)
        if keeper.info is None:
            raise NotReadyError(f"not ready: {keeper.reason}", retry_after=1)
        return keeper.info

    def check_model(self, name: str) -> None:
        """Raise `ModelNotFoundError`, which lists what is known, if `name` is not the served model."""
        if name != self.config.served_name:
            raise ModelNotFoundError(
                f"no model {name!r} here: this daemon serves {self.config.served_name!r}", param="model"
            )

    def check_queue(self, tokens: int = 1, requests: int = 1) -> None:
        """Raise `OverloadedError` if there is no room for so much; into an empty queue any one request fits."""
        keeper = self.supervisor.active
        waiting, limit, rate = keeper.queue.tokens, self.config.max_queue, keeper.pace.rate
        if waiting and waiting + tokens > limit:
            seconds = retry_after(keeper.unread + waiting + tokens - limit, rate)
            raise OverloadedError(
                f"the queue is full: {waiting} tokens wait, {tokens} more are over its limit of {limit}: "
                f"try again in {seconds} s",
                retry_after=seconds,
            )
        if len(self._streams) + requests > MAX_OPEN:
            seconds = retry_after(keeper.unread + waiting * requests / MAX_OPEN, rate)
            raise OverloadedError(
                f"{len(self._streams)} requests are open, of at most {MAX_OPEN}: try again in {seconds} s",
                retry_after=seconds,
            )

    def count_shed(self, error: FwdError) -> None:
        """Count a request that was answered by `error`, if that says to come again."""
        if error.code in self.shed:
            self.shed[error.code] += 1

    def open(self, submit: Submit) -> Stream:
        """Admit one request and run it, as `open_all` does."""
        (stream,) = self.open_all([submit])
        return stream

    def open_all(self, submits: Sequence[Submit]) -> list[Stream]:
        """Admit all of these requests or none, and run them. Ids are given here, and seeds where there are none.

        Raises `NotReadyError`, `OverloadedError`, `ContextLengthError` or `BadRequestError` before anything is queued.
        Choices of one prompt share the object in `prompt`, and its place in the queue.
        """
        info = self.info()
        taken = bounded(submits, info)
        self.check_queue(queue_tokens(taken), len(taken))
        if any(submit.grammar for submit in taken):
            self.supervisor.active.learn(self.prompts.vocabulary)
        return [self._run(submit, notes(asked, submit)) for asked, submit in zip(submits, taken, strict=True)]

    def _run(self, submit: Submit, said: Sequence[str]) -> Stream:
        seed = secrets.randbits(63) if submit.seed is None else submit.seed
        stream = Stream(replace(submit, id=next(self._ids), seed=seed), said)
        stream.on_end.append(self._ended)
        self._streams[stream.id] = stream
        self._limit(stream, submit.limits.deadline_ms)
        self.supervisor.submit(stream)
        return stream

    def get(self, number: int) -> Stream | None:
        """The open stream of that id."""
        return self._streams.get(number)

    def cancel(self, stream: Stream) -> None:
        """End an open stream; an ended one is left as it is."""
        self.supervisor.cancel(stream)

    async def finish(self, stream: Stream) -> None:
        """End a stream whose text is complete, by a stop string that the engine knows nothing of.

        Waits for the engine's account of it, which comes within a step, and at most `SETTLE` seconds.
        """
        self.supervisor.close(stream, Finished(id=stream.id, reason="stop"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE):
                await stream.wait_end()
        self.cancel(stream)

    async def drop_drafts(self) -> int:
        """Forget the answers that drafts come from; returns how many ids they were. Raises `NotReadyError`."""
        return await self.supervisor.active.drop_drafts()

    def requests(self) -> Requests:
        """The open requests, oldest first."""
        now = time.monotonic()
        return Requests(requests=[self._describe(stream, now) for stream in self._streams.values()])

    def status(self) -> Status:
        """The daemon in one look."""
        keeper = self.supervisor.active
        pong = keeper.pong
        state, reason = self._state()
        return Status(
            state=state,
            reason=reason,
            name=self.config.served_name,
            version=__version__,
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started,
            listening=tuple(self.listening),
            model=str(self.config.folder),
            engine=keeper.info,
            load_done=keeper.progress.done,
            load_total=keeper.progress.total,
            load_rate=keeper.progress.rate,
            running=pong.running,
            waiting=max(0, len(self._streams) - pong.running),
            pages_free=pong.pages_free,
            pages_total=pong.pages_total,
            restarts=sum(keeper.restarts.values()),
            requests=len(self._streams),
            tokens_out=self.tokens_out,
            pages_cached=pong.pages_cached,
            host_us=pong.host_us,
            queue_tokens=keeper.queue.tokens,
            queue_limit=self.config.max_queue,
            drafters=keeper.drafts.counts,
            corpus_tokens=pong.corpus_tokens,
        )

    def _limit(self, stream: Stream, deadline_ms: float) -> None:
        """End the stream at its deadline, whatever the engine does meanwhile."""
        if deadline_ms:
            error = DeadlineError(f"the deadline of {deadline_ms:.0f} ms passed before the answer was finished")
            timer = asyncio.get_running_loop().call_later(deadline_ms / 1e3, self.supervisor.cancel, stream, error)
            stream.on_end.append(lambda _: timer.cancel())

    def _state(self) -> tuple[str, str]:
        keeper = self.supervisor.active
        if self.draining:
            return "stopping", "the daemon is stopping"
        if keeper.state == "ready" and self._prompts is None:
            return "loading", "the tokenizer is loading"
        return keeper.state, keeper.reason

    def _describe(self, stream: Stream, now: float) -> RequestInfo:
        return RequestInfo(
            id=stream.id,
            state="prefill" if stream.prefilling else "running" if stream.begun else "waiting",
            prompt_tokens=len(stream.prompt),
            output_tokens=len(stream.emitted),
            age_s=now - stream.created,
            priority=stream.submit.priority,
            resumes=stream.resumes,
            prefilled=stream.prefilling.done if stream.prefilling else 0,
            commits=stream.commits,
        )

    def _ended(self, stream: Stream) -> None:
        del self._streams[stream.id]
        self.tokens_out += len(stream.emitted) - stream.given
        log.info(
            "request_done",
            id=stream.id,
            reason=stream.finished.reason if stream.finished else stream.error and stream.error.code,
            prompt_tokens=len(stream.prompt),
            output_tokens=len(stream.emitted),
            seconds=round((stream.ended or 0) - stream.created, 4),
            resumes=stream.resumes,
        )
        for observe in self.observers:
            observe(stream)
