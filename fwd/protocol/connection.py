"""A frame socket on an asyncio loop. It owns its socket, because asyncio streams cannot pass descriptors."""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from fwd.errors import BadFrameError
from fwd.protocol.frames import Assembler, close_all, pack, receive, transmit
from fwd.protocol.messages import Failed, Message

M = TypeVar("M")
HIGH_WATER = 1 << 20
MAX_BUFFERED = 64 << 20
LINGER = 5.0


class Connection(Generic[M]):
    """A frame socket on the running asyncio loop.

    `on_message` is called for each message in order; `on_close` once, with None after a clean end of file or with the
    error. A bad frame is answered by `Failed(code="bad_frame")` and ends this connection only, as does a peer that lets
    `MAX_BUFFERED` bytes wait for it. A peer that takes no more is still read to its end: its last words count.
    """

    def __init__(
        self,
        sock: socket.socket,
        decoder: msgspec.msgpack.Decoder[M],
        on_message: Callable[[M], None],
        on_close: Callable[[Exception | None], None],
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._assembler = Assembler(decoder)
        self._on_message = on_message
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._buffered = 0
        self._drained: asyncio.Future[None] | None = None
        self._closing = False
        self._deaf = False
        self._error: Exception | None = None
        self.closed = False
        self._loop.add_reader(sock, self._readable)

    def send(self, message: Message) -> None:
        """Send now what the socket takes and the rest when it can; after `close` nothing is sent."""
        if self.closed or self._closing or self._deaf:
            return
        data, fds = pack(message)
        self._out.append((memoryview(data), fds))
        self._buffered += len(data)
        if len(self._out) == 1:
            self._writable()
            if self._out:
                self._loop.add_writer(self.sock, self._writable)
        elif self._buffered > MAX_BUFFERED:
            self.close(TimeoutError("the peer does not read what it asked for"))

    async def drain(self, most: int = HIGH_WATER) -> None:
        """If more than `most` bytes are buffered wait until none are: the pace of a slow reader."""
        if self._buffered > most and not self.closed:
            if self._drained is None:
                self._drained = self._loop.create_future()
            await asyncio.shield(self._drained)

    def close(self, error: Exception | None = None) -> None:
        """Close at once; `on_close` is told `error`."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self.sock)
        self._loop.remove_writer(self.sock)
        self.sock.close()
        self._assembler.close()
        self._drop_output()
        self._on_close(error)

    def finish(self, error: Exception | None = None) -> None:
        """Read no more, flush what is buffered (for `LINGER` seconds at most), then close."""
        if self.closed or self._closing:
            return
        self._closing = True
        self._error = error
        self._loop.remove_reader(self.sock)
        if self._out:
            self._loop.call_later(LINGER, self.close, error)
        else:
            self.close(error)

    def drain_input(self) -> None:
        """Handle all that has already arrived: the last words of a peer known to be dead."""
        while not self.closed and not self._closing and self._readable():
            pass

    def _readable(self) -> bool:
        """Handle one chunk; False when there was none."""
        try:
            data, fds = receive(self.sock)
            messages = self._assembler.feed(data, fds) if data else []
        except (BlockingIOError, InterruptedError):
            return False
        except BadFrameError as error:
            self.send(Failed(code=error.code, message=error.message))
            self.finish(error)
            return False
        except OSError as error:
            self.close(error)
            return False
        if not data:
            self.close(None if self._assembler.clean else BadFrameError("the connection ended inside a frame"))
        self._deliver(messages)
        return bool(data)

    def _deliver(self, messages: list[M]) -> None:
        for message in messages:
            if self.closed or self._closing:
                return
            self._on_message(message)

    def _writable(self) -> None:
        try:
            while self._out:
                data, fds = self._out[0]
                sent = transmit(self.sock, data, fds)
                close_all(fds)
                self._buffered -= sent
                if sent < len(data):
                    self._out[0] = (data[sent:], [])
                    return
                self._out.popleft()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._deaf = True
            self._drop_output()
        self._loop.remove_writer(self.sock)
        self._wake()
        if self._closing:
            self.close(self._error)

    def _drop_output(self) -> None:
        for _, fds in self._out:
            close_all(fds)
        self._out.clear()
        self._buffered = 0
        self._wake()

    def _wake(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None
