"""Open answers by the id their client knows, so that one request can be cancelled by another."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fwd.front.streams import Stream


class Running:
    """Streams by response id. A client that sends the same `X-Request-Id` twice has two answers under one id."""

    def __init__(self) -> None:
        self._answers: defaultdict[str, list[Sequence[Stream]]] = defaultdict(list)
        self._empty = asyncio.Event()

    @contextmanager
    def entry(self, number: str, streams: Sequence[Stream]) -> Iterator[None]:
        """Keep `streams` findable while the answer is being made."""
        self._answers[number].append(streams)
        self._empty.clear()
        try:
            yield
        finally:
            self._answers[number].remove(streams)
            if not self._answers[number]:
                del self._answers[number]
            if not self._answers:
                self._empty.set()

    async def drained(self) -> None:
        """Return when every answer has reached its client."""
        if self._answers:
            await self._empty.wait()

    def find(self, number: str) -> list[Stream]:
        """The open streams of a response id; none if there is no such answer."""
        return [stream for streams in self._answers.get(number, ()) for stream in streams if not stream.done]
