"""`fwd status`, `ps`, `cancel` and `stop`: one look at the daemon, and the two things that end something."""

import click

from fwd.cli.common import client, emit, progress
from fwd.cli.options import json_option, uds_option
from fwd.errors import EngineError, NotFoundError, NotReadyError
from fwd.protocol.local import Status
from fwd.protocol.values import DrafterCounts, EngineInfo, RequestInfo

CODES = {"ready": 0, "failed": EngineError.exit_code}


@click.command()
@uds_option
@json_option
def status(uds: str | None, as_json: bool) -> int:
    """Show the daemon in one look. Ends with code 0 when it is ready, 4 when not, 6 when its engine failed."""
    with client(uds) as daemon:
        found = daemon.status()
    if as_json:
        emit(found)
    else:
        for key, value in _rows(found):
            click.echo(f"{key:<9} {value}")
    return CODES.get(found.state, NotReadyError.exit_code)


def _rows(found: Status) -> list[tuple[str, str]]:
    state = found.state if found.state == "ready" else f"{found.state}: {progress(found)}"
    rows = [
        ("state", state),
        ("model", f"{found.name} ({found.model})"),
        ("listening", ", ".join(found.listening)),
        ("daemon", f"fwd {found.version}, pid {found.pid}, up {found.uptime_s:.0f} s, {found.restarts} restarts"),
        ("requests", f"{found.running} running, {found.waiting} waiting, {found.tokens_out} tokens so far"),
        ("queue", f"{found.queue_tokens} of at most {found.queue_limit} tokens wait"),
        ("pages", f"{found.pages_free} of {found.pages_total} free, {found.pages_cached} hold the prefix cache"),
    ]
    return [*rows, *_engine_rows(found.engine, found.host_us), *_draft_rows(found)] if found.engine else rows


def _engine_rows(engine: EngineInfo, host_us: float) -> list[tuple[str, str]]:
    size = f"{engine.parameters / 1e6:.1f} M parameters, {engine.weight_bytes / 1e6:.1f} MB, context {engine.context}"
    dtypes = f"{', '.join((engine.dtype, *engine.requant))}, KV {engine.kv_dtype or 'the same'}"
    return [
        ("engine", f"{engine.device} ({engine.kernel_set}), {dtypes}, {engine.threads} threads, pid {engine.pid}"),
        *([("steps", _steps(engine.launches, host_us))] if engine.launches else []),
        ("weights", f"{engine.architecture}, {size}, {engine.weights_hash}"),
        *([("memory", _memory(engine))] if engine.memory else []),
        *(("fallback", line) for line in engine.fallbacks),
        *([("left", _kept(engine))] if engine.kept else []),
    ]


def _draft_rows(found: Status) -> list[tuple[str, str]]:
    """Which drafters there are, what each has done since the daemon's start, and what there is to say of them."""
    assert found.engine
    engine, counts = found.engine, [each for each in found.drafters if each.drafted]
    named = f"{', '.join(engine.drafters) or 'none'}{engine.draft_hash and f', weights {engine.draft_hash}'}"
    return [
        ("drafters", named),
        *(("drafted", drafted(each)) for each in counts),
        *([("corpus", f"{found.corpus_tokens} tokens of earlier answers")] if found.corpus_tokens else []),
        *(("note", line) for line in engine.draft_notes),
    ]


def drafted(counts: DrafterCounts) -> str:
    """How often the drafts of one drafter held, and what they cost."""
    cost = f", {counts.ms * 1e3 / counts.drafts:.0f} µs a draft" if counts.ms else ""
    return f"{counts.name}: {counts.accepted / counts.drafted:.0%} of {counts.drafted} tokens held{cost}"


def _steps(launches: str, host_us: float) -> str:
    return f"{launches}, {host_us:.0f} µs of host work between two" if host_us else launches


def _kept(engine: EngineInfo) -> str:
    """What the files hold for drafters and is not loaded."""
    return ", ".join(f"{prefix}* {size / 1e6:.1f} MB" for prefix, size in engine.kept.items()) + " in the files"


def _memory(engine: EngineInfo) -> str:
    """The plan that the engine allocated."""
    items = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in engine.memory.items() if size)
    return f"{sum(engine.memory.values()) / 1e6:.1f} MB: {items}"


@click.command()
@uds_option
@json_option
def ps(uds: str | None, as_json: bool) -> None:
    """List the open requests, oldest first."""
    with client(uds) as daemon:
        found = daemon.requests()
    if as_json:
        emit({"requests": found})
        return
    click.echo(f"{'ID':>6}  {'STATE':<12} {'PROMPT':>7} {'OUTPUT':>7} {'A STEP':>7} {'AGE':>8}  PRIORITY")
    for row in found:
        tokens = f"{row.prompt_tokens:>7} {row.output_tokens:>7} {row.output_tokens / max(1, row.commits):>7.2f}"
        click.echo(f"{row.id:>6}  {_state(row):<12} {tokens} {row.age_s:>7.1f}s  {row.priority}")


def _state(row: RequestInfo) -> str:
    return f"prefill {row.prefilled / row.prompt_tokens:.0%}" if row.state == "prefill" else row.state


@click.command()
@click.argument("number", metavar="ID", type=click.IntRange(1, 2**63 - 1))
@uds_option
@json_option
def cancel(number: int, uds: str | None, as_json: bool) -> None:
    """End the request with that ID, as `fwd ps` lists it."""
    with client(uds) as daemon:
        if number not in {row.id for row in daemon.requests()}:
            raise NotFoundError(f"no open request has the id {number}: `fwd ps` lists them")
        daemon.cancel(number)
    if as_json:
        emit({"cancelled": number})


@click.command()
@uds_option
@json_option
def stop(uds: str | None, as_json: bool) -> None:
    """Stop the daemon; open answers may finish first. Returns when it is gone."""
    with client(uds) as daemon:
        pid = daemon.status().pid
        daemon.stop()
    if as_json:
        emit({"stopped": pid})
