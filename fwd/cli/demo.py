"""`fwd demo`: a private daemon on the embedded model, one completion, and how fast it was."""

from typing import Any

import click

from fwd.cli.common import emit
from fwd.cli.options import json_option, uds_option
from fwd.cli.private import Private, private_daemon
from fwd.cli.request import Answer, given, sampling_options
from fwd.protocol.local import Status
from fwd.protocol.values import Timing

PROMPT = '''def read_config(path, encoding="utf-8"):
    """Return'''
DEFAULTS = {"max_tokens": 160, "temperature": 0.6, "seed": 0}


@click.command()
@click.option("--prompt", default=PROMPT, help="The text to continue.")
@sampling_options
@uds_option
@json_option
def demo(prompt: str, uds: str | None, as_json: bool, **sampling: Any) -> None:
    """Stream a completion from the embedded model, then say how fast it was. Needs no daemon and leaves none."""
    with private_daemon("demo", "--http", "none", "--log-level", "warning", uds=uds) as private:
        found = private.ready()
        if not as_json:
            click.secho(prompt, dim=True, nl=False)
        answer = _stream(private, prompt, {**DEFAULTS, **given(sampling)}, silent=as_json)
    if as_json:
        emit({"prompt": prompt, **answer.document(), "engine": found.engine})
    else:
        click.echo(f"\n\n{_summary(answer, found)}")


def _stream(private: Private, prompt: str, options: dict[str, Any], *, silent: bool) -> Answer:
    with private.connect() as daemon:
        answer = Answer()
        for piece in answer.read(daemon.events(prompt, **options)):
            if not silent:
                click.echo(piece, nl=False)
    return answer


def _summary(answer: Answer, found: Status) -> str:
    assert found.engine
    assert answer.finished
    engine = found.engine
    return (
        f"{answer.tokens_per_s:.0f} tokens/s, first token after {answer.first * 1e3:.0f} ms, {answer.tokens} tokens\n"
        f"{engine.parameters / 1e6:.1f} M parameters in {engine.dtype} on {engine.device} ({engine.kernel_set}), "
        f"loaded in {engine.load_ms / 1e3:.1f} s\n"
        f"{_acceptance(answer.finished.timing)}"
    )


def _acceptance(timing: Timing) -> str:
    drafted, accepted = sum(timing.drafted.values()), sum(timing.accepted.values())
    if not drafted:
        return "acceptance: nothing was drafted"
    length = 1 + accepted / timing.steps
    return f"acceptance: {accepted / drafted:.0%} of {drafted} drafted tokens, {length:.2f} tokens a step"
