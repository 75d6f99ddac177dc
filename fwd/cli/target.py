"""The daemon that is measured or tested: the one that runs, or one of our own."""

import contextlib
from collections.abc import Iterator

from fwd.cli.common import client, wait_ready
from fwd.cli.private import private_daemon
from fwd.errors import NotRunningError
from fwd.protocol.client import Client
from fwd.protocol.local import Status


@contextlib.contextmanager
def target(model: str | None, uds: str | None) -> Iterator[tuple[Client, Status]]:
    """A connection to a ready daemon, and its status.

    With a model it is a private daemon that ends with the context; without, the one that runs, and where none does, a
    private one on the embedded model.
    """
    with contextlib.ExitStack() as stack:
        daemon = _running(uds) if model is None else None
        if daemon is None:
            flags = ("--http", "none", "--log-level", "warning")
            private = stack.enter_context(private_daemon(model or "demo", *flags, uds=uds))
            private.ready()
            daemon = private.connect()
        stack.enter_context(daemon)
        yield daemon, wait_ready(daemon)


def _running(uds: str | None) -> Client | None:
    try:
        return client(uds)
    except NotRunningError:
        return None
