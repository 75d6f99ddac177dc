"""`DELETE /v1/requests/{id}`."""

from aiohttp import web

from fwd.api.context import RUNNING, SERVICE
from fwd.api.replies import reply
from fwd.errors import NotFoundError


async def delete_request(request: web.Request) -> web.Response:
    """Cancel the answer with this response id; its own client gets what was made so far."""
    number = request.match_info["id"]
    streams = request.app[RUNNING].find(number)
    if not streams:
        raise NotFoundError(f"no request {number!r} is open", param="id")
    for stream in streams:
        request.app[SERVICE].cancel(stream)
    return reply({"id": number, "object": "request", "cancelled": True})
