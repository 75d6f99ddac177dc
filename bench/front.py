"""CPU time of the front per streamed token event, with the fake engine at full speed: `python bench/front.py`.

The front is a process of its own; its CPU time is read from /proc before and after some streams. A token event is a
`Tokens` frame of the engine, here of one token. Events that come faster than they are sent share a piece: a `Text`
frame of the socket, a `data:` line of HTTP; the cost of a piece is given beside it. Saves into bench/results.
"""

import argparse
import json
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fakes import Script
from launch import launch

from fwd.cli.bench import machine
from fwd.cli.bench.http import free_port
from fwd.cli.common import wait_ready
from fwd.errors import NotRunningError
from fwd.protocol.client import Client
from fwd.protocol.local import Text

TARGET_US = 25.0
PROMPT = "def "


class Front(NamedTuple):
    """A running daemon on the fake engine."""

    pid: int
    uds: Path
    port: int


@contextmanager
def front(model: str) -> Iterator[Front]:
    """Run `fwd serve` on the tokenizer of `model`; stop it at the end."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        uds = Path(folder) / "fwd.sock"
        flags = ("--uds", str(uds), "--http", f"127.0.0.1:{port}", "--name", "bench", "--log-level", "error")
        command = launch(Script(context=1 << 20), "serve", model, *flags)
        with subprocess.Popen(command) as child:
            with _connected(uds) as client:
                wait_ready(client)
            yield Front(child.pid, uds, port)
            child.terminate()


def _connected(uds: Path) -> Client:
    while True:
        try:
            return Client(uds)
        except NotRunningError:
            continue


def by_socket(target: Front, streams: int, tokens: int) -> int:
    """Read texts through fwd.sock; the number of pieces."""
    with Client(target.uds) as client:
        answers = [client.events(PROMPT, max_tokens=tokens, ignore_eos=True) for _ in range(streams)]
        return sum(isinstance(event, Text) for answer in answers for event in answer)


def by_http(target: Front, streams: int, tokens: int) -> int:
    """Read streamed chat completions; the number of pieces."""
    body = json.dumps(
        {
            "model": "bench",
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    received: dict[socket.socket, bytearray] = {}
    with selectors.DefaultSelector() as waiting:
        for _ in range(streams):
            sock = socket.create_connection(("127.0.0.1", target.port))
            sock.sendall(request)
            waiting.register(sock, selectors.EVENT_READ)
            received[sock] = bytearray()
        while waiting.get_map():
            for key, _ in waiting.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if data := sock.recv(1 << 20):
                    received[sock] += data
                else:
                    waiting.unregister(sock)
                    sock.close()
    return sum(data.count(b"data: {") for data in received.values())


def measure(target: Front, read: Callable[[Front, int, int], int], streams: int, tokens: int) -> dict[str, float]:
    """Microseconds of front CPU per token event and per piece, in one run of `streams` answers of `tokens` tokens."""
    before = machine.cpu_seconds(target.pid)
    pieces = read(target, streams, tokens)
    used = (machine.cpu_seconds(target.pid) - before) * 1e6
    return {"us_per_event": used / (streams * tokens), "us_per_piece": used / pieces, "pieces": pieces}


def main() -> None:
    """Measure, print, save."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="demo", help="the folder whose tokenizer is used")
    options.add_argument("--tokens", type=int, default=20_000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--save", default=str(Path(__file__).parent / "results"))
    chosen = options.parse_args()
    result = {"what": "front", **machine.facts(), "target_us": TARGET_US, "tokens": chosen.tokens, "runs": {}}
    print(f"to reach: {TARGET_US:.0f} µs of front CPU per token event")
    with front(chosen.model) as target:
        for name, read in (("socket", by_socket), ("http", by_http)):
            for streams in (1, 8):
                tokens = chosen.tokens // streams
                runs = [measure(target, read, streams, tokens) for _ in range(chosen.rounds + 1)][1:]
                found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                result["runs"][f"{name}-{streams}"] = {**found, "samples": runs}
                print(
                    f"{name}, {streams} at once: {found['us_per_event']:.1f} µs per event "
                    f"({found['us_per_event'] / TARGET_US:.0%}), {found['us_per_piece']:.1f} µs per piece "
                    f"of {streams * tokens / found['pieces']:.1f} tokens"
                )
    print(machine.save(result, Path(chosen.save)))


if __name__ == "__main__":
    main()
