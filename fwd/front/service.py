"""What HTTP and the local socket share: text in, streams out, and one look at the whole daemon."""

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import structlog
from msgspec.structs import replace

from fwd import __version__
from fwd.config import Config
from fwd.errors import (
    BadRequestError,
    ContextLengthError,
    DeadlineError,
    EngineError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
)
from fwd.front.prompts import Prompts
from fwd.front.streams import Stream
from fwd.front.supervisor import Supervisor
from fwd.protocol.ids import unpack_ids
from fwd.protocol.messages import EngineInfo, Finished, RequestInfo, Requests, Status, Submit

log = structlog.get_logger("fwd.request")


class Service:
    """The daemon without its sockets. `stop` is set by whoever runs it; `observers` hear of every ended stream."""

    def __init__(self, config: Config, supervisor: Supervisor) -> None:
        self.config = config
        self.supervisor = supervisor
        self.draining = False
        self._prompts: Prompts | None = None
        self.listening: list[str] = []
        self.stop: Callable[[], None] = lambda: None
        self.observers: list[Callable[[Stream], None]] = []
        self.tokens_out = 0
        self._ids = count(1)
        self._streams: dict[int, Stream] = {}
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

    def open(self, submit: Submit) -> Stream:
        """Admit a request and run it. The id is given here, and the seed when there is none.

        Raises `NotReadyError`, `OverloadedError`, `ContextLengthError` or `BadRequestError` before anything is queued.
        """
        info = self.info()
        submit = _bounded(submit, info)
        if len(self._streams) >= self.config.max_queue:
            raise OverloadedError(
                f"{len(self._streams)} requests are open, which is the limit: try again", retry_after=1
            )
        seed = secrets.randbits(63) if submit.seed is None else submit.seed
        stream = Stream(replace(submit, id=next(self._ids), seed=seed))
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

    def finish(self, stream: Stream) -> None:
        """End an open stream whose text is complete, by a stop string that the engine knows nothing of."""
        self.supervisor.cancel(stream, Finished(id=stream.id, reason="stop"))

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
            running=pong.running,
            waiting=max(0, len(self._streams) - pong.running),
            pages_free=pong.pages_free,
            pages_total=pong.pages_total,
            restarts=sum(keeper.restarts.values()),
            requests=len(self._streams),
            tokens_out=self.tokens_out,
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
            state="running" if self.supervisor.is_running(stream) else "waiting",
            prompt_tokens=len(stream.prompt),
            output_tokens=len(stream.emitted),
            age_s=now - stream.created,
            priority=stream.submit.priority,
            resumes=stream.resumes,
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


def over_context(info: EngineInfo, asked: str, param: str) -> ContextLengthError:
    """The context does not hold what was `asked`; agents match on these words."""
    return ContextLengthError(
        f"This model's maximum context length is {info.context} tokens. However, {asked}.", param=param
    )


def context_error(prompt: int, completion: int, info: EngineInfo) -> ContextLengthError:
    """`prompt` and `completion` tokens do not fit together."""
    asked = f"you requested {prompt + completion} tokens ({prompt} in the prompt, {completion} in the completion)"
    return over_context(info, asked, "prompt" if prompt >= info.context else "max_tokens")


def _bounded(submit: Submit, info: EngineInfo) -> Submit:
    for field in ("adapter", "grammar"):
        if getattr(submit, field):
            raise BadRequestError(f"{field}: this build has none, leave it out", param=field)
    tokens, given, limits = submit.prompt.nbytes // 4, submit.emitted.nbytes // 4, submit.limits
    needed = max(1 if limits.max_tokens < 0 else limits.max_tokens, given)
    if tokens + needed > info.context:
        raise context_error(tokens, needed, info)
    if not tokens:
        raise BadRequestError("the prompt is empty: give at least one token", param="prompt")
    _check_ids(unpack_ids(submit.prompt), info, "prompt")
    _check_ids(unpack_ids(submit.emitted), info, "emitted")
    _check_ids(list(submit.sampling.logit_bias), info, "logit_bias")
    most = info.context - tokens if limits.max_tokens < 0 else limits.max_tokens
    drawable = tuple(token for token in limits.stop_ids if token < info.vocab_size)
    return replace(submit, limits=replace(limits, max_tokens=most, stop_ids=drawable))


def _check_ids(ids: Sequence[int], info: EngineInfo, param: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < info.vocab_size):
        raise BadRequestError(f"an id in {param!r} is outside the vocabulary 0…{info.vocab_size - 1}", param=param)
