"""`fwd cache`: what is remembered of earlier requests, and forgetting it."""

import contextlib
from collections.abc import Iterator

import click

from fwd.cli.admin import drafted
from fwd.cli.common import client, emit, require_ready
from fwd.cli.options import json_option, uds_option
from fwd.config import load
from fwd.errors import NotRunningError
from fwd.protocol.local import Status


@click.group()
def cache() -> None:
    """See or drop what is remembered of earlier requests: prefixes, and answers that drafts come from."""


@cache.command()
@uds_option
@json_option
def stats(uds: str | None, as_json: bool) -> None:
    """Show how much the prefix cache and the drafts' corpus hold, and what they were good for."""
    with client(uds) as daemon:
        status = require_ready(daemon)
    if as_json:
        emit(_document(status))
    else:
        for key, value in _rows(status):
            click.echo(f"{key:<7} {value}")


def _document(status: Status) -> dict[str, object]:
    pages = {"total": status.pages_total, "cached": status.pages_cached, "free": status.pages_free}
    return {"pages": pages, "corpus_tokens": status.corpus_tokens, "drafters": status.drafters}


def _rows(status: Status) -> Iterator[tuple[str, str]]:
    yield "prefix", f"{status.pages_cached} of {status.pages_total} pages, {status.pages_free} are free"
    yield "drafts", f"{status.corpus_tokens} tokens of earlier answers"
    yield from (("", drafted(each)) for each in status.drafters if each.drafted)


@cache.command()
@click.option("--drafts", is_flag=True, help="Earlier answers that drafts come from, in memory and on disk.")
@uds_option
@json_option
def drop(drafts: bool, uds: str | None, as_json: bool) -> None:
    """Forget what is named. Where no daemon runs, what is in the state directory is erased."""
    if not drafts:
        raise click.UsageError("nothing is named that is to be dropped: give --drafts")
    tokens = _drop(uds)
    if as_json:
        emit({"dropped_tokens": tokens})
    else:
        click.echo(f"{tokens} tokens of earlier answers are forgotten")


def _drop(uds: str | None) -> int:
    with contextlib.ExitStack() as stack:
        try:
            daemon = stack.enter_context(client(uds))
        except NotRunningError:
            folder = load({}).state_path
            if folder is None:
                raise
            from fwd.engine.speculate.draft_log import erase  # noqa: PLC0415  # the engine half, only where it is needed

            return erase(folder)
        return daemon.drop_drafts()
