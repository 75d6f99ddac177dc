"""Frames: any split of the bytes gives the same messages; what a peer sends harms nobody else and leaks nothing."""

import array
import asyncio
import os
import socket
import struct
from pathlib import Path

import msgspec
import pytest
from census import open_descriptors
from hypothesis import given, settings
from hypothesis import strategies as st

from fwd.errors import BadFrameError
from fwd.protocol import connection, frames
from fwd.protocol.connection import Connection
from fwd.protocol.frames import Assembler, Channel, pack
from fwd.protocol.ids import pack_ids, unpack_ids
from fwd.protocol.local import ToDaemon, from_daemon, to_daemon
from fwd.protocol.messages import Cancel, Failed, Finished, Hello, Ping, Submit, Tokens, from_engine, to_engine
from fwd.protocol.values import MAX_FRAME, SPILL

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
REQUESTS = st.one_of(
    st.builds(Ping, seq=st.integers(0, 2**63 - 1)),
    st.builds(Cancel, id=st.integers(0, 2**63 - 1)),
    st.builds(
        Submit,
        id=st.integers(0, 2**63 - 1),
        prompt=IDS.map(pack_ids),
        emitted=IDS.map(pack_ids),
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        cache_key=st.text(max_size=20),
    ),
)


def raw(*fields):
    body = msgspec.msgpack.encode(fields)
    return struct.pack("<I", len(body)) + body


BAD = {
    "zero length": b"\0\0\0\0",
    "too long": struct.pack("<I", MAX_FRAME + 1),
    "unknown tag": b"\x02\0\0\0\x91\x7f",
    "no tag": b"\x01\0\0\0\x90",
    "not an array": b"\x01\0\0\0\x04",
    "wrong type": b"\x04\0\0\0\x92\x04\xa1x",
    "out of bounds": b"\x03\0\0\0\x92\x04\xff",
    "field missing": b"\x02\0\0\0\x91\x04",
    "not msgpack": b"\x01\0\0\0\xc1",
    "trailing bytes": b"\x04\0\0\0\x92\x04\x01\x01",
    "truncated body": b"\x05\0\0\0\x92\x04\xda\xff\xff",
    "deep nesting": struct.pack("<I", 100_001) + b"\x91" * 100_000 + b"\x90",
    "deep unknown field": struct.pack("<I", 100_004) + b"\x93\x04\x01" + b"\x91" * 100_000 + b"\x90",
    "huge array": b"\x09\0\0\0\x93\x03\xdd\xff\xff\xff\xff\0\0",
    "memfd that never came": raw(3, ["prompt"], 1, b"", b""),
    "memfd for no such field": raw(3, ["__class__"], 1, b"", b""),
}


def framed(*messages):
    return b"".join(pack(message)[0] for message in messages)


