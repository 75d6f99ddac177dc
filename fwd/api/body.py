"""Request bodies: JSON into typed structs whose bounds are part of the type."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import msgspec
from aiohttp import web

from fwd.errors import (
    BadRequestError,
    BodyTooLargeError,
    OverloadedError,
    RequestTimeoutError,
    UnsupportedMediaError,
)

T = TypeVar("T")
READ_SECONDS = 30.0
_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")


class Inbox:
    """Counts the bytes of bodies that are being read and made into ids: `most` at a time, whatever comes at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0

    @contextmanager
    def counted(self) -> Iterator[Callable[[int], None]]:
        """A function that counts bytes of one body; it raises `OverloadedError`. They count until the context ends."""
        mine = 0

        def take(size: int) -> None:
            nonlocal mine
            if self.bytes + size > self.most:
                raise OverloadedError(f"{self.bytes} bytes of other requests are being read: try again", retry_after=1)
            mine += size
            self.bytes += size

        try:
            yield take
        finally:
            self.bytes -= mine


INBOX = web.AppKey("inbox", Inbox)


@asynccontextmanager
async def reading(request: web.Request, decoder: msgspec.json.Decoder[T]) -> AsyncIterator[T]:
    """The body as the decoder's type, counted in the `Inbox` until what was needed of it has been made of it.

    Raises `UnsupportedMediaError` unless it is sent as JSON, `RequestTimeoutError` if it takes longer than
    `READ_SECONDS` to arrive, `BodyTooLargeError`, `OverloadedError`, and `BadRequestError` whose `param` is the path.
    """
    if request.content_type != "application/json":
        raise UnsupportedMediaError("the body must be JSON: send it with `Content-Type: application/json`")
    with request.app[INBOX].counted() as take:
        try:
            async with asyncio.timeout(READ_SECONDS):
                body = await _received(request, take)
        except TimeoutError as error:
            raise RequestTimeoutError(f"the body did not arrive within {READ_SECONDS:g} s: send it again") from error
        yield decoded(decoder, body)


def decoded(decoder: msgspec.json.Decoder[T], data: bytes, under: str = "") -> T:
    """JSON as the decoder's type; raises `BadRequestError` whose `param` is the path, which begins at `under`."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), under) from error
    except msgspec.DecodeError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}", param="body") from error
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not UTF-8: {error}", param="body") from error
    except RecursionError as error:
        raise BadRequestError("the body is nested too deeply", param="body") from error


async def _received(request: web.Request, take: Callable[[int], None]) -> bytes:
    """The whole body. `web.Request.read` would keep a copy of it as long as the answer lasts."""
    body, most = bytearray(), request.client_max_size
    async for chunk in request.content.iter_any():
        take(len(chunk))
        body += chunk
        if len(body) > most:
            raise BodyTooLargeError(f"the body is larger than {most} bytes, which is the limit")
    return bytes(body)


def _invalid(text: str, under: str) -> BadRequestError:
    place = _PLACE.search(text)
    inner = re.sub(r"\[(\d+)\]", r".\1", place[1].replace("[...]", "")).strip(".") if place else ""
    path = ".".join(filter(None, (under, inner))) or "body"
    problem = text[: place.start()] if place else text
    return BadRequestError(f"{path}: {problem[:1].lower()}{problem[1:]}".replace("`", ""), param=path)
