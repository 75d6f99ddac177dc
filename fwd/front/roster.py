"""The open streams of one engine: which of them it has now, and who is to blame when it dies."""

import asyncio
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from fwd.errors import EngineError, FwdError, OverloadedError, PoisonedError
from fwd.front.queue import Queue
from fwd.front.streams import Stream
from fwd.protocol.messages import Cancel, Finished, Message, PromptLogprobs, Tokens, Vocabulary
from fwd.protocol.values import Prefilling

SUSPECT_AFTER = 2
RETRY_SECONDS = 1.0


class Roster:
    """Gives streams to the engine of the moment through `connect`, and takes them back with `disconnect`.

    A stream is suspect after `SUSPECT_AFTER` deaths without a new token in between. While there are suspects exactly
    one of them runs, until it brings a token; one whose engine died before, and was given nothing else in its life, is
    failed as `poisoned`. An ended stream counts as running until the engine has let go of it, so that its last step
    cannot be blamed on another. `resumes` counts the streams taken back; `queue` holds those that have not begun. Each
    engine is told the `vocabulary` before its first stream with a grammar.
    """

    def __init__(self) -> None:
        self.resumes = 0
        self.queue = Queue()
        self.vocabulary: Vocabulary | None = None
        self._introduced = False
        self._send: Callable[[Message], None] | None = None
        self._open: dict[int, Stream] = {}
        self._running: dict[int, Stream] = {}
        self._closing: dict[int, Finished] = {}
        self._given = 0
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def is_running(self, stream: Stream) -> bool:
        """The engine has the stream now."""
        return stream.id in self._running

    async def drained(self) -> None:
        """Return when no stream is open."""
        if self._open:
            await self._empty.wait()

    def connect(self, send: Callable[[Message], None]) -> None:
        """Let streams run: `send` reaches an engine that is ready and has none of them."""
        self._send = send
        self._given = 0
        self._introduced = False
        self._release()

    def disconnect(self) -> None:
        """The engine is dead: take back what it had, and fail the one that is certainly to blame."""
        self._send = None
        for number, result in list(self._closing.items()):
            self._end(self._open[number], result)
        running = [stream for stream in self._running.values() if not stream.done]
        self._running.clear()
        self.resumes += len(running)
        for stream in running:
            self._take_back(stream)
        self.queue.refill(self._open.values())

    def _take_back(self, stream: Stream) -> None:
        guilty = stream.stalls >= SUSPECT_AFTER and self._given == 1
        stream.interrupt()
        if guilty:
            text = f"request {stream.id} killed the engine {stream.stalls} times without a token"
            self._end(stream, PoisonedError(text))

    def add(self, stream: Stream) -> None:
        """Run a stream, now or when there is an engine for it."""
        self._open[stream.id] = stream
        self._empty.clear()
        self.queue.enter(stream)
        self._release()

    def cancel(self, stream: Stream, result: Finished | FwdError) -> None:
        """End a stream for its reader now; the engine is told and stops within a step."""
        self._end(stream, result)
        if self._send and stream.id in self._running:
            self._send(Cancel(id=stream.id))
        self._release()

    def close(self, stream: Stream, result: Finished) -> None:
        """End an open stream whose answer is complete, with the engine's account of it if there is an engine."""
        self._closing[stream.id] = result
        if self._send and stream.id in self._running:
            self._send(Cancel(id=stream.id))
        else:
            self._end(stream, result)
            self._release()

    def append(self, tokens: Tokens) -> bool:
        """Journal new tokens; whether they belong to a stream the engine has. Raises `JournalError`."""
        stream = self._running.get(tokens.id)
        if stream is None:
            return False
        suspect = stream.stalls >= SUSPECT_AFTER
        self._begin(stream)
        stream.append(tokens)
        if suspect:
            self._acquit(stream)
        return True

    def append_prompt(self, scores: PromptLogprobs) -> None:
        """Journal scores of prompt tokens. Raises `JournalError`."""
        if stream := self._running.get(scores.id):
            self._begin(stream)
            stream.append_prompt(scores)

    def show_prefills(self, prefilling: Sequence[Prefilling]) -> None:
        """Take note of how far prompts are read; `prefilling` is all of them."""
        for stream in self._running.values():
            stream.prefilling = None
        for prefill in prefilling:
            if prefill.id in self._running:
                self._begin(self._running[prefill.id])
                self._running[prefill.id].prefilling = prefill

    @property
    def unread(self) -> int:
        """Tokens of prompts that the engine holds and has still to read, each prompt once."""
        reads = {id(s.submit.prompt): s.prefilling for s in self._running.values() if s.prefilling}
        return sum(read.total - read.done for read in reads.values())

    def finish(self, number: int, result: Finished | FwdError) -> bool:
        """The engine let go of a stream: it ended, or waits while suspects are tried. Whether the engine had it."""
        stream = self._running.pop(number, None)
        if stream is None:
            return False
        closing = self._closing.get(number)
        if closing and isinstance(result, Finished):
            self._closing[number] = replace(closing, timing=result.timing)
        waits = isinstance(result, Finished) and result.reason == "cancelled" and not (stream.done or closing)
        if waits:
            stream.begun = False
            self.queue.enter(stream)
        else:
            self._end(stream, result)
        self._release()
        return True

    def fail_all(self, error: FwdError) -> None:
        """End every stream: there will be no engine."""
        for stream in list(self._open.values()):
            self._end(stream, error)

    def refuse_resume(self) -> None:
        """End the streams that have tokens or scores of other weights than those now loaded."""
        for stream in [each for each in self._open.values() if each.emitted or each.prompt_logprobs]:
            error = EngineError("the weights on disk changed while the answer was running: send the request again")
            self._end(stream, error)

    def _release(self) -> None:
        """Give the engine what it may run: one suspect alone, or else everything."""
        if self._send is None:
            return
        if suspects := self._suspects():
            if not self._running:
                self._give(suspects[0], self._send)
            return
        for stream in [stream for stream in self._open.values() if stream.id not in self._running]:
            self._give(stream, self._send)

    def _acquit(self, stream: Stream) -> None:
        """A suspect brought a token: it waits while the other suspects are tried, or else everything runs again."""
        if self._send and self._suspects():
            self._send(Cancel(id=stream.id))
        else:
            self._release()

    def _suspects(self) -> list[Stream]:
        return [stream for stream in self._open.values() if stream.stalls >= SUSPECT_AFTER]

    def _give(self, stream: Stream, send: Callable[[Message], None]) -> None:
        try:
            if stream.submit.grammar:
                self._introduce(send)
            send(stream.resubmit())
        except OSError as error:
            self._postpone(stream, error)
            return
        self._given += 1
        self._running[stream.id] = stream

    def _introduce(self, send: Callable[[Message], None]) -> None:
        if not self._introduced:
            assert self.vocabulary, "a grammar comes after the vocabulary"
            send(self.vocabulary)
            self._introduced = True

    def _postpone(self, stream: Stream, error: OSError) -> None:
        """There was no descriptor for a long prompt: a new request is refused, one that ran already is tried again."""
        if stream.resumes:
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._release)
        else:
            self._end(stream, OverloadedError(f"the prompt cannot be handed over: {error.strerror}", retry_after=1))

    def _begin(self, stream: Stream) -> None:
        if not stream.begun:
            stream.begun = True
            self.queue.leave(stream)

    def _end(self, stream: Stream, result: Finished | FwdError) -> None:
        """End a stream; one whose answer was complete ended so, whatever came after."""
        result = self._closing.pop(stream.id, result)
        self._open.pop(stream.id, None)
        self.queue.leave(stream)
        if not self._open:
            self._empty.set()
        stream.end(result)
