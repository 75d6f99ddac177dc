"""The one border of HTTP: request ids in and out, access, and every error in one shape."""

import re
import secrets

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from fwd.api.access import Access
from fwd.api.context import REQUEST_ID, SERVICE
from fwd.api.replies import error_reply
from fwd.errors import BadRequestError, FwdError, MethodNotAllowedError, NotFoundError

log = structlog.get_logger("fwd.http")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def border(access: Access) -> Middleware:
    """The middleware over all routes, unknown ones too."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID] = _request_id(request)
        try:
            access.check(request)
            return await handler(request)
        except FwdError as error:
            request.app[SERVICE].count_shed(error)
            return error_reply(error)
        except (web.HTTPException, web.RequestPayloadError) as error:
            response = error_reply(_translated(error, request))
            if isinstance(error, web.HTTPMethodNotAllowed):
                response.headers["Allow"] = error.headers["Allow"]
            return response
        except Exception:
            if request.transport is None:
                raise
            log.exception("http_failed", request_id=request[REQUEST_ID], method=request.method, path=request.path)
            return error_reply(FwdError("internal error"))

    return middleware


async def name_response(request: web.Request, response: web.StreamResponse) -> None:
    """Signal before headers are sent: every response names its request, and no versions."""
    response.headers["X-Request-Id"] = request[REQUEST_ID]
    response.headers["Server"] = "fwd"


def _request_id(request: web.Request) -> str:
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


def _translated(error: web.HTTPException | web.RequestPayloadError, request: web.Request) -> FwdError:
    match error:
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return MethodNotAllowedError(f"{request.method} is not possible on {request.path}: use {allowed}")
        case web.HTTPNotFound():
            return NotFoundError(f"there is no {request.method} {request.path} here")
    return BadRequestError(f"the request cannot be read: {error}", param="body")
