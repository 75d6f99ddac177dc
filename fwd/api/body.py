"""Request bodies: JSON into typed structs whose bounds are part of the type."""

import asyncio
import re
from typing import TypeVar

import msgspec
from aiohttp import web

from fwd.errors import BadRequestError, RequestTimeoutError, UnsupportedMediaError

T = TypeVar("T")
READ_SECONDS = 30.0
_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")


async def read_body(request: web.Request, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as the decoder's type.

    Raises `UnsupportedMediaError` unless it is sent as JSON, `RequestTimeoutError` if it takes longer than
    `READ_SECONDS` to arrive, and `BadRequestError` whose `param` is the JSON path.
    """
    if request.content_type != "application/json":
        raise UnsupportedMediaError("the body must be JSON: send it with `Content-Type: application/json`")
    try:
        async with asyncio.timeout(READ_SECONDS):
            body = await request.read()
    except TimeoutError as error:
        raise RequestTimeoutError(f"the body did not arrive within {READ_SECONDS:g} s: send it again") from error
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except msgspec.DecodeError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}", param="body") from error
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not UTF-8: {error}", param="body") from error
    except RecursionError as error:
        raise BadRequestError("the body is nested too deeply", param="body") from error


def _invalid(text: str) -> BadRequestError:
    place = _PLACE.search(text)
    path = re.sub(r"\[(\d+)\]", r".\1", place[1].replace("[...]", "")) if place else "body"
    problem = text[: place.start()] if place else text
    return BadRequestError(f"{path}: {problem[:1].lower()}{problem[1:]}".replace("`", ""), param=path)
