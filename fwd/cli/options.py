"""The options of every verb."""

import click


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.meta["json"] = value
    return value


uds_option = click.option("--uds", metavar="PATH", help="The daemon's socket.")
requant_option = click.option(
    "--requant",
    metavar="NAMES",
    callback=lambda _ctx, _parameter, value: value and tuple(value.split(",")),
    help="fp8-head, fp8-attn: made FP8 at load; by commas.",
)
draft_model_option = click.option(
    "--draft-model",
    metavar="FOLDER",
    help="A model, EAGLE-3 or DFlash; mtp: the model's own layers; none (default: what it comes with).",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_remember, help="Print one JSON document on stdout."
)
