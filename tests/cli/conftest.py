"""One daemon for all tests of a module that leave it as it was, and `fwd` in this process."""

import apiserver
import pytest
from click.testing import CliRunner
from launch import daemon

from fwd.cli import main


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes")
    apiserver.write_folder(path)
    return path


@pytest.fixture(scope="module")
def shared(folder):
    """A ready daemon whose answers are letters drawn by the hash of prompt and seed."""
    with daemon(apiserver.script(), folder, "--name", "letters") as running:
        yield running


@pytest.fixture
def fwd(monkeypatch):
    """Run the command line; the result has `exit_code`, `stdout` and `stderr`."""
    monkeypatch.delenv("FWD_CONFIG", raising=False)

    def run(*arguments, **options):
        return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)

    return run
