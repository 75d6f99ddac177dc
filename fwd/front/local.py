"""`fwd.sock`: the fwd protocol for local clients and the admin verbs, authorised by the peer's user id."""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import TypeVar

import msgspec
import structlog

from fwd import __version__
from fwd.errors import BadFrameError, BodyTooLargeError, ForbiddenError, FwdError, OverloadedError
from fwd.front import relay
from fwd.front.generation import Generation
from fwd.front.service import Service
from fwd.front.streams import Stream
from fwd.protocol.connection import Connection
from fwd.protocol.local import Done, Prompt, RequestsQuery, StatusQuery, Stop, Text, ToDaemon, to_daemon
from fwd.protocol.messages import VERSION, Cancel, DropDrafts, Dropped, Failed, Finished, Hello, Submit
from fwd.protocol.values import Reason

log = structlog.get_logger("fwd.local")
MAX_OPEN = 64
PAUSE = 1.0  # seconds without accepting when there are no descriptors left
R = TypeVar("R", Submit, Prompt)


def peer_uid(sock: socket.socket) -> int:
    """The user id of the process at the other end (SO_PEERCRED, unix(7))."""
    _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII")))
    return int(uid)


class LocalServer:
    """Accepts on a listening Unix socket; each connection is a `Session`."""

    def __init__(self, service: Service, listener: socket.socket) -> None:
        self._service = service
        self._listener = listener
        self._sessions: set[Session] = set()
        listener.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._listen()

    def close_listener(self) -> None:
        """Accept no more; sessions go on."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    async def drained(self) -> None:
        """Return when every answer has been handed to its client."""
        for session in list(self._sessions):
            await session.drained()

    def close(self) -> None:
        """Accept no more and close every session; their requests are cancelled."""
        self.close_listener()
        for session in list(self._sessions):
            session.close()

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            log.warning("accept_failed", error=str(error))
            self._loop.remove_reader(self._listener)
            self._loop.call_later(PAUSE, self._listen)
            return
        session = Session(self._service, sock, self._sessions.discard)
        self._sessions.add(session)


class Session:
    """One local client. Its open requests end with its connection."""

    def __init__(self, service: Service, sock: socket.socket, on_close: Callable[["Session"], None]) -> None:
        self._service = service
        self._uid = peer_uid(sock)
        self._on_close = on_close
        self._streams: dict[int, Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: list[ToDaemon] | None = None  # asks that wait for the answer to one before them
        self._greeted = False
        self._link: Connection[ToDaemon] = Connection(sock, to_daemon, self._on_message, self._closed)
        self._link.send(Hello(build=__version__))

    async def drained(self) -> None:
        """Return when no request is open here and nothing waits to be sent."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._link.drain(0)

    def close(self) -> None:
        """End the connection and its requests."""
        self._link.close()

    def _closed(self, error: Exception | None) -> None:
        if error:
            log.info("local_client_lost", uid=self._uid, error=str(error))
        for task in self._tasks:
            task.cancel()
        for stream in self._streams.values():
            self._service.cancel(stream)
        self._on_close(self)

    def _on_message(self, message: ToDaemon) -> None:
        with self._answering(message.id if isinstance(message, Submit | Prompt) else None):
            self._handle(message)

    @contextlib.contextmanager
    def _answering(self, tag: int | None) -> Iterator[None]:
        """Whatever goes wrong inside, the client hears of it."""
        try:
            yield
        except FwdError as error:
            self._fail(error, tag=tag)
        except Exception:
            log.exception("local_failed", uid=self._uid, tag=tag)
            self._fail(FwdError("internal error"), tag=tag)

    def _fail(self, error: FwdError, *, number: int = 0, tag: int | None = None) -> None:
        self._service.count_shed(error)
        self._link.send(Failed(id=number, code=error.code, message=error.message, param=error.param, tag=tag))
        if isinstance(error, BadFrameError):
            self._link.finish(error)

    def _handle(self, message: ToDaemon) -> None:
        if isinstance(message, Hello):
            if message.version != VERSION:
                raise BadFrameError(f"this daemon speaks version {VERSION} of the protocol, not {message.version}")
            self._greeted = True
        elif not self._greeted:
            raise BadFrameError("the first frame must be Hello")
        else:
            self._serve(message)

    def _serve(self, message: ToDaemon) -> None:
        match message:
            case StatusQuery() | RequestsQuery() | Cancel() | Stop() | DropDrafts() if self._held is not None:
                self._held.append(message)
            case Submit():
                self._spawn(message.id, self._relay, message)
            case Prompt():
                self._spawn(message.id, self._write, message)
            case Cancel():
                self._cancel(message.id)
            case StatusQuery():
                self._link.send(self._service.status())
            case RequestsQuery():
                self._authorise()
                self._link.send(self._service.requests())
            case DropDrafts():
                self._authorise()
                self._held = []
                self._run(self._drop())
            case Stop():
                self._authorise()
                self._link.send(Done())
                self._service.stop()

    def _authorise(self) -> None:
        if self._uid not in {0, os.geteuid()}:
            raise ForbiddenError(f"user {self._uid} may not administer this daemon: run as root or its own user")

    def _cancel(self, number: int) -> None:
        if stream := self._service.get(number):
            if number not in self._streams:
                self._authorise()
            self._service.cancel(stream)
        self._link.send(Done())

    def _spawn(self, tag: int, work: Callable[[R], Coroutine[None, None, None]], request: R) -> None:
        if len(self._tasks) >= MAX_OPEN:
            raise OverloadedError(f"{MAX_OPEN} requests are open on this connection, which is the limit", retry_after=1)
        self._run(self._guarded(tag, partial(work, request)))

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, tag: int | None, work: Callable[[], Coroutine[None, None, None]]) -> None:
        with self._answering(tag):
            await work()

    async def _drop(self) -> None:
        """Answer `DropDrafts` when the engine has; asks are answered in their order."""
        await self._guarded(None, self._dropped)
        held, self._held = self._held or [], None
        for message in held:
            self._on_message(message)

    async def _dropped(self) -> None:
        self._link.send(Dropped(tokens=await self._service.drop_drafts()))

    @contextlib.contextmanager
    def _opened(self, submit: Submit) -> Iterator[Stream]:
        """Admit a request; whatever happens to its reader, it does not run on afterwards."""
        stream = self._service.open(submit)
        self._streams[stream.id] = stream
        try:
            self._link.send(relay.accepted(submit.id, stream))
            yield stream
        finally:
            self._streams.pop(stream.id, None)
            self._service.cancel(stream)

    async def _relay(self, submit: Submit) -> None:
        if submit.grammar:
            self._service.check_queue()
            await self._service.check_grammar(submit.grammar)
        with self._opened(submit) as stream:
            await self._send_ids(stream)
            self._end(stream)

    async def _send_ids(self, stream: Stream) -> None:
        cursor, scored = stream.given, 0
        while not (stream.done and cursor == len(stream.emitted)):
            await stream.wait(cursor)
            await self._link.drain()
            while scored < len(stream.prompt_logprobs):
                self._link.send(relay.scores(stream, scored))
                scored = min(scored + relay.BATCH, len(stream.prompt_logprobs))
            if cursor < len(stream.emitted):
                self._link.send(relay.tokens(stream, cursor))
                cursor = min(cursor + relay.BATCH, len(stream.emitted))

    async def _write(self, prompt: Prompt) -> None:
        service = self._service
        limit = service.config.max_body
        if max(prompt.body.nbytes, prompt.prediction.nbytes) > limit:
            raise BodyTooLargeError(f"the prompt is larger than {limit} bytes: shorten it, or raise `max_body`")
        service.check_queue()
        ids = await service.prompts.body(prompt.kind, prompt.body)
        likely = await service.prompts.likely(prompt.prediction, service.info().context)
        stop_ids = service.prompts.stop_ids(prompt.limits.stop_ids, ignore_eos=prompt.ignore_eos)
        with self._opened(relay.submit_of(prompt, ids, likely, stop_ids)) as stream:
            generation = Generation(stream, service.prompts.tokenizer, prompt.stops)
            try:
                async for piece in generation.pieces():
                    await self._link.drain()
                    self._link.send(Text(id=stream.id, text=piece.text, tokens=piece.end - piece.start))
            except FwdError:
                assert stream.error
            await service.finish(stream)
            self._end(stream, generation.finish_reason)

    def _end(self, stream: Stream, reason: Reason | None = None) -> None:
        """Send how it ended; an answer whose text is complete (`reason`) ended well whatever came after."""
        if stream.error and not reason:
            self._fail(stream.error, number=stream.id)
        else:
            finished = stream.finished or Finished(id=stream.id, reason="stop")
            self._link.send(msgspec.structs.replace(finished, reason=reason or finished.reason))
