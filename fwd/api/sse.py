"""Server-sent events on one response: headers at admission, comments while there is nothing to say."""

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

from aiohttp import web

DONE = b"data: [DONE]\n\n"
PING = "ping"
_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream:
    """Writes events; after `keep_alive` seconds of silence a `comment`, which clients skip and proxies count."""

    def __init__(self, request: web.Request, keep_alive: float, comment: Callable[[], str] = lambda: PING) -> None:
        self.response = web.StreamResponse(headers=_HEADERS)
        self._request = request
        self._keep_alive = keep_alive
        self._comment = comment
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()

    async def __aenter__(self) -> Self:
        await self.response.prepare(self._request)
        self._pinger = self._loop.create_task(self._ping())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pinger.cancel()

    async def send(self, data: bytes) -> None:
        """Send whole events; waits while the client does not read."""
        self._last = self._loop.time()
        await self.response.write(data)

    async def _ping(self) -> None:
        with contextlib.suppress(ConnectionResetError):  # the handler is cancelled for the same reason
            while True:
                silent = self._loop.time() - self._last
                if silent >= self._keep_alive:
                    await self.send(f": {self._comment()}\n\n".encode())
                else:
                    await asyncio.sleep(self._keep_alive - silent)
