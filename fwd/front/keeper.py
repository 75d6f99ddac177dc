"""Keeps one engine alive for one model: start, heartbeat, death, restart."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import structlog

from fwd.errors import ConfigError, EngineError, FwdError, ModelError, NotReadyError, from_wire
from fwd.front.drafts import Drafts
from fwd.front.process import COMMAND, EngineProcess
from fwd.front.queue import Pace, Queue
from fwd.front.roster import Roster
from fwd.front.streams import JournalError, Stream
from fwd.protocol.messages import (
    VERSION,
    Dropped,
    Failed,
    Finished,
    FromEngine,
    Hello,
    Load,
    Loading,
    Ping,
    Pong,
    PromptLogprobs,
    Ready,
    Tokens,
    Vocabulary,
)
from fwd.protocol.values import EngineInfo

log = structlog.get_logger("fwd.engine")

State = Literal["starting", "loading", "ready", "restarting", "failed", "stopping"]
FIRST_STARTS = 3
MAX_BACKOFF = 10.0


class Keeper:
    """One model's engine. Streams given to it finish whatever happens to the process, or fail with their own error.

    `restarts` counts deaths by kind, `pace` is how fast the engine computes, `drafts` what speculation has done.
    `on_change` is called on every change of `state`. `ping_interval`, `hang_timeout` and `load_timeout` are seconds; a
    hang is counted in unanswered pings, so a suspended machine is no hang.
    """

    def __init__(
        self,
        load: Load,
        *,
        command: Sequence[str] = COMMAND,
        ping_interval: float = 1.0,
        hang_timeout: float = 30.0,
        load_timeout: float = 120.0,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.load = load
        self.state: State = "starting"
        self.reason = "the engine is starting"
        self.info: EngineInfo | None = None
        self.progress = Loading(done=0, total=0)
        self.pong = Pong(seq=0)
        self.restarts: dict[str, int] = {}
        self.error: FwdError | None = None
        self.process: EngineProcess | None = None
        self.pace = Pace()
        self.drafts = Drafts()
        self._command = command
        self._ping_interval = ping_interval
        self._patience = {"ready": hang_timeout, "loading": load_timeout}
        self._on_change = on_change
        self._roster = Roster()
        self._accepting = False
        self._attempts = 0
        self._refusals = 0
        self._beats = 0
        self._silent = 0.0
        self._stopping = asyncio.Event()

    def adopt(self, process: EngineProcess) -> None:
        """Use a process that was started before there was a loop to talk to it."""
        self.process = process

    async def run(self) -> None:
        """Keep an engine alive until `stop`, or until it cannot be started at all."""
        while not self._over:
            await self._live()
            if not self._over:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), self._backoff())

    async def stop(self) -> None:
        """Stop the process; open streams stay open, their owner ends them."""
        self._stopping.set()
        self._set("stopping", "the daemon is stopping")
        if self.process:
            await self.process.stop()

    def learn(self, vocabulary: Vocabulary) -> None:
        """Take what engines are told before the first stream with a grammar."""
        self._roster.vocabulary = vocabulary

    def submit(self, stream: Stream) -> None:
        """Run a stream; while the engine is away it waits."""
        self._roster.add(stream)

    def cancel(self, stream: Stream, result: Finished | FwdError | None = None) -> None:
        """End a stream for its reader now, by default as cancelled; the engine is told and stops within a step."""
        self._roster.cancel(stream, result or Finished(id=stream.id, reason="cancelled"))

    def close(self, stream: Stream, result: Finished) -> None:
        """End a stream whose answer is complete as soon as the engine has given its account of it."""
        self._roster.close(stream, result)

    async def drop_drafts(self) -> int:
        """Have the engine forget the answers that drafts come from; how many ids they were.

        Raises `NotReadyError`, and `ConfigError` if those on disk cannot be erased.
        """
        if not (self.process and self._accepting):
            raise NotReadyError(f"not ready: {self.reason}", retry_after=1)
        return await self.drafts.ask(self.process.send)

    async def drained(self) -> None:
        """Return when no stream is open."""
        await self._roster.drained()

    @property
    def resumes(self) -> int:
        """How many times a stream was taken from a dead engine to go on with the next."""
        return self._roster.resumes

    @property
    def queue(self) -> Queue:
        """The open streams that the engine has not begun."""
        return self._roster.queue

    @property
    def unread(self) -> int:
        """Tokens of prompts that the engine has begun and still has to read."""
        return self._roster.unread

    @property
    def progress_age(self) -> float:
        """Seconds since the engine made progress or had nothing to do, in steps of the ping interval."""
        return self._silent

    def is_running(self, stream: Stream) -> bool:
        """The engine has the stream now."""
        return self._roster.is_running(stream)

    @property
    def _over(self) -> bool:
        return self._stopping.is_set() or self.state == "failed"

    async def _live(self) -> None:
        """One engine process, from its start to its death."""
        self.error = None
        try:
            process = self.process or EngineProcess(self._command)
        except OSError as error:
            self._end_life(f"no process: {error}")
            return
        self.process = process
        self._begin_life()
        cause = await self._watch(process, process.attach(self.load, self._on_message))
        self.process = None
        self._end_life(cause)

    def _begin_life(self) -> None:
        self._silent = 0.0
        self.progress = Loading(done=0, total=0)
        if self.info is None:
            self._set("loading", "the model is loading")

    async def _watch(self, process: EngineProcess, exited: asyncio.Future[str]) -> str:
        while not exited.done():
            await asyncio.wait([exited], timeout=self._ping_interval)
            if exited.done() or self._stopping.is_set():
                continue
            self._silent += self._ping_interval
            phase = "ready" if self._accepting else "loading"
            if self._silent > self._patience[phase]:
                process.kill("hung" if self._accepting else "load timeout")
            elif self._accepting:
                self._beats += 1
                process.send(Ping(seq=self._beats))
        return exited.result()

    def _on_message(self, message: FromEngine) -> None:
        assert self.process
        try:
            self._handle(message)
        except JournalError as error:
            self.process.kill(f"protocol: {error}")

    def _handle(self, message: FromEngine) -> None:  # noqa: C901  # one case a message
        match message:
            case Tokens():
                self._progressed(self._roster.append(message))
            case Finished():
                self._progressed(self._roster.finish(message.id, message))
            case Failed() if message.id:
                error = from_wire(message.code, message.message, message.param)
                self._progressed(self._roster.finish(message.id, error))
            case PromptLogprobs():
                self._roster.append_prompt(message)
            case Pong():
                self._on_pong(message)
            case Loading():
                self._silent = 0.0
                self.progress = message
            case Dropped():
                self.pong = msgspec.structs.replace(self.pong, corpus_tokens=0)
                self.drafts.dropped(message.tokens, message.error)
            case Ready():
                self._on_ready(message.info)
            case Hello(version=version):
                if version != VERSION:
                    raise JournalError(f"the engine speaks version {version}, the front {VERSION}")
            case Failed():
                self.error = from_wire(message.code, message.message, message.param)

    def _progressed(self, progress: bool) -> None:
        if progress:
            self._attempts = 0

    def _on_pong(self, pong: Pong) -> None:
        busy = bool(pong.running + pong.waiting)
        if pong.steps != self.pong.steps or not busy:
            self._silent = 0.0
        self.pong = pong
        self.drafts.observe(pong.drafters)
        self.pace.observe(time.monotonic(), pong.computed, busy=busy)
        self._roster.show_prefills(pong.prefilling)

    def _on_ready(self, info: EngineInfo) -> None:
        if self.info and info.weights_hash != self.info.weights_hash:
            self._roster.refuse_resume()
        self.info = info
        # What was chosen by what the first start found stays so: a stream must fit the next engine too, and another
        # device has other bits.
        sizes = {"context": info.context, "kv_bytes": info.kv_bytes}
        self.load = msgspec.structs.replace(self.load, device=_device(info), **sizes)
        self._refusals = 0
        self.pong = Pong(seq=0, pages_free=info.pages, pages_total=info.pages)
        self.pace.restart()
        self._accepting = True
        self._silent = 0.0
        self._set("ready", "")
        assert self.process
        self._roster.connect(self.process.send)

    def _end_life(self, cause: str) -> None:
        self._accepting = False
        self.drafts.end_life()
        if self._stopping.is_set():
            return
        kind = cause.partition(":")[0]
        self.restarts[kind] = self.restarts.get(kind, 0) + 1
        log.warning("engine_died", cause=cause, open_streams=len(self._roster), error=self.error and self.error.message)
        self._attempts += 1
        self._roster.disconnect()
        self._refusals += isinstance(self.error, ModelError | ConfigError)
        if self._hopeless():
            self._give_up(self.error or EngineError(f"the engine did not start: {cause}"))
            return
        reason = self.error.message if self.error else f"the engine died ({cause}) and is starting again"
        self._set("restarting", reason)

    def _hopeless(self) -> bool:
        """A first start that says why it failed, or fails again and again; later, a model refused as often."""
        if self.info is None:
            return self.error is not None or self._attempts >= FIRST_STARTS
        return self._refusals >= FIRST_STARTS

    def _give_up(self, error: FwdError) -> None:
        self.error = error
        self._set("failed", error.message)
        self._roster.fail_all(error)

    def _backoff(self) -> float:
        return min(MAX_BACKOFF, 0.05 * 2.0 ** min(self._attempts - 1, 16)) if self._attempts > 1 else 0.0

    def _set(self, state: State, reason: str) -> None:
        if (state, reason) != (self.state, self.reason):
            self.state, self.reason = state, reason
            log.info("engine_state", state=state, reason=reason)
            self._on_change()


def _device(info: EngineInfo) -> str:
    """What `auto` has come to."""
    return info.device if info.device in {"cpu", "host"} else "cuda"
