"""Who may speak: keys, Host names and browsers from elsewhere."""

import hmac
import re
import socket
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Self

from aiohttp import web

from fwd.config import Config
from fwd.errors import ConfigError, ForbiddenError, UnauthorizedError

PUBLIC = frozenset({"/live", "/ready"})
_HOST = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d+)?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Access:
    """Decides before a handler runs. `keys` are SHA-256 digests in hex, `None` when everybody may come.

    The Host check keeps a web page from reaching a loopback daemon by DNS rebinding; a Unix socket needs none.
    """

    def __init__(self, keys: Sequence[str] | None = None, hosts: Sequence[str] = ()) -> None:
        self._keys = keys
        self._hosts = frozenset(host.lower() for host in (*_LOOPBACK, *hosts))

    @classmethod
    def of(cls, config: Config) -> Self:
        """Read the keys file, if one is set; raises `ConfigError` naming the line at fault."""
        bound = filter(None, map(_host_name, config.http))
        return cls(read_keys(Path(config.keys)) if config.keys else None, [*config.hosts, *bound])

    def check(self, request: web.Request) -> None:
        """Raise `ForbiddenError` or `UnauthorizedError` if the request may not pass."""
        if not self._is_host(request):
            raise ForbiddenError("this Host is not served here: add it to `hosts` in the configuration")
        if request.headers.get("Sec-Fetch-Site") == "cross-site":
            raise ForbiddenError("web pages of other sites may not call this daemon")
        if self._keys is not None and request.path not in PUBLIC and not self._is_key(_presented(request)):
            raise UnauthorizedError("a valid key is needed: send it as `Authorization: Bearer KEY`")

    def _is_host(self, request: web.Request) -> bool:
        sock = request.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            return True
        host = _host_name(request.headers.get("Host", ""))
        return host in self._hosts or host == str(request.get_extra_info("sockname", ("",))[0])

    def _is_key(self, presented: str) -> bool:
        digest = sha256(presented.encode("utf-8", "surrogateescape")).hexdigest()
        found = False
        for key in self._keys or ():
            found |= hmac.compare_digest(key, digest)
        return found


def read_keys(path: Path) -> list[str]:
    """The digests in a keys file: one lower-case SHA-256 in hex a line, blank lines allowed."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"keys: {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and not _DIGEST.fullmatch(line.strip()):
            raise ConfigError(f"keys: {path}:{number} is no lower-case SHA-256 in hex (64 digits)")
    return [line.strip() for line in lines if line.strip()]


def _presented(request: web.Request) -> str:
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


def _host_name(header: str) -> str:
    match = _HOST.fullmatch(header)
    return match[1].strip("[]").rstrip(".").lower() if match else ""
