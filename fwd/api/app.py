"""The routes, and what the runner of the application must be given."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from fwd.api import health, models, requests
from fwd.api.access import Access
from fwd.api.body import INBOX, Inbox
from fwd.api.context import CREATED, METRICS, RUNNING, SERVICE
from fwd.api.exposition import CONTENT_TYPE
from fwd.api.metrics import Metrics
from fwd.api.middleware import border, name_response
from fwd.api.openai import chat, completions
from fwd.api.running import Running
from fwd.api.server_log import ServerLog
from fwd.front.service import Service

BODIES = 4  # of the greatest size: how much of requests may be on its way at a time
RUNNER: dict[str, Any] = {
    "logger": ServerLog(),
    "handler_cancellation": True,
    "access_log": None,
    "keepalive_timeout": 75.0,
    "shutdown_timeout": 1.0,  # answers are drained before: what is left are requests half sent
    "max_line_size": 8190,
    "max_field_size": 8190,
}


def build(service: Service) -> web.Application:
    """The application over one service; raises `ConfigError` for a keys file that cannot be read."""
    app = web.Application(middlewares=[border(Access.of(service.config))], client_max_size=service.config.max_body)
    app[SERVICE] = service
    app[METRICS] = Metrics(service)
    app[RUNNING] = Running()
    app[INBOX] = Inbox(BODIES * service.config.max_body)
    app[CREATED] = int(time.time())
    app.on_response_prepare.append(name_response)
    app.cleanup_ctx.append(_watched)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat.post),
            web.post("/v1/completions", completions.post),
            web.get("/v1/models", models.get_models),
            web.get("/v1/models/{model:.+}", models.get_model),
            web.post("/tokenize", models.post_tokenize),
            web.post("/detokenize", models.post_detokenize),
            web.get("/live", health.get_live),
            web.get("/ready", health.get_ready),
            web.get("/health", health.get_health),
            web.get("/metrics", _get_metrics),
            web.delete("/v1/requests/{id}", requests.delete_request),
        ]
    )
    return app


async def _get_metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[METRICS].text().encode(), headers={"Content-Type": CONTENT_TYPE})


async def _watched(app: web.Application) -> AsyncIterator[None]:
    watch = asyncio.get_running_loop().create_task(app[METRICS].watch_loop())
    yield
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch
