"""The engine process: `python -m fwd.engine.main FD`, where FD is its end of the front's socketpair."""

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import time

from fwd import __version__
from fwd.engine.progress import Progress
from fwd.errors import BadFrameError, FwdError
from fwd.log import configure
from fwd.protocol.frames import Channel
from fwd.protocol.messages import VERSION, Failed, Hello, Load, Ready, ToEngine, to_engine

PR_SET_PDEATHSIG = 1
# NOTE: libgomp's spinning workers stall each parallel region by 7–15 ms when another process wants a core (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main() -> int:
    """Load what the front says and serve it until the link closes; the exit code."""
    _die_with_parent()
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), to_engine)
    try:
        channel.send(Hello(build=__version__))
        _serve(channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except FwdError as error:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            channel.send(Failed(code=error.code, message=error.message, param=error.param))
        return error.exit_code
    return 0


def _die_with_parent() -> None:
    """SIGKILL when the front dies (prctl(2)); if it is dead already the link is at its end."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(channel: Channel[ToEngine]) -> None:
    hello, load = channel.receive(), channel.receive()
    if not isinstance(hello, Hello) or hello.version != VERSION or not isinstance(load, Load):
        raise BadFrameError(f"the engine expects Hello of version {VERSION} and then Load")
    started = time.monotonic()
    configure(load.log_level)
    from fwd.engine.start import start  # noqa: PLC0415  # torch: seconds, and the link is up before

    loop, info = start(load, channel, Progress(channel.send), started)
    gc.freeze()
    channel.send(Ready(info=info))
    loop.run()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
