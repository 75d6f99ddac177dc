"""Start-up: from exec to an accepted connection, to `/ready`, to the first token."""

import socket
import statistics
import time
from typing import Any

from fwd.cli.bench.http import Stream, free_port, is_ready
from fwd.cli.private import Private, private_daemon

ACCEPT_TARGET = 0.15
SETTLE = 0.001


def measure(model: str, rounds: int, uds: str | None = None) -> dict[str, Any]:
    """Medians over fresh daemons, in seconds, and each sample."""
    samples = [_once(model, uds) for _ in range(rounds)]
    medians = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    return {**medians, "accept_target_s": ACCEPT_TARGET, "samples": samples}


def _once(model: str, uds: str | None) -> dict[str, float]:
    port = free_port()
    flags = ("--http", f"127.0.0.1:{port}", "--name", "bench", "--log-level", "error")
    with private_daemon(model, *flags, uds=uds) as daemon:
        found = {"accept_s": _until(daemon, lambda: _accepts(port), SETTLE)}
        found["ready_s"] = _until(daemon, lambda: is_ready(port), 10 * SETTLE)
        found["first_token_s"] = Stream(port, "def", 2).first - daemon.started
    return found


def _until(daemon: Private, holds: Any, pause: float) -> float:
    while not holds():
        daemon.require_life()
        time.sleep(pause)
    return time.perf_counter() - daemon.started


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
