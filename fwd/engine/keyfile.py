"""The key of the prefix cache's page hashes: of this process only, or kept in the state directory."""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from fwd.errors import ConfigError

NAME = "prefix.key"
SIZE = 32
MODE = 0o600


def prefix_key(state_dir: str) -> bytes:
    """Return 32 random bytes: new ones, or those of `prefix.key` in `state_dir`, made there if it is not.

    Raises `ConfigError` for a file that cannot be read or made, or that is not ours alone.
    """
    if not state_dir:
        return secrets.token_bytes(SIZE)
    path = Path(state_dir) / NAME
    try:
        with suppress(FileExistsError):
            if not path.is_symlink() and not path.exists():
                _create(path)
        return _read(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give a state_dir that fwd can read and write") from error


def _create(path: Path) -> None:
    """Make the file whole under another name and link it: whoever finds it finds all of it, and the first one stays."""
    draft = path.with_name(f".{NAME}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        _write(draft, secrets.token_bytes(SIZE))
        os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE), "wb") as file:
        os.fchmod(file.fileno(), MODE)  # whatever the umask took
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        _check(path, os.fstat(file.fileno()))
        return file.read()


def _check(path: Path, found: os.stat_result) -> None:
    """Refuse what others could have read or written, and what is no key."""
    way_out = "delete it, and a new one is made"
    if not stat.S_ISREG(found.st_mode) or found.st_size != SIZE:
        raise ConfigError(f"{path} is no key: expected a file of {SIZE} bytes, found {found.st_size}: {way_out}")
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to user {found.st_uid}, expected {os.geteuid()}: {way_out}")
    if stat.S_IMODE(found.st_mode) != MODE:
        raise ConfigError(f"{path} has mode {stat.S_IMODE(found.st_mode):04o}, expected {MODE:04o}: {way_out}")
