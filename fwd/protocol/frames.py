"""Frames on a Unix stream socket: a 4-byte little-endian length, a msgpack body, and memfds for long buffers.

`pack` and `Assembler` are pure; `Channel` drives them on a blocking socket, `Connection` on an asyncio loop.
"""

import array
import contextlib
import fcntl
import mmap
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec

from fwd.errors import BadFrameError
from fwd.protocol.messages import Bulk, Message, encoder
from fwd.protocol.values import MAX_FRAME, SPILL

M = TypeVar("M")
CHUNK = 64 << 10
MAX_FDS = 16
MAX_MEMFD = 1 << 30
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_LENGTH = struct.Struct("<I")
_FD = struct.calcsize("i")
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * _FD)


def pack(message: Message) -> tuple[bytes, list[int]]:
    """One frame and the memfds that go with its first byte; the caller closes them once sent."""
    fds: list[int] = []
    if isinstance(message, Bulk):
        message, fds = _spill(message)
    body = encoder.encode(message)
    if len(body) > MAX_FRAME:
        close_all(fds)
        raise BadFrameError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body, fds


def _spill(message: Bulk) -> tuple[Bulk, list[int]]:
    long = {
        name: value
        for name in message.__struct_fields__
        if isinstance(value := getattr(message, name), memoryview) and value.nbytes > SPILL
    }
    if not long:
        return message, []
    empty: dict[str, Any] = dict.fromkeys(long, memoryview(b""))
    fds: list[int] = []
    try:
        for value in long.values():
            _memfd(value, fds)
    except OSError:
        close_all(fds)
        raise
    return msgspec.structs.replace(message, attached=tuple(long), **empty), fds


def _memfd(data: memoryview, fds: list[int]) -> None:
    """A sealed memfd with this content, appended to `fds` as soon as it exists."""
    fd = os.memfd_create("fwd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fds.append(fd)
    view = data.cast("B")
    while view:
        view = view[os.write(fd, view) :]
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


def _mapped(fd: int) -> memoryview:
    """The content of a sealed memfd, mapped read-only; raises `BadFrameError` if a peer could still change it."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:
        sealed = False
    size = os.fstat(fd).st_size
    if not sealed or not 0 < size <= MAX_MEMFD:
        raise BadFrameError("an attached buffer is not a sealed memfd of a permitted size")
    # Linux before 6.7 refuses a shared mapping of a write-sealed memfd, even a read-only one.
    return memoryview(mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody owns any more."""
    for fd in fds:
        os.close(fd)


class Assembler(Generic[M]):
    """Cuts received chunks into messages of one typed decoder; every body is a view of a buffer never used again."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[M]) -> None:
        self._decode = decoder.decode
        self._partial = bytearray()
        self._need = 0
        self._fds: deque[int] = deque()

    def feed(self, chunk: bytes, fds: Iterable[int] = ()) -> list[M]:
        """All messages completed by `chunk`; raises `BadFrameError` on anything that is not one."""
        self._fds.extend(fds)
        if len(self._fds) > MAX_FDS:
            raise BadFrameError("descriptors came without the frames that name them")
        view = memoryview(self._partial + chunk) if self._partial and not self._need else memoryview(chunk)
        if self._need:
            return self._fill(view)
        return self._cut(view)

    def close(self) -> None:
        """Close descriptors that arrived for frames that never did."""
        close_all(self._fds)
        self._fds.clear()

    @property
    def clean(self) -> bool:
        """No frame is half received."""
        return not self._partial

    def _cut(self, view: memoryview) -> list[M]:
        messages: list[M] = []
        while len(view) >= _LENGTH.size:
            length = _LENGTH.unpack_from(view)[0]
            if not 0 < length <= MAX_FRAME:
                raise BadFrameError(f"a frame of {length} bytes is outside 1…{MAX_FRAME}")
            if len(view) < _LENGTH.size + length:
                self._need = _LENGTH.size + length
                break
            messages.append(self._message(view[_LENGTH.size : _LENGTH.size + length]))
            view = view[_LENGTH.size + length :]
        self._partial = bytearray(view)
        return messages

    def _fill(self, view: memoryview) -> list[M]:
        missing = self._need - len(self._partial)
        self._partial += view[:missing]
        if len(view) < missing:
            return []
        body = memoryview(self._partial)[_LENGTH.size :]
        self._partial, self._need = bytearray(), 0
        return [self._message(body), *self._cut(view[missing:])]

    def _message(self, body: memoryview) -> M:
        try:
            message = self._decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BadFrameError(f"a frame could not be read: {error}") from error
        return self._attach(message) if isinstance(message, Bulk) and message.attached else message

    def _attach(self, message: M) -> M:
        assert isinstance(message, Bulk)
        names = message.attached
        if len(self._fds) < len(names) or not all(
            isinstance(getattr(message, name, None), memoryview) for name in names
        ):
            raise BadFrameError("a frame names buffers that did not come with it")
        fds = [self._fds.popleft() for _ in names]
        try:
            buffers: dict[str, Any] = dict(zip(names, map(_mapped, fds), strict=True))
        finally:
            close_all(fds)
        return msgspec.structs.replace(message, attached=(), **buffers)


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One `recvmsg`: a fresh buffer, its descriptors (close-on-exec); raises `BadFrameError` if some were cut off."""
    data, ancillary, flags, _ = sock.recvmsg(CHUNK, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _FD])
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        raise BadFrameError("a control message was truncated: too many descriptors in one frame")
    return data, list(fds)


def transmit(sock: socket.socket, data: bytes | memoryview, fds: list[int]) -> int:
    """One `sendmsg`; the descriptors go with the first byte. Returns the bytes sent."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    return sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)


class Channel(Generic[M]):
    """A frame socket that blocks: the engine's end of its link, and the blocking client's."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[M]) -> None:
        sock.setblocking(True)
        self.sock = sock
        self._assembler = Assembler(decoder)
        self._ready: deque[M] = deque()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, *messages: Message) -> None:
        """Send all of them, those without descriptors in one system call; raises `OSError` when the peer is gone."""
        plain = bytearray()
        for message in messages:
            data, fds = pack(message)
            if not fds:
                plain += data
                continue
            self._send(plain, [])
            plain = bytearray()
            self._send(data, fds)
        self._send(plain, [])

    def receive(self, timeout: float | None = None) -> M | None:
        """The next message, or None after `timeout` seconds (None: wait for ever; 0: only look).

        Raises `EOFError` when the peer closed, `BadFrameError` on a bad frame, `OSError` on a broken socket.
        """
        while not self._ready:
            if not self._poll.poll(None if timeout is None else timeout * 1000):
                return None
            data, fds = receive(self.sock)
            if not data:
                raise EOFError("the other side of the fwd protocol closed the connection")
            self._ready.extend(self._assembler.feed(data, fds))
        return self._ready.popleft()

    def close(self) -> None:
        """Close the socket and what came for frames that never arrived."""
        with contextlib.suppress(OSError):
            self._poll.unregister(self.sock)
        self._assembler.close()
        self.sock.close()

    def _send(self, data: bytes | bytearray, fds: list[int]) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[transmit(self.sock, view, fds) :]
                close_all(fds)
                fds = []
        finally:
            close_all(fds)
