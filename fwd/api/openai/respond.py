"""An answer on the wire, whole or as a stream of chunks; a `Dialect` spells the choices."""

import asyncio
import contextlib
from typing import Any, Protocol

import msgspec
import structlog
from aiohttp import web

from fwd.api.context import REQUEST_ID
from fwd.api.openai.answer import Answer
from fwd.api.openai.report import fingerprint, report, usage
from fwd.api.replies import error_body
from fwd.api.sse import DONE, PING, EventStream
from fwd.errors import FwdError
from fwd.front.generation import Generation, Piece

log = structlog.get_logger("fwd.http")
encode = msgspec.json.encode


class Dialect(Protocol):
    """How one endpoint spells the choices of an answer. What is `bytes` here is the JSON of one choice in a chunk."""

    @property
    def name(self) -> str:
        """The `object` of a whole response."""

    @property
    def chunk_name(self) -> str:
        """The `object` of a chunk."""

    def whole(self, index: int, text: str) -> dict[str, Any]:
        """A finished choice; may take long, so it is called in a thread where there is much to tell."""

    def extra(self) -> dict[str, Any]:
        """Further fields of a whole response and of the first chunk of the first choice."""

    async def opening(self, index: int) -> bytes:
        """What comes before the first text; empty for nothing."""

    def piece(self, index: int, piece: Piece) -> bytes:
        """New text; empty for nothing to tell yet."""

    def closing(self, index: int) -> bytes:
        """The finish reason."""


async def respond(request: web.Request, answer: Answer, dialect: Dialect) -> web.StreamResponse:
    """Read the answer to its end and send it as the client asked; raises the `FwdError` that ended a whole answer."""
    if not answer.wanted.parameters.stream:
        return await _whole(answer, dialect)
    events = EventStream(request, answer.service.config.keep_alive, lambda: _waiting(answer))
    with contextlib.suppress(ConnectionResetError):
        async with events:
            await ChunkWriter(request, answer, dialect, events).run()
    return events.response


def _waiting(answer: Answer) -> str:
    """What the comments in a silent stream say: how far the first prompt is that is being read."""
    reads = (stream.prefilling for stream in answer.streams if stream.prefilling)
    return next((f"prefill {read.done}/{read.total}" for read in reads), PING)


async def _whole(answer: Answer, dialect: Dialect) -> web.Response:
    texts = await asyncio.gather(*(_text(answer, generation) for generation in answer.generations))
    wanted = answer.wanted
    much = wanted.logprobs >= 0 or wanted.prompt_logprobs >= 0 or wanted.parameters.return_token_ids
    body = await asyncio.to_thread(_body, answer, dialect, texts) if much else _body(answer, dialect, texts)
    return web.Response(body=body, content_type="application/json")


async def _text(answer: Answer, generation: Generation) -> str:
    text = "".join([piece.text async for piece in generation.pieces()])
    await answer.service.finish(generation.stream)
    return text


def _body(answer: Answer, dialect: Dialect, texts: list[str]) -> bytes:
    return encode(
        {
            **_head(answer, dialect.name),
            "choices": [dialect.whole(index, text) for index, text in enumerate(texts)],
            "usage": usage(answer),
            **dialect.extra(),
            "fwd": report(answer),
        }
    )


def _head(answer: Answer, name: str) -> dict[str, Any]:
    return {
        "id": answer.id,
        "object": name,
        "created": answer.created,
        "model": answer.service.config.served_name,
        "system_fingerprint": fingerprint(answer),
    }


class ChunkWriter:
    """Writes an answer as chunks. What all chunks share is encoded once; choices interleave as their tokens come."""

    def __init__(self, request: web.Request, answer: Answer, dialect: Dialect, events: EventStream) -> None:
        options = answer.wanted.parameters.options
        self._request = request
        self._answer = answer
        self._dialect = dialect
        self._events = events
        self._with_usage = bool(options.include_usage)
        self._continuous = self._with_usage and bool(options.continuous_usage_stats)
        self._usage = usage(answer) if self._continuous else None
        self._begin = b"data: " + encode(_head(answer, dialect.chunk_name))[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if self._with_usage else b"]}\n\n"
        self._open = len(answer.generations)

    async def run(self) -> None:
        """Write everything; an error ends the stream with an error event and without `[DONE]`."""
        failures: list[Exception] = []
        try:
            async with asyncio.TaskGroup() as group:
                for index, generation in enumerate(self._answer.generations):
                    group.create_task(self._choice(index, generation))
        except* Exception as errors:  # noqa: BLE001  # headers are out: the border can no longer answer
            failures.extend(errors.exceptions)
        if failures:
            await self._fail(failures[0])
        else:
            await self._finish()

    async def _choice(self, index: int, generation: Generation) -> None:
        send, wrap, spell = self._events.send, self._wrap, self._dialect.piece
        await generation.stream.wait(0)
        if generation.stream.error:
            raise generation.stream.error
        if opening := await self._dialect.opening(index):
            await send(wrap(opening, None if index else self._dialect.extra()))
        async for piece in generation.pieces():
            self._count(piece)
            if choice := spell(index, piece):
                await send(wrap(choice))
        await self._answer.service.finish(generation.stream)
        self._open -= 1
        self._usage = usage(self._answer) if self._continuous else None
        last = not (self._open or self._with_usage)
        await send(wrap(self._dialect.closing(index), {"fwd": report(self._answer)} if last else None))

    def _count(self, piece: Piece) -> None:
        """Keep the usage of every chunk, which would take long to sum up for each."""
        if self._usage:
            for name in ("completion_tokens", "total_tokens"):
                self._usage[name] += piece.end - piece.start

    def _wrap(self, choices: bytes, extra: dict[str, Any] | None = None) -> bytes:
        if not extra and not self._continuous:
            return self._begin + choices + self._end
        counts = {"usage": self._usage} if self._with_usage else {}
        return self._begin + choices + b"]," + encode({**counts, **(extra or {})})[1:] + b"\n\n"

    async def _finish(self) -> None:
        if self._with_usage:
            last = {"usage": usage(self._answer), "fwd": report(self._answer)}
            await self._events.send(self._begin + b"]," + encode(last)[1:] + b"\n\n")
        await self._events.send(DONE)

    async def _fail(self, failure: Exception) -> None:
        if isinstance(failure, ConnectionResetError):
            raise failure
        if not isinstance(failure, FwdError):
            log.error("http_failed", request_id=self._request[REQUEST_ID], exc_info=failure)
            failure = FwdError("internal error")
        await self._events.send(b"data: " + encode(error_body(failure)) + b"\n\n")
