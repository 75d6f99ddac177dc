"""The key of the prefix cache: kept by nobody else, whole or not there, and refused otherwise by one line."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from fwd.engine import keyfile
from fwd.engine.keyfile import prefix_key
from fwd.errors import ConfigError


def test_without_a_state_directory_each_process_has_its_own():
    first, second = prefix_key(""), prefix_key("")
    assert len(first) == len(second) == 32
    assert first != second


def test_it_is_made_once_and_found_again(tmp_path):
    key = prefix_key(str(tmp_path))
    assert prefix_key(str(tmp_path)) == key
    (file,) = tmp_path.iterdir()
    assert file.name == "prefix.key"
    assert file.read_bytes() == key
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("umask", [0, 0o077, 0o777], ids=oct)
def test_its_mode_does_not_depend_on_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        prefix_key(str(tmp_path))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "prefix.key").stat().st_mode) == 0o600


def test_all_who_start_at_once_have_one_key(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        keys = set(pool.map(prefix_key, [str(tmp_path)] * 64))
    assert len(keys) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["prefix.key"]


def test_one_that_dies_while_it_writes_leaves_no_key(tmp_path, monkeypatch):
    def die(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(keyfile.os, "fsync", die)
        with pytest.raises(ConfigError, match="No space left"):
            prefix_key(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert len(prefix_key(str(tmp_path))) == 32


def spoil_mode(path):
    path.chmod(0o640)


def spoil_length(path):
    path.write_bytes(bytes(31))


def replace_by_folder(path):
    path.unlink()
    path.mkdir(mode=0o600)


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path, 0o600)


def replace_by_link(path):
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def replace_by_broken_link(path):
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_mode, "has mode 0640, expected 0600"),
        (spoil_length, "expected a file of 32 bytes, found 31"),
        (replace_by_folder, "no key|directory"),
        (replace_by_pipe, "no key"),
        (replace_by_link, "symbolic links"),
        (replace_by_broken_link, "symbolic links"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_is_not_ours_alone_is_refused_by_one_line(tmp_path, spoil, named):
    prefix_key(str(tmp_path))
    spoil(tmp_path / "prefix.key")
    with pytest.raises(ConfigError, match=named) as refused:
        prefix_key(str(tmp_path))
    assert "\n" not in refused.value.message
    assert "prefix.key" in refused.value.message


def test_a_file_of_another_user_is_refused(tmp_path, monkeypatch):
    prefix_key(str(tmp_path))
    monkeypatch.setattr(keyfile.os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match="expected 12345"):
        prefix_key(str(tmp_path))


def test_a_state_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere/prefix\.key: No such file or directory: give a state_dir"):
        prefix_key(str(tmp_path / "nowhere"))
