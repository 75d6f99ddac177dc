"""The public clients of `fwd.sock`: `Client` blocks, `AsyncClient` runs on asyncio. Both need no torch.

with fwd.Client() as client:
    for text in client.generate("def fibonacci(n):", max_tokens=64):
        print(text, end="")
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from fwd import __version__
from fwd.config import default_socket
from fwd.errors import BadFrameError, EngineError, NotRunningError, from_wire
from fwd.protocol.connection import Connection
from fwd.protocol.frames import Channel
from fwd.protocol.inboxes import Inboxes
from fwd.protocol.local import (
    Accepted,
    Done,
    FromDaemon,
    Requests,
    RequestsQuery,
    Status,
    StatusQuery,
    Stop,
    Text,
    from_daemon,
)
from fwd.protocol.messages import Cancel, DropDrafts, Dropped, Failed, Finished, Hello, Message, PromptLogprobs, Tokens
from fwd.protocol.requests import prompt_message, submit_message
from fwd.protocol.values import RequestInfo

Event = Accepted | Tokens | PromptLogprobs | Text | Finished
GONE = "the daemon closed the connection: see its log, or start it with `fwd serve`"
T = TypeVar("T")


def connect(uds: str | Path | None = None) -> socket.socket:
    """A socket connected to the daemon; raises `NotRunningError` that says how to start one."""
    path = str(uds or default_socket())
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        reason = error.strerror or error
        raise NotRunningError(f"no daemon listens on {path} ({reason}): start one with `fwd serve`") from error
    return sock


def _event(message: FromDaemon) -> Event:
    """A frame of a request as an event; raises the error it carries."""
    if isinstance(message, Failed):
        raise from_wire(message.code, message.message, message.param)
    assert isinstance(message, Event)
    return message


def _answer(message: FromDaemon, kind: type[T]) -> T:
    """The answer to an admin message; raises the error it carries."""
    if isinstance(message, Failed):
        raise from_wire(message.code, message.message, message.param)
    if not isinstance(message, kind):
        raise BadFrameError(f"the daemon answered {type(message).__name__} where {kind.__name__} was due")
    return message


class Client:
    """A blocking connection. Several requests may be read in turns; closing an iterator cancels its request."""

    def __init__(self, uds: str | Path | None = None) -> None:
        self._channel = Channel(connect(uds), from_daemon)
        self._inboxes = Inboxes()
        self._open = True
        try:
            self._ask(Hello(build=__version__), Hello)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; its open requests end with it."""
        self._open = False
        self._channel.close()

    def generate(self, prompt: str | Sequence[dict[str, Any]], **options: Any) -> Iterator[str]:
        """Stream the answer to a text, or to a chat given as messages, in pieces of text."""
        for event in self.events(prompt, **options):
            if isinstance(event, Text):
                yield event.text

    def events(self, prompt: str | Sequence[dict[str, Any]], **options: Any) -> Iterator[Event]:
        """The same with every event: `Accepted`, `Text`…, `Finished`."""
        tag = self._inboxes.open()
        return self._stream(tag, prompt_message(tag, prompt, options))

    def submit(self, prompt: Sequence[int], **options: Any) -> Iterator[Event]:
        """Stream raw ids: `Accepted`, `PromptLogprobs`…, `Tokens`…, `Finished`. Options are those of `Submit`."""
        tag = self._inboxes.open()
        return self._stream(tag, submit_message(tag, prompt, options))

    def cancel(self, number: int) -> None:
        """End the request with that id."""
        self._ask(Cancel(id=number), Done)

    def status(self) -> Status:
        """The daemon in one look."""
        return self._ask(StatusQuery(), Status)

    def requests(self) -> list[RequestInfo]:
        """The open requests, oldest first."""
        return self._ask(RequestsQuery(), Requests).requests

    def drop_drafts(self) -> int:
        """Forget the answers that drafts come from, in memory and on disk; how many tokens they were."""
        return self._ask(DropDrafts(), Dropped).tokens

    def stop(self) -> None:
        """Ask the daemon to stop, and wait until it is gone."""
        self._ask(Stop(), Done)
        with contextlib.suppress(EngineError):
            while True:
                self._receive()

    def _ask(self, message: Message, kind: type[T]) -> T:
        tag = self._inboxes.ask()
        try:
            self._send(message)
            return _answer(self._take(tag), kind)
        finally:
            self._inboxes.close(tag)

    def _stream(self, tag: int, message: Message) -> Iterator[Event]:
        try:
            self._send(message)
            while not isinstance(event := _event(self._take(tag)), Finished):
                yield event
            yield event
        finally:
            self._abandon(self._inboxes.close(tag))

    def _abandon(self, number: int | None) -> None:
        """Cancel a request that nobody reads; its answer is not waited for."""
        if number is not None and self._open:
            with contextlib.suppress(EngineError):  # a daemon that is gone runs nothing
                self._send(Cancel(id=number))
                self._inboxes.close(self._inboxes.ask())

    def _send(self, message: Message) -> None:
        try:
            self._channel.send(message)
        except ConnectionError as error:
            raise EngineError(GONE) from error

    def _take(self, tag: int) -> FromDaemon:
        while (message := self._inboxes.get(tag)) is None:
            self._receive()
        return message

    def _receive(self) -> None:
        try:
            message = self._channel.receive()
        except (EOFError, OSError) as error:
            raise EngineError(GONE) from error
        assert message is not None
        self._abandon(self._inboxes.put(message))


