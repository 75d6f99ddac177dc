"""Outputs on disk, in an append-only log of the state directory: one for each pair of weights and text side.

A log is a header and records, little-endian. Header: 8 bytes `fwddraft`, uint32 version, uint32 CRC-32 of the key, 32
bytes of key. Record: uint32 count, uint32 CRC-32 of these four bytes, uint32 CRC-32 of the ids, `count` int32 ids.
"""

import errno
import fcntl
import os
import stat
from array import array
from hashlib import blake2b
from pathlib import Path
from struct import Struct
from zlib import crc32

import structlog

from fwd.errors import ConfigError

MAGIC, VERSION = b"fwddraft", 1
HEADER = Struct("<8sII32s")
RECORD = Struct("<III")
WORD = Struct("<I")
ID = 4  # bytes
FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
MODE = 0o600
NAMES = "drafts-*.log*"

Outputs = list["array[int]"]
log = structlog.get_logger()


class CorruptError(Exception):
    """A log holds what no crash leaves behind."""


class DraftLog:
    """The log in `folder` for a model, of at most `limit` bytes: the older half is dropped when it is full.

    It is ours alone (mode 0600) and has one writer; while another process holds it, nothing is read or written. Records
    are not waited for: a crash cuts off the last one, which is then dropped. A log that is corrupt otherwise is begun
    anew, one that cannot be used is left alone, each with a warning.
    """

    def __init__(self, folder: Path, weights_hash: str, text_hash: str, limit: int) -> None:
        key = blake2b(f"{weights_hash}\n{text_hash}".encode(), digest_size=32).digest()
        self.path = folder / f"drafts-{key[:8].hex()}.log"
        self._header = HEADER.pack(MAGIC, VERSION, crc32(key), key)
        self._limit = limit
        self._longest = ((limit - HEADER.size) // 2 - RECORD.size) // ID  # ids of a record: two of them fit
        self._file = -1
        self._size = 0
        self._usable = self._longest > 0
        self._waits = False

    def read(self) -> Outputs:
        """The outputs it holds, oldest first."""
        try:
            return self._open()
        except OSError as error:
            self._leave(error)
            return []

    def append(self, ids: "array[int]") -> None:
        """Keep an output; of one that is too long, its end."""
        if not self._usable:
            return
        try:
            if self._file < 0:
                self._open()
            self._write(packed(ids[-self._longest :]))
        except OSError as error:
            self._leave(error)

    def drop(self) -> None:
        """Erase all logs in the folder, those of other models too; raises as `erase` does."""
        self.close()
        erase(self.path.parent)

    def close(self) -> None:
        """Let others write."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> Outputs:
        self._file = os.open(self.path, FLAGS, MODE)
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "no regular file of this user")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(found, self.path.stat()):
            raise BlockingIOError(errno.EAGAIN, "it was just replaced")
        os.fchmod(self._file, MODE)
        return self._checked()

    def _checked(self) -> Outputs:
        """What the file holds; afterwards it ends with a whole record."""
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            data = file.read()
        try:
            outputs, self._size = parsed(data, self._header)
        except CorruptError as error:
            way_out = "nothing is to be done: it is begun anew"
            log.warning("corpus_dropped", path=str(self.path), reason=str(error), way_out=way_out)
            outputs, self._size = [], 0
        os.ftruncate(self._file, self._size)
        if not self._size:
            self._put(self._header)
        return outputs

    def _write(self, record: bytes) -> None:
        if self._size + len(record) > self._limit:
            self._halve()
        self._put(record)

    def _put(self, data: bytes) -> None:
        """Append all or nothing."""
        if os.write(self._file, data) < len(data):
            os.ftruncate(self._file, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(data)

    def _halve(self) -> None:
        """Keep the latest half, in a file that takes the place of the old one when it is whole."""
        kept, room = list[bytes](), (self._limit - HEADER.size) // 2
        for ids in reversed(self._checked()):
            kept.append(packed(ids))
            room -= len(kept[-1])
            if room < 0:
                kept.pop()
                break
        data = b"".join([self._header, *reversed(kept)])
        draft = self.path.with_name(f"{self.path.name}.new")
        draft.unlink(missing_ok=True)
        old, self._file, self._size = self._file, os.open(draft, FLAGS | os.O_EXCL, MODE), 0
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(self._file, MODE)  # whatever the umask took
            self._put(data)
            os.fsync(self._file)
            draft.rename(self.path)
        finally:
            os.close(old)
            draft.unlink(missing_ok=True)
        _sync(self.path.parent)

    def _leave(self, error: OSError) -> None:
        """Serving goes on without it, until another process has left it where that is all."""
        self.close()
        busy = isinstance(error, BlockingIOError)
        if not (busy and self._waits):
            way_out = "stop the other daemon, or give it a state_dir of its own" if busy else "see to the state_dir"
            reason = "another process writes it" if busy else str(error.strerror)
            log.warning("corpus_not_kept", path=str(self.path), reason=reason, way_out=way_out)
        self._usable, self._waits = self._usable and busy, busy


def packed(ids: "array[int]") -> bytes:
    """One record."""
    count = WORD.pack(len(ids))
    return RECORD.pack(len(ids), crc32(count), crc32(ids)) + ids.tobytes()


def parsed(data: bytes, header: bytes) -> tuple[Outputs, int]:
    """The outputs in a log, and where the last whole record ends; raises `CorruptError`."""
    if not data.startswith(header):
        if header.startswith(data):
            return [], 0
        raise CorruptError("the header is not that of a log for this model")
    outputs, at, view = Outputs(), len(header), memoryview(data)
    while at + RECORD.size <= len(data):
        count, count_sum, sum_ = RECORD.unpack_from(data, at)
        if crc32(view[at : at + WORD.size]) != count_sum:
            raise CorruptError(f"the record at byte {at} has no length")
        ids = view[at + RECORD.size : at + RECORD.size + count * ID]
        if len(ids) < count * ID:
            break
        if crc32(ids) != sum_:
            raise CorruptError(f"the record at byte {at} is not what was written")
        outputs.append(array("i", bytes(ids)))
        at += RECORD.size + count * ID
    return outputs, at


def erase(folder: Path) -> int:
    """Delete all logs of a state directory, if it is there; return how many ids they held. Raises `ConfigError`."""
    ids = 0
    try:
        for path in sorted(folder.glob(NAMES)):
            if path.is_file() and not path.is_symlink():
                ids += _held(path.read_bytes())
            path.unlink()
        _sync(folder)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise ConfigError(f"{folder}: the log of drafts cannot be erased: {error.strerror}") from error
    return ids


def _held(data: bytes) -> int:
    try:
        return sum(map(len, parsed(data, data[: HEADER.size])[0]))
    except CorruptError:
        return 0


def _sync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
