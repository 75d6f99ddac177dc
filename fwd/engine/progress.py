"""How far a load is: to the front a few times a second, to the log every few seconds."""

import time
from collections.abc import Callable

import structlog

from fwd.protocol.messages import Loading

log = structlog.get_logger("fwd.engine")

SEND_SECONDS = 0.1
LOG_SECONDS = 5.0


class Progress:
    """Called with bytes read and to read; the first call and the last are told whatever the time."""

    def __init__(self, send: Callable[[Loading], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._send, self._clock = send, clock
        self._began = self._sent = self._logged = -1.0
        self._before = self._done = 0

    def __call__(self, done: int, total: int) -> None:
        """Raises what `send` raises."""
        now, last = self._clock(), done == total and done > self._done
        if first := self._began < 0:
            self._began, self._before = now, done
        self._done = done
        rate = (done - self._before) / (now - self._began) if now > self._began else 0.0
        if first or last or now - self._sent >= SEND_SECONDS:
            self._sent = now
            self._send(Loading(done=done, total=total, rate=rate))
        if first or last or now - self._logged >= LOG_SECONDS:
            self._logged = now
            log.info("model_loading", done_bytes=done, total_bytes=total, mb_per_s=round(rate / 1e6, 1))
