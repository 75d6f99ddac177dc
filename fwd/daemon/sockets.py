"""Listening sockets: inherited by descriptor, or bound here with clear refusals."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fwd.config import Config
from fwd.errors import ConfigError

BACKLOG = 1024
FIRST_INHERITED = 3
LOCAL_NAME = "local"


class Listeners(NamedTuple):
    """Bound and listening sockets; `owned` are the socket files to remove at the end."""

    http: list[socket.socket]
    local: socket.socket
    owned: list[Path]

    def names(self) -> list[str]:
        """Where clients reach the daemon, as URLs and paths."""
        return [*(f"http://{_name(sock)}" for sock in self.http), str(self.local.getsockname())]

    def remove_files(self) -> None:
        """Unlink the socket files made here, once: later the path may be another daemon's."""
        while self.owned:
            self.owned.pop().unlink(missing_ok=True)


def listen(config: Config) -> Listeners:
    """Take inherited sockets, bind what is missing; raises `ConfigError` with nothing left bound."""
    with contextlib.ExitStack() as undo:
        inherited = list(_inherited(config))
        local = next((sock for name, sock in inherited if name == LOCAL_NAME), None)
        http = [sock for _, sock in inherited if sock is not local]
        owned: list[Path] = []
        if not http:
            for address in config.http:
                http += _bind_http(address, config, owned, undo)
        if local is None:
            local = _bind_unix(config.socket_path, owned, undo)
        undo.pop_all()
        return Listeners(http, local, owned)


def _inherited(config: Config) -> Iterator[tuple[str, socket.socket]]:
    """Sockets passed as descriptors 3, 4, … with their names (sd_listen_fds(3)); the variables are consumed."""
    pid, total = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "0")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()):
        return
    for index in range(int(total) if total.isdigit() else 0):
        sock = _adopted(FIRST_INHERITED + index)
        if sock.family != socket.AF_UNIX:
            _refuse_outside([sock.getsockname()[0]], _name(sock), config)
        yield (names[index] if index < len(names) else ""), sock


def _adopted(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        return socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"LISTEN_FDS: descriptor {fd} is no socket ({error.strerror})") from error


def _refuse_outside(hosts: list[str], address: str, config: Config) -> None:
    """Beyond loopback there must be keys."""
    if not config.keys and not all(ipaddress.ip_address(host).is_loopback for host in hosts):
        raise ConfigError(
            f"http: {address} is reachable from outside and there are no keys: set `keys` or bind 127.0.0.1"
        )


def _bind_http(address: str, config: Config, owned: list[Path], undo: contextlib.ExitStack) -> list[socket.socket]:
    if address == "none":
        return []
    if address.startswith("unix:"):
        return [_bind_unix(Path(address.removeprefix("unix:")), owned, undo)]
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"http: {address!r} is not HOST:PORT, unix:PATH or none")
    found = _resolve(host, int(port))
    _refuse_outside([target[0] for _, target in found], address, config)
    return [_bind_tcp(family, target, address, undo) for family, target in found[:1]]


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"http: {host!r} cannot be resolved: {error.strerror}") from error
    return [(family, (str(target[0]), int(target[1]))) for family, _, _, _, target in entries]


def _bind_tcp(
    family: socket.AddressFamily, target: tuple[str, int], address: str, undo: contextlib.ExitStack
) -> socket.socket:
    sock = undo.enter_context(contextlib.closing(socket.socket(family, socket.SOCK_STREAM)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(target)
        sock.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"http: {address} cannot be bound ({error.strerror}): is another daemon on that port?"
        ) from error
    return sock


def _bind_unix(path: Path, owned: list[Path], undo: contextlib.ExitStack) -> socket.socket:
    _clear_stale(path)
    sock = undo.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
    mask = os.umask(0o117)
    try:
        sock.bind(str(path))
        undo.callback(path.unlink, missing_ok=True)
        sock.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(f"{path} cannot be bound: {error.strerror or error}") from error
    finally:
        os.umask(mask)
    owned.append(path)
    return sock


def _clear_stale(path: Path) -> None:
    """Remove a socket file that a crash left; refuse one that somebody listens on, and anything that is no socket."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be made ({error.strerror}): give another place with --uds") from error
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigError(f"{path} exists and is no socket: give another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ConfigError(f"{path} cannot be examined: {error.strerror}") from error
    raise ConfigError(f"a daemon already listens on {path}: stop it with `fwd stop`, or give another path with --uds")


def _name(sock: socket.socket) -> str:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"
