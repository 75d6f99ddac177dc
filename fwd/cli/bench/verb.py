"""The verb: runs the parts, prints them, saves them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click

from fwd.cli.bench import ceiling, decode, machine, startup
from fwd.cli.bench.speculation import speculation
from fwd.cli.common import emit
from fwd.cli.options import json_option, uds_option
from fwd.config import load

PARTS = ("startup", "decode")
DTYPES = get_args(ceiling.RunDtype)


class Benches(click.Group):
    """`fwd bench [MODEL]` is `fwd bench model [MODEL]`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put in the name that may be left out."""
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["model", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Benches)
def bench() -> None:
    """Measure a model on this machine: `fwd bench [MODEL]`, or what drafts are worth: `fwd bench speculation`."""


bench.add_command(speculation)


@bench.command("model")
@click.argument("model", default="demo")
@click.option("--only", "parts", multiple=True, type=click.Choice(PARTS), help="A part; may repeat (default: all).")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="May repeat.")
@click.option("--rounds", default=5, type=click.IntRange(1, 100), help="Runs of everything, in turns; medians count.")
@click.option("--tokens", default=256, type=click.IntRange(2, 4096), help="Tokens of each answer.")
@click.option("--peer/--no-peer", default=True, help="Run transformers on the same weights in turns with fwd.")
@click.option(
    "--save", metavar="FOLDER", type=click.Path(file_okay=False), help="Keep the result as a JSON file there."
)
@uds_option
@json_option
def bench_model(  # noqa: PLR0917  # one parameter an option
    model: str,
    parts: tuple[str, ...],
    dtypes: tuple[ceiling.RunDtype, ...],
    rounds: int,
    tokens: int,
    peer: bool,
    save: str | None,
    uds: str | None,
    as_json: bool,
) -> None:
    """Measure MODEL (default: the embedded one) on this machine, in daemons of our own.

    Start-up is from exec to the first accepted connection, to /ready and to the first token. Decode is tokens per
    second after the first token, through the socket and through HTTP.
    """
    say = (lambda _: None) if as_json else click.echo
    folder = load({"model": model}).folder.resolve()
    result: dict[str, Any] = {"what": "bench", **machine.facts(), "model": str(folder.name), "rounds": rounds}
    say(f"{result['cpu']}, {result['cores']} cores, fwd {result['versions']['fwd']} at {result['commit']}")
    wanted = parts or PARTS
    if "startup" in wanted:
        result["startup"] = startup.measure(str(folder), rounds, uds)
        say(_startup_line(result["startup"]))
    if "decode" in wanted:
        result["ceiling"] = ceiling.bandwidth()
        say(f"memory: {result['ceiling']['gb_per_s']:.1f} GB/s, {result['ceiling']['how']}")
        result["decode"] = {}
        for dtype in dtypes or DTYPES:
            plan = decode.Plan(folder, dtype, rounds, tokens, peer=peer, uds=uds)
            found = result["decode"][dtype] = decode.measure(plan, result["ceiling"]["gb_per_s"])
            say(_decode_lines(dtype, found))
    if save:
        say(f"saved as {machine.save(result, Path(save))}")
    if as_json:
        emit(result)


def _startup_line(found: Mapping[str, Any]) -> str:
    return (
        f"start-up: connection accepted after {found['accept_s'] * 1e3:.0f} ms (to reach: "
        f"{startup.ACCEPT_TARGET * 1e3:.0f}), ready after {found['ready_s']:.2f} s, "
        f"first token after {found['first_token_s']:.2f} s"
    )


def _decode_lines(dtype: str, found: Mapping[str, Any]) -> str:
    share = f"{found['http'] / found['engine']:.1%} of the engine's own {found['engine']:.1f}"
    lines = [
        f"decode, {dtype}: a step reads {found['step_bytes'] / 1e6:.1f} MB: ceiling {found['ceiling']:.0f} tokens/s",
        f"  socket {found['socket']:.1f} tokens/s ({found['socket'] / found['ceiling']:.0%} of the ceiling)",
        f"  HTTP   {found['http']:.1f} tokens/s ({share}), front {found['front_us_per_token']:.0f} µs CPU a token",
    ]
    return "\n".join([*lines, *_peer_lines(found)])


def _peer_lines(found: Mapping[str, Any]) -> list[str]:
    if "ratio" in found:
        return [
            f"  transformers {found['transformers']:.1f} tokens/s: HTTP is {found['ratio']:.2f} × it (to reach: 1.20)"
        ]
    return [f"  {found['peer_absent']}"] if "peer_absent" in found else []
