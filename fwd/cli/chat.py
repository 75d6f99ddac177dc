"""`fwd chat`: a conversation that is kept in memory only."""

import asyncio
import secrets
import signal
import sys
from typing import Any

import click

from fwd.cli.common import client, emit, wait_ready
from fwd.cli.options import json_option, uds_option
from fwd.cli.request import given, sampling_options
from fwd.config import load
from fwd.errors import BadRequestError
from fwd.protocol.client import AsyncClient

Message = dict[str, Any]


@click.command()
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@sampling_options
@uds_option
@json_option
def chat(system: str | None, uds: str | None, as_json: bool, **sampling: Any) -> None:
    """Talk with the model. Ctrl-C ends an answer, Ctrl-D or /exit the chat, /clear forgets it.

    With --json the messages are printed as one document at the end, and nothing before it.
    """
    with client(uds) as daemon:
        name = wait_ready(daemon).name
    first = [{"role": "system", "content": system}] if system else []
    with asyncio.Runner() as runner:
        options = {**given(sampling), "cache_key": secrets.token_hex(8)}  # keeps the conversation in the prefix cache
        talk = Talk(AsyncClient(load({"uds": uds}).socket_path), first, options, silent=as_json)
        # NOTE: not runner.run, which would take Ctrl-C away from input()
        runner.get_loop().run_until_complete(talk.open())
        _converse(talk, runner.get_loop(), name)
        talk.close()
    if as_json:
        emit({"messages": talk.messages})


def _converse(talk: "Talk", loop: asyncio.AbstractEventLoop, name: str) -> None:
    if sys.stdin.isatty():
        import readline  # noqa: F401, PLC0415  # its import gives input() line editing

        click.echo(f"{name}: /exit ends, /clear forgets, Ctrl-C stops an answer", err=True)
    while (line := _ask()) != "/exit":
        if line == "/clear":
            talk.clear()
        elif line:
            loop.run_until_complete(talk.answer(line))


def _ask() -> str:
    """The next line of the user; the end of the input is `/exit`, Ctrl-C an empty line."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return "/exit"
    except KeyboardInterrupt:
        click.echo(err=True)
        return ""


class Talk:
    """The messages so far, and the connection that answers them."""

    def __init__(self, daemon: AsyncClient, first: list[Message], options: dict[str, Any], *, silent: bool) -> None:
        self.messages = list(first)
        self._first = first
        self._daemon = daemon
        self._options = options
        self._silent = silent

    async def open(self) -> None:
        """Connect; raises `NotRunningError`."""
        await self._daemon.__aenter__()

    def close(self) -> None:
        """End the connection."""
        self._daemon.close()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._first)

    async def answer(self, line: str) -> None:
        """Stream the answer to `line`; a refused one leaves the conversation as it was."""
        self.messages.append({"role": "user", "content": line})
        try:
            text = await self._stream()
        except BadRequestError as error:
            self.messages.pop()
            click.echo(f"fwd: {error.message}", err=True)
            return
        self.messages.append({"role": "assistant", "content": text})

    async def _stream(self) -> str:
        """The answer, or as much as there was at Ctrl-C."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task
        text = ""
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            async for piece in self._daemon.generate(self.messages, **self._options):
                text += piece
                self._say(piece)
        except asyncio.CancelledError:
            task.uncancel()
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        self._say("\n")
        return text

    def _say(self, text: str) -> None:
        if not self._silent:
            click.echo(text, nl=False)
