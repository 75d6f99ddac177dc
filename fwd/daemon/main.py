"""The daemon's entry: bind the sockets and spawn the engine, then import everything else.

Connections queue in the kernel meanwhile, so they are accepted before aiohttp is even imported.
"""

import signal
import sys

from fwd.config import Config
from fwd.daemon.sockets import listen
from fwd.errors import ModelError


def serve(config: Config) -> int:
    """Run until told to stop; the exit code. Raises `FwdError` when it cannot start."""
    if not config.folder.is_dir():
        raise ModelError(f"{config.folder} is no folder: give a Hugging Face model folder, or `demo`")
    early = Early()
    signal.signal(signal.SIGTERM, early)  # until the loop has its own; before there is a socket file to remove
    listeners = listen(config)
    try:
        from fwd.front.process import EngineProcess  # noqa: PLC0415  # asyncio, after the sockets

        process = EngineProcess()
        from fwd.daemon.run import run  # noqa: PLC0415  # aiohttp, beside the engine's own start

        return run(config, listeners, process, early)
    finally:
        listeners.remove_files()


class Early:
    """Leaves at a signal. What it raises is lost where Python was in a callback, which imports have: `heard` tells."""

    heard = False

    def __call__(self, *_: object) -> None:
        """Handle the signal."""
        self.heard = True
        sys.exit(0)
