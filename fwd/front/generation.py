"""The text of one stream: a cursor into its journal, decoded, and cut at stop strings."""

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from fwd.front.streams import Stream
from fwd.protocol.values import Reason
from fwd.text.detokenize import Detokenizer
from fwd.text.stops import StopMatcher
from fwd.text.tokenizer import Tokenizer

BATCH = 512


class Piece(NamedTuple):
    """New text, and the half-open range of output tokens that was read for it."""

    text: str
    start: int
    end: int


class Generation:
    """Reads a stream to its end as pieces of text.

    `finish_reason` is known at the end: stop, length or cancelled. `tokens` counts the output tokens that belong to the
    answer: those after a matched stop string do not, so the count does not depend on when the engine heard of it. A
    token of `stop_ids` is counted and not shown. Whoever reads ends a stream that a stop string ended early with
    `Service.finish`. With `continues` the text goes on in the prompt's own text (see `Detokenizer`).
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        continues: bool = False,
    ) -> None:
        self.stream = stream
        self.tokens = stream.given
        self.finish_reason: Reason | None = None
        self.stop: str | None = None
        self._detokenizer = Detokenizer(tokenizer, continues=continues)
        self._stops = StopMatcher(list(stops), include=include_stop)
        self._stopping = bool(stops)
        self._hidden = frozenset() if include_stop else frozenset(stream.submit.limits.stop_ids)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield text as it comes; raises the `FwdError` that ended the stream, if one did."""
        while self.finish_reason is None:
            await self.stream.wait(self.tokens)
            start = self.tokens
            text = self._read()
            if text or self.tokens > start:
                yield Piece(text, start, self.tokens)

    def _read(self) -> str:
        stream = self.stream
        if self.tokens < len(stream.emitted):
            text = self._take(stream.emitted[self.tokens : self.tokens + BATCH].tolist())
            if self.finish_reason or self.tokens < len(stream.emitted) or not stream.finished:
                return text
            return text + self._finish()
        if stream.done:
            return self._finish()
        return ""

    def _take(self, ids: list[int]) -> str:
        last = self.tokens + len(ids)
        if ids[-1] in self._hidden:
            ids.pop()
        text = self._detokenizer.push(ids) if not self._stopping else self._until_stop(ids)
        if self.stop is None:
            self.tokens = last
        return text

    def _until_stop(self, ids: list[int]) -> str:
        text = ""
        for token in ids:
            self.tokens += 1
            text += self._stops.push(self._detokenizer.push([token]))
            if self._stops.matched is not None:
                self.finish_reason, self.stop = "stop", self._stops.matched
                break
        return text

    def _finish(self) -> str:
        if self.stream.error:
            raise self.stream.error
        assert self.stream.finished
        text = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        self.finish_reason = self.stream.finished.reason
        if self._stops.matched is not None:
            self.finish_reason, self.stop = "stop", self._stops.matched
        return text
