"""`fwd bench speculation`: tokens a step and tokens a millisecond, by drafter and kind of text, beside no drafts."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from fwd.cli.bench import machine
from fwd.cli.bench.texts import RANDOM, Task, tasks
from fwd.cli.common import Line, emit
from fwd.cli.options import json_option, uds_option
from fwd.cli.request import Finite
from fwd.cli.target import target
from fwd.errors import EngineError
from fwd.protocol.client import Client
from fwd.protocol.local import Status
from fwd.protocol.messages import Finished, Tokens
from fwd.protocol.values import MAX_CONTEXT, Timing

OFF = "off"
HOT = 1.5  # temperature of what follows random ids: nothing that comes can be foreseen
TEMPERATURES = (0.0, 1.0)


class Run(NamedTuple):
    """One answer: its ids, seconds from its first tokens to its end, tokens in that time, and the engine's account."""

    ids: list[int]
    seconds: float
    tokens: int
    timing: Timing

    @property
    def rate(self) -> float:
        """Tokens a millisecond after the first ones."""
        return self.tokens / self.seconds / 1e3 if self.seconds else 0.0


Key = tuple[str, float, str]  # kind of text, temperature, drafter


class Plan(NamedTuple):
    """What is measured: so many rounds of everything, each with texts of its own, after one that does not count."""

    texts: Mapping[str, Sequence[Task]]
    temperatures: Sequence[float]
    drafters: Sequence[str]
    rounds: int
    tokens: int

    def lines(self) -> Iterator[tuple[str, float]]:
        """The kinds of text at their temperatures."""
        for kind in self.texts:
            for temperature in (HOT,) if kind == RANDOM else self.temperatures:
                yield kind, temperature


@click.command()
@click.argument("model", required=False)
@click.option(
    "--text",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text that is continued as well; may repeat.",
)
@click.option("--drafter", "drafters", multiple=True, help="May repeat (default: auto and all that are loaded).")
@click.option("--temperature", "temperatures", multiple=True, type=Finite(0, 2), help="May repeat (default: 0 and 1).")
@click.option("--max-tokens", "tokens", default=128, type=click.IntRange(8, MAX_CONTEXT), help="Of each answer.")
@click.option("--rounds", default=5, type=click.IntRange(1, 100), help="Runs of everything, in turns; medians count.")
@click.option(
    "--save", metavar="FOLDER", type=click.Path(file_okay=False), help="Keep the result as a JSON file there."
)
@uds_option
@json_option
def speculation(  # noqa: PLR0917  # one parameter an option
    model: str | None,
    files: tuple[Path, ...],
    drafters: tuple[str, ...],
    temperatures: tuple[float, ...],
    tokens: int,
    rounds: int,
    save: str | None,
    uds: str | None,
    as_json: bool,
) -> int:
    """Measure what drafts are worth, on texts that the embedded model was not trained on and on your own.

    Each text is continued without drafts and by each drafter in turns, with the same seed: the same tokens must come.
    The running daemon is measured, or with MODEL (a folder or `demo`), or where none runs, a private one.
    """
    result: dict[str, Any] = {"what": "drafts", **machine.facts(), "rounds": rounds, "tokens": tokens}
    with target(model, uds) as (daemon, status):
        plan = _plan(status, files, drafters, temperatures=temperatures or TEMPERATURES, rounds=rounds, tokens=tokens)
        result |= _about(status) | {"kinds": _measured(daemon, plan)}
    if save:
        machine.save(result, Path(save))
    if as_json:
        emit(result)
    else:
        click.echo("\n".join(_lines(result)))
    return EngineError.exit_code if _changed(result) else 0


def _plan(
    status: Status,
    files: Sequence[Path],
    drafters: Sequence[str],
    *,
    temperatures: Sequence[float],
    rounds: int,
    tokens: int,
) -> Plan:
    assert status.engine
    try:
        texts = tasks(Path(status.model), files, rounds + 1, status.engine.vocab_size)
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--text: {error}") from error
    room = status.engine.context - tokens
    if room < 1:
        raise click.UsageError(f"--max-tokens: a context of {status.engine.context} tokens does not hold {tokens} more")
    cut = {kind: [task._replace(prompt=task.prompt[-room:]) for task in some] for kind, some in texts.items()}
    return Plan(cut, temperatures, [OFF, *(drafters or ("auto", *status.engine.drafters))], rounds, tokens)


