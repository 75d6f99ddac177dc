"""What aiohttp itself has to say, in our log."""

from typing import Any

import structlog
from aiohttp.http_exceptions import HttpProcessingError

log = structlog.get_logger("fwd.http")


class ServerLog:
    """The part of a logger that aiohttp's server calls. What a client garbled is one event without a trace."""

    def debug(self, event: str, *args: Any, **_: Any) -> None:
        """Log a trifle."""
        log.debug("http_server", message=event % args)

    def exception(self, event: str, *args: Any, exc_info: BaseException | None = None) -> None:
        """Log an error that was caught in the server."""
        if isinstance(exc_info, HttpProcessingError):
            log.info("http_garbled", message=event % args, error=exc_info.message)
        else:
            log.error("http_server_failed", message=event % args, exc_info=exc_info)
