"""Listening: what is bound, what is taken over, what is refused with one clear line."""

import os
import socket
import stat
import subprocess
import sys
from contextlib import closing, contextmanager

import pytest

from fwd.config import Config
from fwd.daemon.sockets import listen
from fwd.errors import ConfigError


@contextmanager
def listening(tmp_path, **settings):
    found = listen(Config(**{"uds": str(tmp_path / "fwd.sock"), "http": ("none",), **settings}))
    try:
        yield found
    finally:
        for sock in (*found.http, found.local):
            sock.close()
        found.remove_files()


def refusal(tmp_path, **settings):
    """The line of the refusal; nothing stays bound, and no socket file is left."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError) as caught, listening(tmp_path, **settings):
        pass
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    assert sorted(tmp_path.iterdir()) == before
    return caught.value.message


def accepts(family, address):
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0


def test_all_kinds_at_once(tmp_path):
    unix = tmp_path / "http.sock"
    with listening(tmp_path, http=("127.0.0.1:0", f"unix:{unix}")) as found:
        assert [sock.family for sock in found.http] == [socket.AF_INET, socket.AF_UNIX]
        assert accepts(socket.AF_INET, found.http[0].getsockname())
        for path in (unix, tmp_path / "fwd.sock"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert accepts(socket.AF_UNIX, str(path))
        assert found.names() == [
            f"http://127.0.0.1:{found.http[0].getsockname()[1]}",
            f"http://unix:{unix}",
            str(tmp_path / "fwd.sock"),
        ]
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_the_socket_is_made(tmp_path):
    with listening(tmp_path / "run" / "fwd"):
        assert accepts(socket.AF_UNIX, str(tmp_path / "run" / "fwd" / "fwd.sock"))


def test_a_stale_socket_is_replaced(tmp_path):
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(tmp_path / "fwd.sock"))
        crashed.listen()
    assert (tmp_path / "fwd.sock").is_socket()
    with listening(tmp_path):
        assert accepts(socket.AF_UNIX, str(tmp_path / "fwd.sock"))


def test_a_socket_in_use_is_refused(tmp_path):
    with listening(tmp_path):
        assert "already listens" in refusal(tmp_path)
        assert accepts(socket.AF_UNIX, str(tmp_path / "fwd.sock"))


def test_a_file_that_is_no_socket_is_refused(tmp_path):
    (tmp_path / "fwd.sock").write_text("precious")
    assert "no socket" in refusal(tmp_path)
    assert (tmp_path / "fwd.sock").read_text() == "precious"


def test_a_socket_in_a_place_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "--uds" in refusal(tmp_path, uds=str(tmp_path / "file" / "fwd.sock"))
    assert "cannot be bound" in refusal(tmp_path, uds=str(tmp_path / ("x" * 120)))


def test_a_port_in_use_is_refused(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        line = refusal(tmp_path, http=(f"unix:{tmp_path}/http.sock", f"127.0.0.1:{port}"))
    assert f"127.0.0.1:{port}" in line
    assert "in use" in line


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_beyond_loopback_needs_keys(tmp_path, address):
    line = refusal(tmp_path, http=(address,))
    assert address in line
    assert "keys" in line
    (tmp_path / "keys").touch()
    with listening(tmp_path, http=(address,), keys=str(tmp_path / "keys")) as found:
        assert len(found.http) == 1


@pytest.mark.parametrize("address", ["8393", "127.0.0.1", "127.0.0.1:", ":80", "127.0.0.1:70000", "127.0.0.1:x", ""])
def test_what_is_no_address_is_refused(tmp_path, address):
    assert repr(address) in refusal(tmp_path, http=(address,))


def test_a_name_that_does_not_resolve_is_refused(tmp_path):
    assert "name.invalid" in refusal(tmp_path, http=("name.invalid:80",))


def test_descriptors_for_another_process_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "1")
    with listening(tmp_path):
        assert (tmp_path / "fwd.sock").is_socket()
    assert "LISTEN_FDS" not in os.environ


@pytest.mark.parametrize(("fds", "word"), [("1", "reachable from outside"), ("2", "no socket")])
def test_inherited_sockets_are_held_to_the_same_rules(tmp_path, fds, word):
    """In a process of its own, whose descriptor 3 is a socket beyond loopback and 4 a plain file."""
    with socket.create_server(("0.0.0.0", 0)) as outside, (tmp_path / "file").open("w") as plain:
        code = "from fwd.config import Config; from fwd.daemon.sockets import listen; listen(Config())"
        arm = f'LISTEN_PID=$$ exec "$@" 3<&{outside.fileno()} 4<&{plain.fileno()}'
        if fds == "2":
            arm = f'LISTEN_PID=$$ exec "$@" 3<&{plain.fileno()} 4<&{plain.fileno()}'
        done = subprocess.run(
            ["bash", "-c", arm, "bash", sys.executable, "-c", code],
            env={**os.environ, "LISTEN_FDS": fds},
            pass_fds=(outside.fileno(), plain.fileno()),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "ConfigError: " in done.stderr
    assert word in done.stderr.splitlines()[-1]


def test_socket_files_are_removed_once(tmp_path):
    """Whoever stops late must not take away the socket of the daemon that came after."""
    with listening(tmp_path) as first:
        first.remove_files()
        with listening(tmp_path):
            first.remove_files()
            assert accepts(socket.AF_UNIX, str(tmp_path / "fwd.sock"))
