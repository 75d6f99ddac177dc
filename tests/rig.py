"""The front on a fake engine: a keeper alone, or a whole daemon without HTTP on a thread of its own."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from fakes import Script, answer, command

from fwd.config import Config
from fwd.front.keeper import Keeper
from fwd.front.local import LocalServer
from fwd.front.prompts import Prompts
from fwd.front.service import Service
from fwd.front.streams import Stream
from fwd.front.supervisor import Supervisor
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Load, Pong, Submit
from fwd.protocol.values import Limits

T = TypeVar("T")
MODEL = Load(model="fake")


class Watched(Keeper):
    """A keeper that does not back off and can be waited for; `states` are those it went through, with their reasons."""

    def __init__(self, script: Script, load: Load = MODEL, **settings: Any) -> None:
        self.states: list[tuple[str, str]] = []
        self._changed = asyncio.Event()
        settings = {"ping_interval": 0.02, "hang_timeout": 30.0, "load_timeout": 30.0, **settings}
        super().__init__(load, command=command(script), on_change=self._note, **settings)

    def _note(self) -> None:
        self.states.append((self.state, self.reason))
        self._changed.set()

    def _backoff(self) -> float:
        return 0.0

    def _on_pong(self, pong: Pong) -> None:
        super()._on_pong(pong)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds; it is looked at whenever the state changes or the engine answers a ping."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def reach(self, state: str) -> None:
        """Return when the keeper is in `state`."""
        await self.until(lambda: self.state == state)

    def died(self) -> int:
        """How many engines died."""
        return sum(self.restarts.values())


@contextlib.asynccontextmanager
async def keeping(script: Script, **settings: Any) -> AsyncIterator[Watched]:
    """A keeper that runs, and is stopped at the end."""
    keeper = Watched(script, **settings)
    task = asyncio.create_task(keeper.run())
    try:
        yield keeper
    finally:
        await keeper.stop()
        await task


def stream(number: int, prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 50, **fields: Any) -> Stream:
    """A stream that no service admitted; its seed is its number."""
    fields = {"limits": Limits(max_tokens=max_tokens), "seed": number, **fields}
    return Stream(Submit(id=number, prompt=pack_ids(prompt), **fields))


def assert_answered(script: Script, *streams: Stream) -> None:
    """Each stream holds what the oracle says: nothing lost, doubled or changed."""
    for one in streams:
        ids, reason = answer(script, one.submit)
        assert one.error is None
        assert one.emitted.tolist() == ids
        assert one.finished is not None
        assert one.finished.reason == reason


class Letters:
    """A tokenizer whose tokens are the bytes of the text; 0 ends an answer."""

    eos_ids = (0,)
    no_text = frozenset({0})
    vocab_size = 256
    strips_space = False
    table = text_table = MappingProxyType({token: bytes([token]) for token in range(256)})

    async def encode_async(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def start(self, text: str, tokens: int) -> str:
        return text[:tokens]


class Transcript:
    """A chat template: `role: content` by lines."""

    def encode(self, _: Letters, messages: list[dict[str, str]], **__: Any) -> list[int]:
        return list("".join(f"{message['role']}: {message['content']}\n" for message in messages).encode())


LETTERS = Script(vocab=127, low=32, context=4096)


class Daemon:
    """A service and its local socket on a fake engine, run by `serving`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, uds: Path, script: Script, config: Config) -> None:
        self.uds = uds
        self.script = script
        self.stopped = asyncio.Event()
        self._loop = loop
        self.keeper = Watched(script)
        self.service = Service(config, Supervisor(lambda _: self.keeper, MODEL))
        self.service.prompts = Prompts(Letters(), Transcript())  # type: ignore[arg-type]  # as far as they are used
        self.service.stop = self.stopped.set
        self._ended = asyncio.Event()
        self.service.observers.append(lambda _: self._ended.set())

    async def run(self, ready: threading.Event) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.uds))
            listener.listen()
            self.service.supervisor.start()
            local = LocalServer(self.service, listener)
            await self.keeper.reach("ready")
            ready.set()
            await self.stopped.wait()
            for one in list(self.service.streams):
                self.service.cancel(one)
            local.close()
            await self.service.supervisor.stop()
            self.service.close()

    def call(self, work: Callable[[], T]) -> T:
        """The result of `work`, called on the daemon's thread."""

        async def called() -> T:
            return work()

        return self.wait(called())

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine run by the daemon."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def idle(self) -> None:
        """Return when no request is open."""
        while self.service.requests().requests:
            self._ended.clear()
            await self._ended.wait()


@contextlib.contextmanager
def serving(uds: Path, script: Script = LETTERS, config: Config | None = None) -> Iterator[Daemon]:
    """A daemon that serves while the context is open; an error nobody heard on its loop fails the test."""
    loop, ready, unheard = asyncio.new_event_loop(), threading.Event(), list[Any]()
    loop.set_exception_handler(lambda _, context: unheard.append(context))

    async def build() -> Daemon:
        return Daemon(loop, uds, script, config or Config(model="fake"))

    daemon = loop.run_until_complete(build())
    thread = threading.Thread(target=loop.run_until_complete, args=[daemon.run(ready)])
    thread.start()
    try:
        assert ready.wait(60)
        yield daemon
    finally:
        loop.call_soon_threadsafe(daemon.stopped.set)
        thread.join(60)
        loop.close()
    assert not unheard
