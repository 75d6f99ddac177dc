"""`fwd serve`: the daemon in the foreground."""

import os
import sys
import threading
import time
from typing import Any, get_args

import click

from fwd.cli.options import draft_model_option, json_option, requant_option, uds_option
from fwd.config import Config, Device, DType, KVDType, load


@click.command()
@click.argument("model", required=False)
@click.option("--name", help="The model id for clients (default: the folder's name).")
@click.option("--http", multiple=True, metavar="ADDRESS", help="HOST:PORT, unix:PATH or none; may repeat.")
@uds_option
@click.option("--keys", metavar="FILE", help="SHA-256 of each key, one a line; needed beyond loopback.")
@click.option(
    "--device",
    type=click.Choice(get_args(Device)),
    help="auto: a GPU, else the CPU; host: GPU kernels on the CPU.",
)
@click.option("--dtype", type=click.Choice(get_args(DType)), help="auto is the checkpoint's.")
@click.option("--context", type=int, help="Tokens of prompt and answer (default: the model's, or what the pool holds).")
@click.option("--kv-dtype", type=click.Choice(get_args(KVDType)))
@requant_option
@click.option("--strict/--no-strict", default=None, help="Refuse formats that kernels do not take as they are.")
@draft_model_option
@click.option("--max-seqs", type=int, help="Sequences that run at once, 1 to 16.")
@click.option("--threads", type=int, help="CPU threads (default: one a core; one for a model up to 64 MiB).")
@click.option("--hang-timeout", type=float, help="Seconds without progress until the engine is replaced.")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--config", "file", metavar="FILE", help="TOML; FWD_* and flags win over it.")
@json_option
def serve(file: str | None, as_json: bool, http: tuple[str, ...], **flags: Any) -> int:
    """Serve MODEL, a Hugging Face folder or `demo` (default), until told to stop.

    With --json one document is printed when the model is ready.
    """
    config = load({**flags, "http": http or None}, file)
    if as_json or sys.stderr.isatty():
        threading.Thread(target=_announce, args=(config, as_json), daemon=True).start()
    from fwd.daemon import main  # noqa: PLC0415  # its import begins the daemon's start

    return main.serve(config)


def _announce(config: Config, as_json: bool) -> None:
    """Watch our own socket like any client would, and say when the model is ready."""
    from fwd.cli import common  # noqa: PLC0415  # beside the start, not before it
    from fwd.errors import FwdError  # noqa: PLC0415
    from fwd.protocol.client import Client  # noqa: PLC0415

    while True:
        time.sleep(common.POLL)
        try:
            with Client(config.socket_path) as daemon:
                if daemon.status().pid != os.getpid():
                    continue
                status = common.wait_ready(daemon)
        except FwdError:
            continue
        break
    if as_json:
        common.emit(status)
    else:
        click.echo(f"fwd: {status.name} is ready on {', '.join(status.listening)}", err=True)
