"""The daemon's entry: bind the sockets and spawn the engine, then import everything else.

Connections queue in the kernel meanwhile, so they are accepted before aiohttp is even imported.
"""

from fwd.config import Config
from fwd.daemon.sockets import listen
from fwd.front.process import EngineProcess


def serve(config: Config) -> int:
    """Run until told to stop; the exit code. Raises `FwdError` when it cannot start."""
    listeners = listen(config)
    try:
        process = EngineProcess()
        from fwd.daemon.run import run  # noqa: PLC0415  # after the sockets: this is what takes the time

        return run(config, listeners, process)
    finally:
        listeners.remove_files()
