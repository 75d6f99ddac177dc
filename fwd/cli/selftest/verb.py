"""The verb: same bytes in every way, then the sampler's law, and one line at the end."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from fwd.cli.common import Line, emit
from fwd.cli.options import json_option, uds_option
from fwd.cli.selftest import law, same
from fwd.cli.target import target
from fwd.errors import EngineError
from fwd.protocol.client import Client
from fwd.protocol.local import Status
from fwd.protocol.values import EngineInfo
from fwd.text.tokenizer import Tokenizer

FILE = "class Reader:\n    def __init__(self, path):\n        self.path = path\n        self.lines = []\n\n"
PROMPTS = {
    "code": "def fibonacci(n):\n",
    "prose": "The harbour was quiet that morning, and nobody saw the ship until",
    "records": '{"name": "Ada", "born": 1815}\n{"name": "Alan", "born": 1912}\n{"name":',
    "edit": f"# before\n{FILE}# after\n{FILE.replace('path', 'file')[:60]}",
}
LONG = "edit"  # and once more so long that it is read in several chunks


class Size(NamedTuple):
    """How much is tried."""

    prompts: int
    seeds: int
    tokens: int
    widths: Sequence[int]
    draws: int


FULL, QUICK = Size(5, 2, 48, (1, 2, 5, 16), 2048), Size(2, 1, 24, (1, 6), 256)


@click.command()
@click.argument("model", required=False)
@click.option("--quick", is_flag=True, help="A tenth of it.")
@uds_option
@json_option
def selftest(model: str | None, quick: bool, uds: str | None, as_json: bool) -> int:
    """Prove on this machine that the same seed gives the same bytes, and that tokens are drawn by their law.

    Answers are computed alone and without drafts, then with every drafter and up to 15 neighbours, and all ids and
    log-probabilities compared. Then many single tokens are drawn and counted (chi-square). The running daemon is tried,
    or with MODEL (a folder or `demo`), or where none runs, a private one. Ends with code 0 if all is well, else 6.
    """
    begun, line = time.perf_counter(), Line()
    with target(model, uds) as (daemon, status):
        try:
            found = _run(daemon, status, QUICK if quick else FULL, line.show)
        finally:
            line.show("")
    found["seconds"] = time.perf_counter() - begun
    if as_json:
        emit(found)
    else:
        click.echo("\n".join(_lines(found)))
    return 0 if found["ok"] else EngineError.exit_code


def _run(daemon: Client, status: Status, size: Size, told: Callable[[str], None]) -> dict[str, Any]:
    assert status.engine
    engine = status.engine
    prompts = _prompts(Tokenizer.load(Path(status.model)), engine, size)
    every = same.cases(prompts, size.seeds, size.tokens)
    bytes_ = same.compare(daemon, every, same.ways(_named(engine), size.widths), told)
    tested = law.check(daemon, prompts.values(), size.draws, told)
    worst = min(each.p for each in tested)
    return {
        "ok": not bytes_.differences and worst > law.LEAST,
        "model": status.name,
        "engine": engine,
        "bytes": bytes_._asdict() | {"differences": [each._asdict() for each in bytes_.differences]},
        "sampler": [each._asdict() for each in tested],
        "p": worst,
    }


def _named(engine: EngineInfo) -> list[str]:
    """The drafters that a request may name."""
    return list(engine.drafters)


def _prompts(tokenizer: Tokenizer, engine: EngineInfo, size: Size) -> dict[str, list[int]]:
    """Ids of the texts, and one of them again and again over more than a chunk; the context holds all."""
    room = engine.context - size.tokens
    if room < 1:
        raise EngineError(f"a context of {engine.context} tokens is too short: give it more than {size.tokens}")
    ids = {name: tokenizer.encode(text) for name, text in PROMPTS.items()}
    wanted = engine.chunk + engine.chunk // 2 + 1
    long = (ids[LONG] * (wanted // max(1, len(ids[LONG])) + 1))[:wanted]
    chosen = list({"long": long, **ids}.items())[: size.prompts]
    return {name: prompt[-room:] for name, prompt in chosen}


def _lines(found: dict[str, Any]) -> Iterator[str]:
    engine, same_ = found["engine"], found["bytes"]
    drafters = f"drafters {', '.join(engine.drafters)}" if engine.drafters else "no drafters"
    yield f"{found['model']} in {engine.dtype} on {engine.device} ({engine.kernel_set}), {drafters}"
    yield (
        f"bytes: {same_['answers']} answers in {same_['ways']} ways against those alone and without drafts; "
        f"{same_['drafted']} tokens drafted, {same_['accepted']} held"
    )
    for each in same_["differences"][:1]:
        yield (f"  {each['case']}: token {each['token']} is {each['here']} ({each['way']}), alone {each['alone']}")
    draws = sum(each["draws"] for each in found["sampler"])
    yield f"sampler: {draws} draws in {len(found['sampler'])} mixes, the least p is {found['p']:.2g}"
    yield _verdict(found)


def _verdict(found: dict[str, Any]) -> str:
    wrong = len(found["bytes"]["differences"])
    faults = [
        *([f"{wrong} answers are not the same bytes"] if wrong else []),
        *([f"tokens are not drawn by their law (p ≤ {law.LEAST:g})"] if found["p"] <= law.LEAST else []),
    ]
    took = f"{found['seconds']:.0f} s"
    return f"FAILED: {' and '.join(faults)} ({took})" if faults else f"passed: same seed, same bytes ({took})"
