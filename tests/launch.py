"""`fwd` on the fake engine: `python launch.py SCRIPT ARGUMENTS…`, where SCRIPT is a `fakes.Script` in JSON."""

import sys
from collections.abc import Sequence
from pathlib import Path

import fakes
import msgspec

import fwd.cli
from fwd.cli import private
from fwd.front.keeper import Keeper
from fwd.front.process import EngineProcess


def launch(script: fakes.Script, *arguments: str) -> list[str]:
    """The command line that runs `fwd` with these arguments."""
    return [sys.executable, str(Path(__file__).resolve()), msgspec.json.encode(script).decode(), *arguments]


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
