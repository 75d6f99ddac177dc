"""`/live`, `/ready`, `/health`: alive, able to serve, and the truth with its age."""

from typing import Any

from aiohttp import web
from msgspec.structs import asdict

from fwd.api.context import SERVICE
from fwd.api.replies import reply
from fwd.protocol.local import Status

RETRY_SECONDS = 1


async def get_live(_request: web.Request) -> web.Response:
    """The front process runs its loop."""
    return reply({"live": True})


async def get_ready(request: web.Request) -> web.Response:
    """Requests are served now; if not, why."""
    return _answer(_condition(request.app[SERVICE].status()))


async def get_health(request: web.Request) -> web.Response:
    """State, progress and queue in one look."""
    service = request.app[SERVICE]
    keeper, status = service.supervisor.active, service.status()
    body = {
        **_condition(status),
        "model": status.name,
        "version": status.version,
        "uptime_s": round(status.uptime_s, 3),
        "load": {
            "done_bytes": status.load_done,
            "total_bytes": status.load_total,
            "mb_per_s": round(status.load_rate / 1e6, 1),
        },
        "engine": {
            "steps": keeper.pong.steps,
            "progress_age_s": round(keeper.progress_age, 3),
            "tokens_per_second": round(keeper.pace.rate, 1),
            "pages_free": status.pages_free,
            "pages_cached": status.pages_cached,
            "pages_total": status.pages_total,
            "kernel_set": status.engine.kernel_set if status.engine else "",
            "launches": status.engine.launches if status.engine else "",
            "host_us": round(status.host_us, 1),
        },
        "queue": {
            "running": status.running,
            "waiting": status.waiting,
            "tokens": status.queue_tokens,
            "limit": status.queue_limit,
        },
        "prefilling": [asdict(prefill) for prefill in keeper.pong.prefilling],
        "restarts": keeper.restarts,
        "resumes": keeper.resumes,
    }
    return _answer(body)


def _condition(status: Status) -> dict[str, Any]:
    return {"ready": status.state == "ready", "state": status.state, "reason": status.reason}


def _answer(body: dict[str, Any]) -> web.Response:
    if body["ready"]:
        return reply(body)
    headers = {} if body["state"] == "failed" else {"Retry-After": str(RETRY_SECONDS)}
    return reply(body, status=503, headers=headers)