class AsyncClient:
    """The same on asyncio: `async with AsyncClient() as client`, `async for text in client.generate(…)`."""

    def __init__(self, uds: str | Path | None = None) -> None:
        self._uds = uds
        self._inboxes = Inboxes()
        self._link: Connection[FromDaemon] | None = None
        self._waiters: list[asyncio.Future[None]] = []

    async def __aenter__(self) -> Self:
        self._link = Connection(connect(self._uds), from_daemon, self._on_message, self._on_close)
        try:
            await self._ask(Hello(build=__version__), Hello)
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; its open requests end with it."""
        if self._link:
            self._link.close()

    async def generate(self, prompt: str | Sequence[dict[str, Any]], **options: Any) -> AsyncIterator[str]:
        """Stream the answer to a text, or to a chat given as messages, in pieces of text."""
        async for event in self.events(prompt, **options):
            if isinstance(event, Text):
                yield event.text

    def events(self, prompt: str | Sequence[dict[str, Any]], **options: Any) -> AsyncIterator[Event]:
        """The same with every event: `Accepted`, `Text`…, `Finished`."""
        tag = self._inboxes.open()
        return self._stream(tag, prompt_message(tag, prompt, options))

    def submit(self, prompt: Sequence[int], **options: Any) -> AsyncIterator[Event]:
        """Stream raw ids: `Accepted`, `PromptLogprobs`…, `Tokens`…, `Finished`. Options are those of `Submit`."""
        tag = self._inboxes.open()
        return self._stream(tag, submit_message(tag, prompt, options))

    async def cancel(self, number: int) -> None:
        """End the request with that id."""
        await self._ask(Cancel(id=number), Done)

    async def status(self) -> Status:
        """The daemon in one look."""
        return await self._ask(StatusQuery(), Status)

    async def requests(self) -> list[RequestInfo]:
        """The open requests, oldest first."""
        return (await self._ask(RequestsQuery(), Requests)).requests

    async def drop_drafts(self) -> int:
        """Forget the answers that drafts come from, in memory and on disk; how many tokens they were."""
        return (await self._ask(DropDrafts(), Dropped)).tokens

    async def _ask(self, message: Message, kind: type[T]) -> T:
        tag = self._inboxes.ask()
        try:
            self._send(message)
            return _answer(await self._take(tag), kind)
        finally:
            self._inboxes.close(tag)

    async def _stream(self, tag: int, message: Message) -> AsyncIterator[Event]:
        try:
            self._send(message)
            while not isinstance(event := _event(await self._take(tag)), Finished):
                yield event
            yield event
        finally:
            self._abandon(self._inboxes.close(tag))

    def _abandon(self, number: int | None) -> None:
        """Cancel a request that nobody reads; its answer is not waited for."""
        if number is not None and self._link and not self._link.closed:
            self._send(Cancel(id=number))
            self._inboxes.close(self._inboxes.ask())

    async def _take(self, tag: int) -> FromDaemon:
        while (message := self._inboxes.get(tag)) is None:
            if self._link is None or self._link.closed:
                raise EngineError(GONE)
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return message

    def _send(self, message: Message) -> None:
        assert self._link, "use `async with AsyncClient()`"
        self._link.send(message)

    def _on_message(self, message: FromDaemon) -> None:
        self._abandon(self._inboxes.put(message))
        self._wake()

    def _on_close(self, _: Exception | None) -> None:
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
