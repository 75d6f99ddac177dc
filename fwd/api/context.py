"""What handlers find in the application and in the request."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
from aiohttp import web

from fwd.api.body import reading
from fwd.api.metrics import Metrics
from fwd.api.running import Running
from fwd.front.service import Service

T = TypeVar("T")
SERVICE = web.AppKey("service", Service)
METRICS = web.AppKey("metrics", Metrics)
RUNNING = web.AppKey("running", Running)
CREATED = web.AppKey("created", int)
REQUEST_ID = web.RequestKey("request_id", str)


@asynccontextmanager
async def entering(request: web.Request, decoder: msgspec.json.Decoder[T]) -> AsyncIterator[T]:
    """The body of a request for an answer; a full queue refuses it before it is read. Raises what `reading` does."""
    service = request.app[SERVICE]
    if not service.draining:
        service.check_queue()
    async with reading(request, decoder) as body:
        yield body


def serving(request: web.Request, model: str | None) -> Service:
    """The service, if it serves `model` (None is any) and is able to; raises what says why not."""
    service = request.app[SERVICE]
    if model is not None:
        service.check_model(model)
    service.info()
    return service
