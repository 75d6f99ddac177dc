"""Decode: tokens per second through the socket, through HTTP and by the peer, in turns."""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwd.cli.bench import ceiling, peer
from fwd.cli.bench.http import Stream, free_port
from fwd.cli.bench.machine import cpu_seconds
from fwd.cli.common import wait_ready
from fwd.cli.private import Private, private_daemon
from fwd.cli.request import Answer
from fwd.protocol.client import Client

PROMPT = "import os\n\n\nclass Reader:\n    def __init__(self, path):\n"


@dataclass(frozen=True)
class Plan:
    """What to measure: `rounds` answers of `tokens` tokens each way."""

    folder: Path
    dtype: ceiling.RunDtype
    rounds: int
    tokens: int
    peer: bool = True
    uds: str | None = None


def measure(plan: Plan, gb_per_s: float) -> dict[str, Any]:
    """Medians in tokens per second of one sequence; `engine` is the rate of its steps, `ratio` HTTP over the peer."""
    port = free_port()
    flags = ("--http", f"127.0.0.1:{port}", "--name", "bench", "--dtype", plan.dtype, "--log-level", "error")
    with private_daemon(str(plan.folder), *flags, uds=plan.uds) as daemon, daemon.connect() as client:
        status = wait_ready(client)
        assert status.engine
        other, absent = _peer(plan, status.engine.threads)
        rates = _rounds(plan, daemon, client, port, other)
    found: dict[str, Any] = {name: statistics.median(values) for name, values in rates.items()}
    size = ceiling.step_bytes(plan.folder, plan.dtype, plan.tokens // 2)
    found |= {"step_bytes": size, "ceiling": gb_per_s * 1e9 / size, "samples": rates, **absent}
    found |= {"threads": status.engine.threads, "kernel_set": status.engine.kernel_set}
    if other:
        found["ratio"] = statistics.median(
            http / theirs for http, theirs in zip(rates["http"], rates["transformers"], strict=True)
        )
    return found


def _peer(plan: Plan, threads: int) -> tuple[peer.Peer | None, dict[str, str]]:
    if not plan.peer:
        return None, {}
    try:
        return peer.Peer(plan.folder, plan.dtype, threads), {}
    except ImportError:
        return None, {"peer_absent": peer.ABSENT}


def _rounds(plan: Plan, daemon: Private, client: Client, port: int, other: peer.Peer | None) -> dict[str, list[float]]:
    """One warm-up, then everything in turns."""
    rates: dict[str, list[float]] = defaultdict(list)
    for turn in range(plan.rounds + 1):
        found = _round(plan, daemon, client, port, other)
        for name, value in found.items() if turn else ():
            rates[name].append(value)
    return dict(rates)


def _round(plan: Plan, daemon: Private, client: Client, port: int, other: peer.Peer | None) -> dict[str, float]:
    answer = Answer()
    options = {"temperature": 0.0, "max_tokens": plan.tokens, "ignore_eos": True, "cache": False}
    for _ in answer.read(client.events(PROMPT, **options)):
        pass
    before = cpu_seconds(daemon.child.pid)
    stream = Stream(port, PROMPT, plan.tokens)
    front = cpu_seconds(daemon.child.pid) - before
    found = {
        "socket": answer.tokens_per_s,
        "http": stream.tokens_per_s,
        "engine": stream.engine_tokens_per_s,
        "front_us_per_token": front / stream.tokens * 1e6,
    }
    return found | ({"transformers": other.tokens_per_s(PROMPT, plan.tokens)} if other else {})
