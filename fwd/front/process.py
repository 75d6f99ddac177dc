"""One engine process and its link."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

from fwd import __version__
from fwd.errors import BadFrameError
from fwd.protocol.connection import Connection
from fwd.protocol.messages import FromEngine, Hello, Load, Message, from_engine

COMMAND = (sys.executable, "-m", "fwd.engine.main")
GRACE = 2.0


class EngineProcess:
    """A child that owns the device. Spawned without a loop, so that it starts before the front imports anything heavy.

    The child inherits one end of a socketpair as the descriptor named by its last argument, and exits at end of file.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._sock, theirs = socket.socketpair()
        try:
            with theirs:
                self._child = subprocess.Popen(  # noqa: S603  # our own module, or a test's fake
                    [*command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
        except OSError:
            self._sock.close()
            raise
        self.pid = self._child.pid
        self._pidfd = self._watchable()
        self._cause = ""
        self._link: Connection[FromEngine] | None = None

    def attach(self, load: Load, on_message: Callable[[FromEngine], None]) -> asyncio.Future[str]:
        """Begin to talk; the future gives the cause of death once the process is reaped."""
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[str] = loop.create_future()
        loop.add_reader(self._pidfd, self._reap)
        self._link = Connection(self._sock, from_engine, on_message, self._closed)
        self.send(Hello(build=__version__))
        self.send(load)
        return self.exited

    def send(self, message: Message) -> None:
        """Send to the engine; a dead one is noticed by its exit, not here."""
        if self._link:
            self._link.send(message)

    def kill(self, cause: str) -> None:
        """SIGKILL, and hear nothing more of it; `cause` is what the future of `attach` will say."""
        self._cause = self._cause or cause
        self._child.kill()
        if self._link:
            self._link.close()

    async def stop(self) -> None:
        """Close the link and wait; after `GRACE` seconds kill."""
        self._cause = self._cause or "stopped"
        if self._link:
            self._link.close()
        try:
            await asyncio.wait_for(asyncio.shield(self.exited), GRACE)
        except TimeoutError:
            self.kill("stopped")
            await self.exited

    def _closed(self, error: Exception | None) -> None:
        if isinstance(error, BadFrameError):
            self.kill(f"protocol: {error}")
        elif self._child.returncode is None:
            asyncio.get_running_loop().call_later(GRACE, self.kill, "closed its link")

    def _watchable(self) -> int:
        """A descriptor that tells of the child's end; without one there is no child."""
        try:
            return os.pidfd_open(self.pid)
        except OSError:
            self._child.kill()
            self._child.wait()
            self._sock.close()
            raise

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        code = self._child.wait()
        died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        if self._link:
            self._link.drain_input()
            self._link.close()
        self.exited.set_result(self._cause or died)
