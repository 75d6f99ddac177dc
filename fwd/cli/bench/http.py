"""A streaming HTTP client that costs little: one request, timed."""

import json
import socket
import time
from http.client import HTTPConnection
from typing import Any

from fwd.errors import EngineError


def free_port() -> int:
    """A TCP port of the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_ready(port: int) -> bool:
    """`/ready` says 200."""
    link = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        link.request("GET", "/ready")
        return link.getresponse().status == 200
    finally:
        link.close()


class Stream:
    """One streamed completion.

    `first` and `last` token are `time.perf_counter` times; `tokens` and `engine_tokens_per_s` are the daemon's count.
    """

    def __init__(self, port: int, prompt: str, tokens: int) -> None:
        self.first = self.last = self.engine_tokens_per_s = 0.0
        self.tokens = 0
        link = HTTPConnection("127.0.0.1", port, timeout=600)
        try:
            link.request("POST", "/v1/completions", _body(prompt, tokens), {"Content-Type": "application/json"})
            answer = link.getresponse()
            if answer.status != 200:
                raise EngineError(f"HTTP {answer.status}: {answer.read().decode()}")
            while line := answer.readline():
                if line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]))
        finally:
            link.close()

    @property
    def tokens_per_s(self) -> float:
        """The rate after the first token; 0 if all the text came in one piece."""
        return (self.tokens - 1) / (self.last - self.first) if self.last > self.first else 0.0

    def _take(self, event: dict[str, Any]) -> None:
        if event["choices"] and event["choices"][0]["text"]:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]
            self.engine_tokens_per_s = (self.tokens - 1) / event["fwd"]["timings"]["decode_ms"] * 1e3


def _body(prompt: str, tokens: int) -> bytes:
    body = {
        "model": "bench",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,  # every round is cold, and nothing is prefilled while the peer is measured
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()
