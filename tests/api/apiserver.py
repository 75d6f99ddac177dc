"""A whole front over HTTP on a fake engine, and a tokenizer whose tokens are the 256 bytes."""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import fakes
import msgspec
from aiohttp import web

from fwd.api import app
from fwd.config import Config
from fwd.front.keeper import Keeper
from fwd.front.prompts import Prompts
from fwd.front.service import Service
from fwd.front.streams import Stream
from fwd.front.supervisor import Supervisor
from fwd.protocol.messages import Load

FIRST = 16
VOCAB = FIRST + 256
EOS = 0
NAME = "fake"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if tools %}[{{ tools | length }} tools]{% endif %}"
    "{% if shout is defined and shout %}!{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def ids(text: str | bytes) -> list[int]:
    data = text.encode() if isinstance(text, str) else text
    return [FIRST + byte for byte in data]


def text(tokens) -> str:
    return bytes(token - FIRST for token in tokens if token >= FIRST).decode(errors="replace")


def script(says: str | bytes = "", **options) -> fakes.Script:
    """The engine says `says` again and again, or bytes drawn from 'a' … '~' by hash."""
    drawn = {"low": FIRST + ord("a"), "vocab": FIRST + 127} if not says else {"vocab": VOCAB}
    return fakes.Script(**{**drawn, "text": tuple(ids(says)), "eos": EOS, **options})


def write_folder(path: Path) -> None:
    alphabet = _alphabet()
    vocab = {f"<unused{i}>": i for i in range(FIRST)} | {alphabet[byte]: FIRST + byte for byte in range(256)}
    del vocab["<unused0>"]
    end = {"id": EOS, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, "normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": {"<|end|>": EOS, **vocab}, "merges": []},
    }
    (path / "tokenizer.json").write_text(json.dumps(document))
    config = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text("{}")


def _alphabet() -> dict[int, str]:
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


@dataclass
class Server:
    service: Service
    url: str
    session: aiohttp.ClientSession
    runner: web.AppRunner
    seen: list[Stream]

    @property
    def keeper(self) -> Keeper:
        return self.service.supervisor.active

    async def post(self, path: str, body: Any, **options) -> tuple[int, Any, Any]:
        """Status, decoded body, headers."""
        async with self.session.post(self.url + path, json=body, **options) as response:
            return response.status, await response.json(), response.headers

    async def get(self, path: str, **options) -> tuple[int, Any, Any]:
        async with self.session.get(self.url + path, **options) as response:
            return response.status, await response.json(), response.headers

    async def stream(self, path: str, body: Any, **options) -> list[Any]:
        """The events of a streamed answer; `[DONE]` is the string, comments are kept."""
        async with self.session.post(self.url + path, json={**body, "stream": True}, **options) as response:
            assert response.status == 200, await response.text()
            return events(await response.read())

    def unsent(self) -> list[int]:
        """Bytes that wait in the server for each client to read."""
        return [link.transport.get_write_buffer_size() for link in self.runner.server.connections if link.transport]

    async def idle(self) -> None:
        """Nothing is open, and the engine has confirmed the end of everything it was given."""
        await until(lambda: not list(self.service.streams) and not any(map(self.keeper.is_running, self.seen)))

    async def ready(self) -> None:
        await until(lambda: self.keeper.state == "ready")


def events(raw: bytes) -> list[Any]:
    found: list[Any] = []
    parts = raw.decode().split("\n\n")
    assert parts.pop() == ""
    for part in parts:
        if part.startswith(":"):
            found.append(part)
        else:
            assert part.startswith("data: ")
            data = part.removeprefix("data: ")
            found.append(data if data == "[DONE]" else msgspec.json.decode(data))
    return found


def recorded(service: Service) -> list[Stream]:
    """The streams that reach the supervisor from now on."""
    streams, submit = [], service.supervisor.submit

    def record(stream):
        streams.append(stream)
        submit(stream)

    service.supervisor.submit = record
    return streams


async def until(condition) -> None:
    """Wait for something that other tasks bring about; the runner's time limit ends a wait in vain."""
    while not condition():  # noqa: ASYNC110  # what is waited for has no event
        await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(
    folder: Path, engine: fakes.Script | tuple[str, ...], *, ready: bool = True, unix: str = "", **options
):
    """A `Server` on a fake engine, or on that of a command.

    `ping_interval`, `hang_timeout` are the keeper's, everything else is configuration.
    """
    config = Config(**{"model": str(folder), "name": NAME, **options})

    def make(load: Load) -> Keeper:
        return Keeper(
            load,
            command=engine if isinstance(engine, tuple) else fakes.command(engine),
            ping_interval=config.ping_interval,
            hang_timeout=config.hang_timeout,
        )

    service = Service(config, Supervisor(make, Load(model=str(folder))))
    service.prompts = Prompts.load(folder)
    seen = recorded(service)
    service.supervisor.start()
    runner = web.AppRunner(app.build(service), **app.RUNNER)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    if unix:
        await web.UnixSite(runner, unix).start()
    port = runner.addresses[0][1]
    try:
        async with aiohttp.ClientSession() as session:
            server = Server(service, f"http://127.0.0.1:{port}", session, runner, seen)
            if ready:
                await server.ready()
            yield server
    finally:
        await runner.cleanup()
        await service.supervisor.stop()
        service.close()
