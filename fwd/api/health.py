"""`/live`, `/ready`, `/health`: alive, able to serve, and the truth with its age."""

from typing import Any

from aiohttp import web

from fwd.api.context import SERVICE
from fwd.api.replies import reply
from fwd.errors import NotReadyError
from fwd.front.service import Service

RETRY_SECONDS = 1


async def get_live(_request: web.Request) -> web.Response:
    """The front process runs its loop."""
    return reply({"live": True})


async def get_ready(request: web.Request) -> web.Response:
    """Requests are served now; if not, why."""
    state, reason = condition(request.app[SERVICE])
    return _answer({"ready": state == "ready", "state": state, "reason": reason})


async def get_health(request: web.Request) -> web.Response:
    """State, progress and queue in one look."""
    service = request.app[SERVICE]
    keeper, status = service.supervisor.active, service.status()
    state, reason = condition(service)
    body = {
        "ready": state == "ready",
        "state": state,
        "reason": reason,
        "model": status.name,
        "version": status.version,
        "uptime_s": round(status.uptime_s, 3),
        "load": {"done_bytes": status.load_done, "total_bytes": status.load_total},
        "engine": {
            "steps": keeper.pong.steps,
            "progress_age_s": round(keeper.progress_age, 3),
            "pages_free": status.pages_free,
            "pages_total": status.pages_total,
        },
        "queue": {"running": status.running, "waiting": status.waiting, "limit": service.config.max_queue},
        "restarts": keeper.restarts,
        "resumes": keeper.resumes,
    }
    return _answer(body)


def condition(service: Service) -> tuple[str, str]:
    """State and reason of the whole daemon: that of the engine, unless the front itself is not ready or stopping."""
    keeper = service.supervisor.active
    if keeper.state != "ready":
        return keeper.state, keeper.reason
    try:
        service.info()
        _ = service.prompts
    except NotReadyError as error:
        return "stopping" if service.draining else "loading", error.message
    return "ready", ""


def _answer(body: dict[str, Any]) -> web.Response:
    if body["ready"]:
        return reply(body)
    headers = {} if body["state"] == "failed" else {"Retry-After": str(RETRY_SECONDS)}
    return reply(body, status=503, headers=headers)
