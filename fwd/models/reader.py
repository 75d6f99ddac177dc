"""Reads ranges of checkpoint files straight into memory, with several threads, and hashes all bytes once on the way."""

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event, Lock, Thread

from fwd.errors import ModelError
from fwd.models.safetensors import INDEX, Shard

LEAF = 4 << 20  # bytes that are hashed together, and read by one thread
STEP = 1 << 20  # bytes of one call: they are hashed while the core still has them in its cache
THREADS = min(16, max(4, os.cpu_count() or 1))
AHEAD = 512 << 20  # bytes the disk is asked for before they are wanted
REPORT_SECONDS = 0.5
ASKED = 128 << 10  # a device's usual read-ahead: the kernel may ignore what one request has beyond it


@dataclass(frozen=True, slots=True)
class Range:
    """`length` bytes of a file from `begin` on; `into`, of that length, takes them (None: they are only hashed)."""

    shard: Shard
    begin: int
    length: int
    into: memoryview | None = None


class Reader:
    """Reads bytes of some files, each once. `report` is called as `done` grows, from the thread that calls `read`.

    At most a step a thread is held beside what is read into. Raises ModelError for what the disk says.
    """

    def __init__(self, shards: Sequence[Shard], report: Callable[[], None]) -> None:
        self._leaves: dict[Path, dict[int, bytes]] = {shard.path: {} for shard in shards}
        self._tell = report
        self._pool = ThreadPoolExecutor(THREADS - 1, "weights")
        self._ahead = ReadAhead(shards)
        self.done, self._lock = 0, Lock()  # bytes

    def read(self, ranges: Iterable[Range]) -> None:
        """Read ranges; each is a tensor, or a part of one that begins some whole leaves in."""
        parts = deque(part for one in ranges for part in _split(one))
        wanted = min(THREADS, len(parts), 1 + sum(part.length for part in parts) // LEAF)
        helpers = [self._pool.submit(self._work, parts) for _ in range(wanted - 1)]
        try:
            self._work(parts, self._report)
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()
        self._report()

    def unread(self, shard: Shard) -> Iterator[Range]:
        """What has not been read of a file: its header, tensors that nobody took."""
        places = [(0, shard.start), *((entry.begin, entry.end) for entry in shard.entries.values())]
        for begin, end in places:
            if end > begin and begin not in self._leaves[shard.path]:
                yield Range(shard, begin, end - begin)

    def digest(self, shard: Shard) -> bytes:
        """Return the SHA-256 of the SHA-256 of each leaf of a file, in the order of their places."""
        leaves = self._leaves[shard.path]
        return hashlib.sha256(b"".join(leaves[begin] for begin in sorted(leaves))).digest()

    def close(self) -> None:
        """End the threads."""
        self._ahead.close()
        self._pool.shutdown()

    def _report(self) -> None:
        self._tell()
        self._ahead.reach(self.done)

    def _work(self, parts: deque[Range], report: Callable[[], None] = lambda: None) -> None:
        try:
            for part in _popped(parts):
                self._leaves[part.shard.path][part.begin] = _read_leaf(part)
                with self._lock:
                    self.done += part.length
                report()
        except BaseException:
            parts.clear()  # the other threads have nothing more to do
            raise


class ReadAhead:
    """Keeps the disk at work while the builder of a model is: asks for what comes next in the order of the files."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._until, self._change = AHEAD, Condition()
        self._thread = Thread(target=self._run, args=(shards,), name="read-ahead", daemon=True)
        self._thread.start()

    def reach(self, done: int) -> None:
        """So many bytes have been read."""
        self._move(done + AHEAD)

    def close(self) -> None:
        """End the thread; the files may be closed after."""
        self._move(-1)
        self._thread.join()

    def _move(self, until: int) -> None:
        with self._change:
            self._until = until
            self._change.notify()

    def _run(self, shards: Sequence[Shard]) -> None:
        before = 0
        for shard in shards:
            for begin in range(0, shard.size, ASKED):
                if not self._wait(before + begin):
                    return
                ask(shard, begin, begin + ASKED)
            before += shard.size

    def _wait(self, place: int) -> bool:
        """Whether `place` is wanted, once that is known."""
        with self._change:
            self._change.wait_for(lambda: self._until < 0 or place < self._until)
            return self._until >= 0


class Sums:
    """Whole files beside the SHA-256 that the index has for them; each is read from its begin to its end."""

    def __init__(self, shards: Sequence[Shard], wanted: Mapping[Path, str]) -> None:
        self._wanted, self._stop, self._lock = wanted, Event(), Lock()
        self.done, self.total = 0, sum(shard.size for shard in shards if shard.path in wanted)  # bytes
        self._pool = ThreadPoolExecutor(THREADS, "sha256")
        self._found: dict[Path, Future[str]] = {
            shard.path: self._pool.submit(self._sum, shard) for shard in shards if shard.path in wanted
        }

    def check(self, report: Callable[[], None]) -> None:
        """Raise ModelError for the first file that has another sum; `report` is called while `done` grows."""
        before = -1
        while wait(self._found.values(), REPORT_SECONDS).not_done:
            if self.done != before:
                before = self.done
                report()
        for path, found in self._found.items():
            if found.result() != self._wanted[path]:
                raise ModelError(
                    f"{path} is damaged: its SHA-256 is {found.result()}, {INDEX} says {self._wanted[path]}; "
                    f"download it again"
                )

    def close(self) -> None:
        """End the threads, wherever they are."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def _sum(self, shard: Shard) -> str:
        total, scratch = hashlib.sha256(), memoryview(bytearray(STEP))
        for begin in range(0, shard.size, STEP):
            if self._stop.is_set():
                break
            step = scratch[: shard.size - begin]
            fill(shard, begin, step)
            total.update(step)
            with self._lock:
                self.done += len(step)
        return total.hexdigest()


def _split(whole: Range) -> Iterator[Range]:
    for start in range(0, whole.length, LEAF):
        length = min(LEAF, whole.length - start)
        into = None if whole.into is None else whole.into[start : start + length]
        yield Range(whole.shard, whole.begin + start, length, into)


def _popped(parts: deque[Range]) -> Iterator[Range]:
    """What is left, also while other threads take of it."""
    with contextlib.suppress(IndexError):
        while True:
            yield parts.popleft()


def _read_leaf(part: Range) -> bytes:
    """Read a range and return its SHA-256."""
    leaf, scratch = hashlib.sha256(), memoryview(b"" if part.into else bytearray(min(STEP, part.length)))
    for start in range(0, part.length, STEP):
        length = min(STEP, part.length - start)
        step = part.into[start : start + length] if part.into else scratch[:length]
        fill(part.shard, part.begin + start, step)
        leaf.update(step)
    return leaf.digest()


def ask(shard: Shard, begin: int, end: int) -> None:
    """Ask the disk for a range that is wanted soon."""
    for start in range(begin, end, ASKED):
        with contextlib.suppress(OSError):  # it is advice
            os.posix_fadvise(shard.fd, start, min(ASKED, end - start), os.POSIX_FADV_WILLNEED)


def fill(shard: Shard, begin: int, into: memoryview) -> None:
    """Read as many bytes as `into` has. Raises ModelError for what the disk says."""
    while into:
        try:
            count = os.preadv(shard.fd, [into], begin)
        except OSError as error:
            raise ModelError(f"{shard.path} cannot be read at byte {begin}: {error.strerror}") from None
        if not count:
            raise ModelError(f"{shard.path} ends at byte {begin}: it was cut while it was read")
        into, begin = into[count:], begin + count