@given(st.lists(REQUESTS, max_size=8), st.data())
def test_any_split_gives_the_same_messages(messages, data):
    stream = framed(*messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    assembler = Assembler(to_engine)
    received = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += assembler.feed(stream[begin:end])
    assert received == messages
    assert assembler.clean


def test_a_byte_at_a_time():
    messages = [Submit(id=1, prompt=pack_ids(range(1000))), Ping(seq=7), Hello()]
    assembler = Assembler(to_engine)
    received = [message for byte in framed(*messages) for message in assembler.feed(bytes([byte]))]
    assert received == messages


def test_messages_do_not_share_buffers():
    first, second = (framed(Submit(id=number, prompt=pack_ids([number] * 50))) for number in (1, 2))
    assembler = Assembler(to_engine)
    (one,) = assembler.feed(first)
    assembler.feed(second[:100])
    (two,) = assembler.feed(second[100:])
    assert list(unpack_ids(one.prompt)) == [1] * 50
    assert list(unpack_ids(two.prompt)) == [2] * 50


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_a_bad_frame(junk):
    assembler = Assembler(to_daemon)
    try:
        messages = assembler.feed(struct.pack("<I", len(junk)) + junk)
    except BadFrameError:
        return
    assert len(messages) == 1
    assert isinstance(messages[0], ToDaemon)


@pytest.mark.parametrize("name", BAD)
def test_bad_frames(name):
    with pytest.raises(BadFrameError):
        Assembler(to_engine).feed(BAD[name])


def test_a_frame_over_the_limit_is_not_sent():
    with pytest.raises(BadFrameError, match="over the limit"):
        pack(Failed(code="x", message="y" * MAX_FRAME))


@pytest.fixture
def pair():
    """Two blocking channels; no descriptor may be left when they are closed."""
    before = open_descriptors()
    ours, theirs = socket.socketpair()
    left, right = Channel(ours, from_engine), Channel(theirs, to_engine)
    yield left, right
    left.close()
    right.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("size", [0, 1, SPILL // 4, SPILL // 4 + 1, 100_000, 1 << 20])
def test_ids_of_any_length_travel(pair, size):
    left, right = pair
    ids = array.array("i", range(size))
    left.send(Ping(seq=1), Submit(id=1, prompt=pack_ids(ids), emitted=pack_ids(ids)), Ping(seq=2))
    first, submit, last = (right.receive(10) for _ in range(3))
    assert (first, last) == (Ping(seq=1), Ping(seq=2))
    assert submit.attached == ()
    assert unpack_ids(submit.prompt) == unpack_ids(submit.emitted) == memoryview(ids)
    del submit


def test_mapped_ids_are_read_only(pair):
    left, right = pair
    left.send(Submit(id=1, prompt=pack_ids(range(SPILL))))
    submit = right.receive(10)
    assert submit.prompt.readonly
    del submit


def send_attached(sock, fds, names=("prompt",)):
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    sock.sendmsg([raw(3, names, 1, b"", b"")], rights)


def memfd(size, seals):
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    frames.fcntl.fcntl(fd, frames.fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize(
    ("size", "seals"),
    [
        (64, 0),
        (64, frames.SEALS & ~frames.fcntl.F_SEAL_WRITE),
        (64, frames.SEALS & ~frames.fcntl.F_SEAL_SHRINK),
        (0, frames.SEALS),
        (frames.MAX_MEMFD + 4096, frames.SEALS),
    ],
)
def test_memfds_that_are_not_as_promised(pair, size, seals):
    left, right = pair
    fd = memfd(size, seals)
    send_attached(left.sock, [fd])
    os.close(fd)
    with pytest.raises(BadFrameError, match="sealed memfd"):
        right.receive(10)


def test_a_descriptor_that_is_no_memfd(pair):
    left, right = pair
    with Path(__file__).open("rb") as file:
        send_attached(left.sock, [file.fileno()])
    with pytest.raises(BadFrameError, match="sealed memfd"):
        right.receive(10)


def test_more_descriptors_than_fit_in_a_message(pair):
    left, right = pair
    with Path(__file__).open("rb") as file:
        send_attached(left.sock, [file.fileno()] * (frames.MAX_FDS + 8))
    with pytest.raises(BadFrameError, match="truncated"):
        right.receive(10)


def test_descriptors_that_no_frame_names_are_bounded(pair):
    left, right = pair
    with Path(__file__).open("rb") as file:
        for _ in range(frames.MAX_FDS + 1):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
            left.sock.sendmsg([pack(Ping(seq=1))[0]], rights)
    for _ in range(frames.MAX_FDS):
        right.receive(10)
    with pytest.raises(BadFrameError, match="without the frames"):
        right.receive(10)


def test_the_end_of_the_connection(pair):
    left, right = pair
    left.send(Ping(seq=1))
    left.sock.shutdown(socket.SHUT_RDWR)
    assert right.receive(10) == Ping(seq=1)
    with pytest.raises(EOFError):
        right.receive(10)


def test_receive_only_looks(pair):
    left, right = pair
    assert right.receive(0) is None
    left.send(Ping(seq=1), Ping(seq=2))
    assert [right.receive(10), right.receive(0), right.receive(0)] == [Ping(seq=1), Ping(seq=2), None]


class Peer:
    """One asyncio end that keeps what it is told."""

    def __init__(self, sock, decoder):
        self.inbox = asyncio.Queue()
        self.closed = asyncio.get_running_loop().create_future()
        self.link = Connection(sock, decoder, self.inbox.put_nowait, self.closed.set_result)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_frame_is_answered_and_ends_its_own_connection_only(run, name):
    async def main():
        before = open_descriptors()
        (bad, ours), (good, also_ours) = socket.socketpair(), socket.socketpair()
        mine, other = Peer(ours, to_daemon), Peer(also_ours, to_daemon)
        rude, polite = Channel(bad, from_daemon), Channel(good, from_daemon)
        rude.sock.sendall(BAD[name])
        assert isinstance(await mine.closed, BadFrameError)
        answer = rude.receive(10)
        assert isinstance(answer, Failed)
        assert answer.code == "bad_frame"
        with pytest.raises((EOFError, ConnectionResetError)):
            rude.receive(10)
        polite.send(Hello())
        other.link.send(Hello(build="here"))
        assert await other.inbox.get() == Hello()
        assert polite.receive(10) == Hello(build="here")
        assert not other.link.closed
        for end in (rude, polite, other.link):
            end.close()
        assert open_descriptors() == before

    run(main())


def test_a_connection_that_ends_inside_a_frame(run):
    async def main():
        theirs, ours = socket.socketpair()
        peer = Peer(ours, to_engine)
        theirs.sendall(framed(Ping(seq=1)) + b"\x10\0")
        theirs.close()
        error = await peer.closed
        assert peer.inbox.get_nowait() == Ping(seq=1)
        assert isinstance(error, BadFrameError)

    run(main())


def test_last_words_are_heard_though_the_peer_takes_no_more(run):
    async def main():
        theirs, ours = socket.socketpair()
        theirs.sendall(framed(Failed(code="bad_model", message="no such tensor")))
        theirs.close()
        peer = Peer(ours, from_engine)
        peer.link.send(Hello())
        peer.link.send(Hello())
        await peer.closed
        assert peer.inbox.get_nowait().code == "bad_model"

    run(main())


def test_everything_buffered_arrives_in_order_and_drain_waits_for_it(run):
    async def main():
        theirs, ours = socket.socketpair()
        channel, peer = Channel(theirs, to_engine), Peer(ours, from_engine)
        count = 200
        for number in range(count):
            peer.link.send(Submit(id=number, prompt=pack_ids(range(number * 100 % 20_000)), cache_key="k" * 200))
        big = [Submit(id=count + number, prompt=memoryview(b"\1" * SPILL)) for number in range(40)]
        for submit in big:
            peer.link.send(submit)
        drained = asyncio.ensure_future(peer.link.drain())
        await asyncio.sleep(0)
        assert not drained.done()
        received = await asyncio.to_thread(lambda: [channel.receive(10) for _ in range(count + len(big))])
        await drained
        assert [submit.id for submit in received] == list(range(count + len(big)))
        assert received[-1] == big[-1]
        peer.link.close()
        channel.close()

    run(main())


def test_finish_flushes_what_is_buffered(run):
    async def main():
        theirs, ours = socket.socketpair()
        channel, peer = Channel(theirs, from_engine), Peer(ours, to_engine)
        frame = Tokens(id=1, start=0, ids=[1] * 50_000)
        for _ in range(20):
            peer.link.send(frame)
        peer.link.finish()
        peer.link.send(Finished(id=1, reason="stop"))
        received = await asyncio.to_thread(lambda: [channel.receive(10) for _ in range(20)])
        await peer.closed
        assert received == [frame] * 20
        with pytest.raises(EOFError):
            channel.receive(10)
        channel.close()

    run(main())


def test_a_peer_that_never_reads_is_cut_off_and_closing_frees_its_memfds(run, monkeypatch):
    async def main():
        before = open_descriptors()
        theirs, ours = socket.socketpair()
        peer = Peer(ours, from_engine)
        while not peer.link.closed:
            peer.link.send(Submit(id=1, prompt=memoryview(bytes(SPILL + 4)), emitted=memoryview(bytes(SPILL))))
        assert isinstance(await peer.closed, TimeoutError)
        theirs.close()
        assert open_descriptors() == before

    monkeypatch.setattr(connection, "MAX_BUFFERED", 4 << 20)
    run(main())
