"""The command line: one lazy group, and the one place where errors become exit codes.

0 ok, 2 usage, 3 not running, 4 not ready, 5 refused, 6 engine failed; 130 after Ctrl-C.
"""

import os
import sys
from importlib import import_module
from typing import Any

import click
import msgspec

from fwd import __version__
from fwd.errors import FwdError

INTERRUPTED = 130
VERBS = {
    "serve": "serve",
    "demo": "demo",
    "generate": "generate",
    "chat": "chat",
    "status": "admin",
    "ps": "admin",
    "cancel": "admin",
    "stop": "admin",
    "cache": "cache",
    "selftest": "selftest.verb",
    "plan": "plan",
    "eval": "eval",
    "kernels": "kernels",
    "bench": "bench.verb",
}


class Verbs(click.Group):
    """Imports the module of a verb when it is used, so that `fwd serve` pays for nothing else."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """The verbs in their order."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  # the same
        """The command of that name, or None."""
        if cmd_name not in VERBS:
            return None
        command = getattr(import_module(f"fwd.cli.{VERBS[cmd_name]}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def main(self, *args: Any, **options: Any) -> Any:
        """Run and exit; an error is one line on stderr."""
        options["standalone_mode"] = False
        try:
            code = super().main(*args, **options)
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            code = error.exit_code
        except click.ClickException as error:
            code = _complain(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except BrokenPipeError:
            code = _broken_pipe()
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; with `--json` its error is a document too."""
        try:
            return super().invoke(ctx)
        except FwdError as error:
            if ctx.meta.get("json"):
                shape = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
                click.echo(msgspec.json.encode({"error": shape}))
            return _complain(error.message, error.exit_code)
        except BrokenPipeError:
            return _broken_pipe()


def _complain(message: str, code: int) -> int:
    click.echo(f"fwd: {message}", err=True)
    return code


def _broken_pipe() -> int:
    """The reader of our output had enough, which is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the last flush cannot fail
    return 0


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fwd")
def main() -> None:
    """One model on one machine, answering one tenant as fast as the memory allows."""