def _about(status: Status) -> dict[str, Any]:
    assert status.engine
    engine = status.engine
    facts = {name: getattr(engine, name) for name in ("device", "dtype", "kernel_set", "threads", "drafters")}
    return {"model": status.name, **facts, "corpus_tokens": status.corpus_tokens}


def _measured(daemon: Client, plan: Plan) -> dict[str, Any]:
    """By kind, temperature and drafter."""
    runs: dict[Key, list[Run]] = defaultdict(list)
    line = Line()
    try:
        for turn in range(plan.rounds + 1):
            line.show(f"round {turn} of {plan.rounds}")
            for key, run in _round(daemon, plan, turn):
                runs[key] += [run] if turn else []
    finally:
        line.show("")
    kinds: dict[str, Any] = {kind: {} for kind in plan.texts}
    for kind, temperature in plan.lines():
        plain = runs[kind, temperature, OFF]
        kinds[kind][f"{temperature:g}"] = {
            name: _figures(runs[kind, temperature, name], plain) for name in plan.drafters
        }
    return kinds


def _round(daemon: Client, plan: Plan, turn: int) -> Iterator[tuple[Key, Run]]:
    """Everything once; who comes first takes turns."""
    names = [*plan.drafters[turn % len(plan.drafters) :], *plan.drafters[: turn % len(plan.drafters)]]
    for kind, temperature in plan.lines():
        some = plan.texts[kind]
        for name in names:
            options = {"temperature": temperature, "seed": turn, "max_tokens": plan.tokens, "drafter": name}
            yield (kind, temperature, name), _run(daemon, some[turn % len(some)], options)


def _run(daemon: Client, task: Task, options: Mapping[str, Any]) -> Run:
    """One answer; it is not remembered, or the next one would be drafted from it."""
    ids, first, begun, ended = list[int](), 0, 0.0, 0.0
    events = daemon.submit(task.prompt, prediction=task.prediction, cache=False, **options)
    for event in events:
        ended = time.perf_counter()
        if isinstance(event, Tokens):
            begun, first = (begun, first) if ids else (ended, len(event.ids))
            ids += event.ids
    assert isinstance(event, Finished)
    return Run(ids, ended - begun, len(ids) - first, event.timing)


def _figures(runs: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    """Medians, of the ratio those of each pair; `same` says that the tokens are those without drafts."""
    steps = sum(run.timing.steps for run in runs)
    drafted, accepted = (
        sum(sum(counts.values()) for counts in spent)
        for spent in ([run.timing.drafted for run in runs], [run.timing.accepted for run in runs])
    )
    ratios = [run.rate / other.rate for run, other in zip(runs, plain, strict=True) if other.rate]
    return {
        "accept_length": 1 + accepted / steps if steps else 1.0,
        "drafted": drafted,
        "accepted": accepted,
        "tokens_per_ms": statistics.median(run.rate for run in runs),
        "ratio": statistics.median(ratios) if ratios else 1.0,
        "same": all(run.ids == other.ids for run, other in zip(runs, plain, strict=True)),
        "samples": [run.rate for run in runs],
    }


def _each(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    for kind, temperatures in result["kinds"].items():
        for temperature, drafters in temperatures.items():
            for name, found in drafters.items():
                yield kind, temperature, name, found


def _changed(result: Mapping[str, Any]) -> list[str]:
    """Where drafts changed a token."""
    return [f"{kind} at {temperature}, {name}" for kind, temperature, name, found in _each(result) if not found["same"]]


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{result['model']} in {result['dtype']} on {result['device']} ({result['kernel_set']}), {result['cpu']}, "
        f"{result['cores']} cores; medians of {result['rounds']} answers of {result['tokens']} tokens"
    )
    for kind, temperature, name, found in _each(result):
        if name == OFF:
            yield f"{kind}, temperature {temperature}: {found['tokens_per_ms']:.3f} tokens/ms without drafts"
            continue
        share = f"{found['accepted'] / found['drafted']:4.0%} of {found['drafted']}" if found["drafted"] else "none"
        yield (
            f"  {name:<8} {found['ratio']:5.2f} × that, {found['tokens_per_ms']:.3f} tokens/ms, "
            f"{found['accept_length']:.2f} tokens a step, {share} drafted held"
        )
    for place in _changed(result):
        yield f"NOT THE SAME TOKENS: {place}"
