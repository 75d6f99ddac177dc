"""`fwd generate`: one completion, from the command line or a pipe to stdout."""

import sys
from typing import Any

import click

from fwd.cli.common import client, emit, require_ready, wait_ready
from fwd.cli.options import json_option, uds_option
from fwd.cli.request import Answer, given, sampling_options


@click.command()
@click.argument("prompt", required=False)
@sampling_options
@click.option("--wait/--no-wait", default=True, help="Wait for the model to load, or end with code 4.")
@uds_option
@json_option
def generate(prompt: str | None, wait: bool, uds: str | None, as_json: bool, **sampling: Any) -> None:
    """Continue PROMPT, or the text on stdin, and stream the answer to stdout."""
    text = _stdin() if prompt in {None, "-"} else prompt
    with client(uds) as daemon:
        (wait_ready if wait else require_ready)(daemon)
        answer = Answer()
        for piece in answer.read(daemon.events(text, **given(sampling))):
            if not as_json:
                click.echo(piece, nl=False)
    if as_json:
        emit(answer.document())
    elif sys.stdout.isatty():
        click.echo()


def _stdin() -> str:
    if sys.stdin.isatty():
        raise click.UsageError("no prompt: give one, or pipe it in")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"stdin is not UTF-8: {error}") from error
