"""What handlers find in the application and in the request."""

from aiohttp import web

from fwd.api.metrics import Metrics
from fwd.api.running import Running
from fwd.front.service import Service

SERVICE = web.AppKey("service", Service)
METRICS = web.AppKey("metrics", Metrics)
RUNNING = web.AppKey("running", Running)
CREATED = web.AppKey("created", int)
REQUEST_ID = web.RequestKey("request_id", str)


def serving(request: web.Request, model: str | None) -> Service:
    """The service, if it serves `model` (None is any) and is able to; raises what says why not."""
    service = request.app[SERVICE]
    if model is not None:
        service.check_model(model)
    service.info()
    return service
