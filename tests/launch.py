"""`fwd` on the fake engine: `python launch.py SCRIPT ARGUMENTS…`, where SCRIPT is a `fakes.Script` in JSON."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import fakes
import msgspec

import fwd.cli
from fwd.cli import private
from fwd.cli.common import wait_ready
from fwd.front.keeper import Keeper
from fwd.front.process import EngineProcess


def launch(script: fakes.Script, *arguments: str) -> list[str]:
    """The command line that runs `fwd` with these arguments."""
    return [sys.executable, str(Path(__file__).resolve()), msgspec.json.encode(script).decode(), *arguments]


@contextmanager
def daemon(script: fakes.Script, model: Path, *flags: str, ready: bool = True) -> Iterator[private.Private]:
    """A daemon process on the tokenizer of `model`, without HTTP unless the flags say so."""
    http = () if "--http" in flags else ("--http", "none")
    with mock.patch.object(private, "COMMAND", launch(script)):
        running = private.private_daemon(str(model), *flags, *http)
        with running as started:
            with started.connect() as client:
                if ready:
                    wait_ready(client)
            yield started


def replace_engine(command: Sequence[str]) -> None:
    """Let every engine of this process be `command`."""
    EngineProcess.__init__.__defaults__ = (command,)
    assert Keeper.__init__.__kwdefaults__
    Keeper.__init__.__kwdefaults__["command"] = command


if __name__ == "__main__":
    played = msgspec.json.decode(sys.argv.pop(1), type=fakes.Script)
    private.COMMAND = tuple(launch(played))
    replace_engine(fakes.command(played))
    fwd.cli.main()
