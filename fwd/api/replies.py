"""JSON replies, and errors in OpenAI's shape."""

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from fwd.errors import FwdError


def reply(data: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A JSON response."""
    return web.Response(body=msgspec.json.encode(data), status=status, headers=headers, content_type="application/json")


def error_body(error: FwdError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_reply(error: FwdError) -> web.Response:
    """The error as a response, with what a client needs to retry well: when, or not at all."""
    return reply(error_body(error), status=error.status, headers=retry_headers(error))


def retry_headers(error: FwdError) -> dict[str, str]:
    """`Retry-After` for what heals by waiting; `x-should-retry: false` for what the OpenAI clients retry in vain."""
    if error.retry_after is not None:
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    return {"x-should-retry": "false"} if error.status >= 500 or error.status in {408, 413} else {}
