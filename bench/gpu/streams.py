"""Answers to prompts of ids that run beside each other, read through the socket or through HTTP, and their rate."""

import json
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fwd.errors import EngineError
from fwd.protocol.client import Client
from fwd.protocol.messages import Finished, Tokens
from fwd.protocol.values import Timing

MODEL = "bench"
READ = 1 << 16


@dataclass
class Row:
    """One answer: when its pieces came (`time.perf_counter`) and how much each brought."""

    marks: list[tuple[float, int]] = field(default_factory=list)
    tokens: int = 0
    timing: Timing = field(default_factory=Timing)

    def mark(self, amount: int) -> None:
        """Something came just now."""
        if amount:
            self.marks.append((time.perf_counter(), amount))

    def between(self, begin: float, end: float) -> float:
        """Tokens that came after `begin`, up to `end`; a piece counts as its share of the answer."""
        everything = sum(amount for _, amount in self.marks)
        return self.tokens * sum(amount for at, amount in self.marks if begin < at <= end) / everything


@dataclass(frozen=True)
class Run:
    """Answers that ran beside each other since `began`."""

    began: float
    rows: list[Row]

    @property
    def tokens_per_s(self) -> float:
        """The rate of all rows together while every one of them decoded."""
        begin, end = max(row.marks[0][0] for row in self.rows), min(row.marks[-1][0] for row in self.rows)
        if end <= begin:
            raise EngineError("the answers did not overlap: ask for more tokens")
        return sum(row.between(begin, end) for row in self.rows) / (end - begin)

    @property
    def engine_tokens_per_s(self) -> float:
        """The same by the engine's own clock, each row from its first token on."""
        return sum((row.tokens - 1) / row.timing.decode_ms * 1e3 for row in self.rows if row.timing.decode_ms)

    @property
    def first_token_s(self) -> float:
        """Until the first row had its first token."""
        return min(row.marks[0][0] for row in self.rows) - self.began


def by_socket(client: Client, prompts: Sequence[Sequence[int]], tokens: int) -> Run:
    """One request a prompt, read in turns."""
    began = time.perf_counter()
    streams = {
        index: (client.submit(prompt, max_tokens=tokens, temperature=0.0), Row())
        for index, prompt in enumerate(prompts)
    }
    rows = [row for _, row in streams.values()]
    while streams:
        for index, (events, row) in list(streams.items()):
            match next(events):
                case Tokens(ids=ids):
                    row.mark(len(ids))
                    row.tokens += len(ids)
                case Finished(timing=timing):
                    row.timing = timing
                    del streams[index]
    return Run(began, rows)


def by_http(port: int, prompts: Sequence[Sequence[int]], tokens: int) -> Run:
    """One streamed completion a prompt, each on a connection of its own; a piece is a `data:` line with text."""
    requests = [_request(prompt, tokens) for prompt in prompts]
    began = time.perf_counter()
    rows = [Row() for _ in prompts]
    with selectors.DefaultSelector() as waiting:
        for request, row in zip(requests, rows, strict=True):
            sock = socket.create_connection(("127.0.0.1", port))
            waiting.register(sock, selectors.EVENT_READ, (row, bytearray()))
            sock.sendall(request)
        while waiting.get_map():
            for key, _ in waiting.select():
                _read(waiting, key)
    return Run(began, rows)


def _read(waiting: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    sock, (row, received) = key.fileobj, key.data
    assert isinstance(sock, socket.socket)
    if data := sock.recv(READ):
        received += data
        row.mark(data.count(b'"finish_reason":null'))
    else:
        waiting.unregister(sock)
        sock.close()
        _end(row, bytes(received))


def _end(row: Row, received: bytes) -> None:
    """Take what the last event says; raise what was answered instead."""
    lines = [line for line in received.split(b"\n") if line.startswith(b"data: {")]
    last = json.loads(lines[-1][6:]) if lines else {}
    if "usage" not in last:
        raise EngineError(f"HTTP answered {received[:500].decode(errors='replace')}")
    row.tokens = last["usage"]["completion_tokens"]
    timings = last["fwd"]["timings"]
    row.timing = Timing(prefill_ms=timings["prefill_ms"], decode_ms=timings["decode_ms"])


def _request(prompt: Sequence[int], tokens: int) -> bytes:
    body = {
        "model": MODEL,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Connection: close\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text
