"""What the verbs share: the daemon's socket, waiting for the model, JSON."""

import sys
import time
from typing import Any

import click
import msgspec

from fwd.config import load
from fwd.errors import EngineError, NotReadyError
from fwd.protocol.client import Client
from fwd.protocol.local import Status

POLL = 0.05


def client(uds: str | None) -> Client:
    """A connection to the daemon where `--uds`, environment or configuration say; `NotRunningError` if none."""
    return Client(load({"uds": uds}).socket_path)


def wait_ready(daemon: Client) -> Status:
    """Wait until the model is loaded, showing progress on a terminal.

    Raises `NotReadyError` from a daemon that stops, `EngineError` if the engine cannot be started.
    """
    line = Line()
    try:
        while (status := daemon.status()).state != "ready":
            require_hope(status)
            line.show(progress(status))
            time.sleep(POLL)
    finally:
        line.show("")
    return status


def require_hope(status: Status) -> None:
    """Raise if a daemon in this state will not become ready."""
    if status.state == "failed":
        raise EngineError(f"the engine cannot be started: {status.reason}")
    if status.state == "stopping":
        raise NotReadyError("the daemon is stopping: start it again with `fwd serve`")


def require_ready(daemon: Client) -> Status:
    """The status of a ready daemon; raises `NotReadyError` with the reason at once if it is not."""
    status = daemon.status()
    require_hope(status)
    if status.state != "ready":
        raise NotReadyError(f"not ready: {status.reason}")
    return status


def progress(status: Status) -> str:
    """One line on how far the load is."""
    if not status.load_total:
        return f"{status.reason} …"
    share = status.load_done / status.load_total
    size, rate = f"{status.load_total / 1e9:.2f} GB", f"{status.load_rate / 1e9:.2f} GB/s"
    return f"{status.reason} {'█' * round(20 * share):░<20} {share:4.0%} of {size}, {rate}"


class Line:
    """A line on the terminal that is drawn over and over; where stderr is no terminal there is none."""

    def __init__(self) -> None:
        self._shown = ""

    def show(self, text: str) -> None:
        """Replace the line; an empty text removes it."""
        if sys.stderr.isatty() and text != self._shown:
            click.echo(f"\r\x1b[K{text}", err=True, nl=False)
            self._shown = text


def emit(value: Any) -> None:
    """Print a value or a message as one JSON document."""
    click.echo(msgspec.json.encode(plain(value)))


def plain(value: Any) -> Any:
    """Messages as objects by field name: on the wire they are arrays."""
    if isinstance(value, msgspec.Struct):
        return plain(msgspec.structs.asdict(value))
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value
