"""The journal: what each open request has been given so far, read through cursors.

A token is journaled before any reader sees it, and the journal is the buffer: a slow reader costs nothing, re-attaching
is moving a cursor, and after an engine death it is what the next engine replays.
"""

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence

import msgspec

from fwd.errors import FwdError
from fwd.protocol.ids import pack_ids, unpack_ids
from fwd.protocol.messages import Finished, PromptLogprobs, Submit, Tokens
from fwd.protocol.values import Prefilling, TopLogprobs


class JournalError(Exception):
    """The engine broke the order of a stream: a token was lost or doubled."""


class Stream:
    """One choice of one request: its prompt, its journal and how it ended. All times are `time.monotonic` seconds.

    `notes` say what was taken as less than was asked. `commits` counts the pieces in which tokens came: with drafts a
    step brings several. `stalls` counts engine deaths since the last new token, `resumes` all deaths survived. `begun`
    says that the engine of the moment works on it, `prefilling` how far its prompt is read while that is what happens
    and known.
    """

    def __init__(self, submit: Submit, notes: Sequence[str] = ()) -> None:
        assert submit.seed is not None, "the front draws the seed before a stream is opened"
        self.submit = submit
        self.notes = notes
        self.id = submit.id
        self.seed = submit.seed
        self.prompt: Sequence[int] = unpack_ids(submit.prompt)
        self.emitted = array("i", unpack_ids(submit.emitted))
        self.given = len(self.emitted)
        self.logprobs = array("d")
        self.top: list[TopLogprobs] = []
        self.prompt_logprobs = array("d")
        self.prompt_top: list[TopLogprobs] = []
        self.finished: Finished | None = None
        self.error: FwdError | None = None
        self.created = time.monotonic()
        self.first_token: float | None = None
        self.ended: float | None = None
        self.commits = 0
        self.stalls = 0
        self.resumes = 0
        self.begun = False
        self.prefilling: Prefilling | None = None
        self.on_end: list[Callable[[Stream], None]] = []
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def done(self) -> bool:
        """Nothing more will come."""
        return self.ended is not None

    def resubmit(self) -> Submit:
        """The request as a new engine needs it: with the border between prompt and the tokens already given."""
        return msgspec.structs.replace(self.submit, emitted=pack_ids(self.emitted))

    def append(self, tokens: Tokens) -> None:
        """Journal new tokens; raises `JournalError` on a gap or a double."""
        if self.done:
            return
        if tokens.start != len(self.emitted):
            raise JournalError(f"request {self.id}: token {tokens.start} came where {len(self.emitted)} was due")
        if self.submit.sampling.logprobs >= 0 and len(tokens.logprobs) != len(tokens.ids):
            raise JournalError(f"request {self.id}: {len(tokens.ids)} tokens, {len(tokens.logprobs)} log-probabilities")
        if self.first_token is None:
            self.first_token = time.monotonic()
        self.emitted.extend(tokens.ids)
        self.commits += 1
        self.logprobs.extend(tokens.logprobs)
        self.top.extend(tokens.top)
        self.stalls = 0
        self.prefilling = None
        self._wake()

    def interrupt(self) -> None:
        """The engine died, and the stream has to wait for the next one."""
        self.stalls += 1
        self.resumes += 1
        self.begun, self.prefilling = False, None

    def append_prompt(self, scores: PromptLogprobs) -> None:
        """Journal scores of prompt tokens; those that a resumed engine computes again are dropped."""
        known = len(self.prompt_logprobs) + 1 - scores.start
        if known < 0:
            raise JournalError(f"request {self.id}: prompt score {scores.start} left a gap")
        self.prompt_logprobs.extend(scores.logprobs[known:])
        self.prompt_top.extend(scores.top[known:])

    def end(self, result: Finished | FwdError) -> None:
        """Close the journal; the first end counts."""
        if self.done:
            return
        if isinstance(result, FwdError):
            self.error = result
        else:
            self.finished = result
        self.ended = time.monotonic()
        self._wake()
        for call in self.on_end:
            call(self)

    async def wait(self, cursor: int) -> None:
        """Return when there are tokens after `cursor`, or the stream is done."""
        while len(self.emitted) <= cursor and not self.done:
            await self._change()

    async def wait_end(self) -> None:
        """Return when the stream is done."""
        while not self.done:
            await self._change()

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
