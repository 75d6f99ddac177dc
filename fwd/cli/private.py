"""A daemon of our own on a temporary socket, for `fwd demo`, `fwd eval` and `fwd bench`; it ends when we do."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fwd.cli.common import POLL, wait_ready
from fwd.errors import ConfigError, EngineError, NotRunningError
from fwd.protocol.client import Client
from fwd.protocol.local import Status

# prctl(PR_SET_PDEATHSIG, SIGTERM): it stops in order when the one who started it is killed
START = "import ctypes; ctypes.CDLL(None).prctl(1, 15); from fwd.cli import main; main()"
COMMAND = (sys.executable, "-c", START)
STOP_SECONDS = 15


class Private:
    """The process, its socket `uds`, and the time it was started (`time.perf_counter`)."""

    def __init__(self, folder: Path, flags: tuple[str, ...], uds: str | None) -> None:
        self.uds = Path(uds) if uds else folder / "fwd.sock"
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.started = time.perf_counter()
            self.child = subprocess.Popen(  # noqa: S603  # our own module
                [*COMMAND, "serve", *flags, "--uds", str(self.uds)],
                env={key: value for key, value in os.environ.items() if not key.startswith("FWD_")},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    def connect(self) -> Client:
        """A client, as soon as there is a socket; raises what ended the daemon if it ended."""
        while True:
            try:
                return Client(self.uds)
            except NotRunningError:
                self.require_life()
                time.sleep(POLL)

    def ready(self) -> Status:
        """Wait until the model is loaded; raises what ended the daemon if it ended, or why it cannot be loaded."""
        try:
            with self.connect() as daemon:
                return wait_ready(daemon)
        except (EngineError, BrokenPipeError):
            self.child.wait()
            self.require_life()
            raise

    def require_life(self) -> None:
        """Raise the daemon's last words if it is dead."""
        code = self.child.poll()
        if code is not None:
            lines = self._log.read_text(errors="replace").splitlines()
            words = lines[-1].removeprefix("fwd: ") if lines else f"exit {code}"
            raise (ConfigError if code == ConfigError.exit_code else EngineError)(words)

    def stop(self) -> None:
        """End it in order, or by force when that takes too long."""
        self.child.terminate()
        try:
            self.child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


@contextlib.contextmanager
def private_daemon(*flags: str, uds: str | None = None) -> Iterator[Private]:
    """Run `fwd serve` with these flags and no setting of the caller's environment; stop it at the end."""
    with tempfile.TemporaryDirectory(prefix="fwd-") as folder:
        daemon = Private(Path(folder), flags, uds)
        try:
            yield daemon
        finally:
            daemon.stop()
